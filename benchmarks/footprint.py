"""Peak memory of one point, and what importing grafter adds to a program that has torch."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.rounds import Spread, spread
from benchmarks.ways import AllGatherObject, Grafter, Ranks, RawGloo, Sglang
from benchmarks.workers import WayGroup

_ROOT = Path(__file__).parent.parent
_IMPORT = """
import time, torch
start = time.perf_counter()
import grafter
print(time.perf_counter() - start)
"""


@dataclass
class MemoryResult:
    """Bytes that one process needs at most for one exchange, over what it had with the tensor alone."""

    way: str
    nbytes: int
    sender_bytes: int
    receiver_bytes: int

    def as_json(self) -> dict[str, Any]:
        return {
            "way": self.way,
            "bytes": self.nbytes,
            "sender_peak_bytes": self.sender_bytes,
            "receiver_peak_bytes": self.receiver_bytes,
        }


def measure_memory(nbytes: int, sglang: Path | None) -> list[MemoryResult]:
    """1->1, fresh processes for each way."""
    results = []
    for way in (Grafter.name, AllGatherObject.name, RawGloo.name) + ((Sglang.name,) if sglang is not None else ()):
        with WayGroup(way, Ranks(1, 1), sglang=sglang) as group:
            sender, receiver = group.memory_bytes(nbytes)
        results.append(MemoryResult(way, nbytes, sender, receiver))
    return results


@dataclass
class ImportResult:
    """Seconds of `import grafter` after `import torch`, in fresh processes, and the modules that cost most."""

    seconds: Spread
    processes: int
    costliest: list[tuple[str, float]]

    def as_json(self) -> dict[str, Any]:
        return {
            "median_seconds": self.seconds.median,
            "noise": self.seconds.noise,
            "processes": self.processes,
            "costliest": [{"module": module, "seconds": seconds} for module, seconds in self.costliest],
        }


def measure_import(processes: int) -> ImportResult:
    """One process more than `processes` is started: the first one may have to compile the package."""
    seconds = [float(_fresh_python("-c", _IMPORT).stdout) for _ in range(processes + 1)][1:]
    return ImportResult(spread(seconds), processes, _costliest_imports())


def _costliest_imports(count: int = 8) -> list[tuple[str, float]]:
    """(module, its own seconds) of what `import grafter` imports that `import torch` has not."""
    lines = _fresh_python("-X", "importtime", "-c", "import torch\nimport grafter").stderr.splitlines()
    # `import time: self [us] | cumulative | imported package`, a package after everything that it imports.
    rows = [line.removeprefix("import time:").split("|") for line in lines if line.startswith("import time:")]
    modules = [(row[2], int(row[0])) for row in rows[1:]]
    after_torch = [name for name, _ in modules].index(" torch") + 1
    added = [(name.strip(), microseconds / 1e6) for name, microseconds in modules[after_torch:]]
    return sorted(added, key=lambda row: -row[1])[:count]


def _fresh_python(*arguments: str) -> subprocess.CompletedProcess[str]:
    environ = {name: value for name, value in os.environ.items() if not name.startswith(("GRAFTER_", "DUMPER_"))}
    environ["PYTHONPATH"] = os.pathsep.join(filter(None, [str(_ROOT), environ.get("PYTHONPATH", "")]))
    return subprocess.run([sys.executable, *arguments], env=environ, capture_output=True, text=True, check=True)
