"""`grafter run` of two small programs, for tests of what a user of the command sees."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import textwrap
from dataclasses import dataclass
from pathlib import Path


@dataclass
class PairRun:
    """How it went: the exit code, all that it printed, and the figure of each row by its point (`0 layers.out`)."""

    code: int
    output: str

    @property
    def rel(self) -> dict[str, float]:
        row = re.compile(r"^\s*(\d+) (\S.*?)\s+compare\s+compared\s+\S+\s+(\S+)", re.MULTILINE)
        return {f"{step} {point}": float(rel) for step, point, rel in row.findall(self.output)}


def run_program(
    directory: Path, program: str, baseline: str, target: str, *options: str, target_python: str = sys.executable
) -> PairRun:
    """One program in both jobs, with an argument for each."""
    path = directory / "program.py"
    path.write_text(textwrap.dedent(program))
    kept = {name: value for name, value in os.environ.items() if not name.startswith("GRAFTER_")}
    done = subprocess.run(
        [
            sys.executable, "-m", "grafter.cli.main", "run", "--out", str(directory / "out"),
            "--baseline", f"{sys.executable} {path} {baseline}", "--target", f"{target_python} {path} {target}",
            *options,
        ],
        env={**kept, "OMP_NUM_THREADS": "1"}, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=300,
    )  # fmt: skip
    return PairRun(done.returncode, done.stdout)
