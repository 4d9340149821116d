"""What saving points costs, against `torch.save` of the same tensors in the caller: one thread, CPU.

    .venv/bin/python -m benchmarks.dumping [--mib 1024] [--files 10000] [--rounds 3] [--directory DIR] [--json FILE]

Large: so many MiB in tensors of 64 MiB. `cold` is a run's first step (its buffers are not there yet), `warm` a later
one, both dumped one right after the other; `spaced` is warm, and the writer has time between two dumps, as in a program
that computes. The stall is the time in `dump`, in copies of the same bytes; the end is when all is on disk as
`torch.save` leaves it (in the page cache). Small: files of 32 KiB. The library's `save_file`, in the caller, stands
beside the own writer.

Each round measures every way in turn and removes what it wrote; ratios are within rounds.
"""

from __future__ import annotations

import argparse
import json
import shutil
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from safetensors.torch import save_file

from benchmarks.rounds import Spread, interleaved, ratio, spread
from benchmarks.units import KIB, MIB
from grafter.dumps.writer import write_tensors
from grafter.grafter import Grafter
from grafter.settings.config import GrafterConfig

LARGE_BYTES, SMALL_BYTES = 64 * MIB, 32 * KIB
METADATA = {"grafter": "x" * 900}

# What must be reached.
FASTER_THAN_TORCH_SAVE = 1.5
STALL_MEMCPYS = 1.3


@dataclass(frozen=True)
class DumpingResult:
    """Seconds of each way and ratios of one run. `sizes`: bytes of one tensor, and how many."""

    sizes: tuple[int, int]
    seconds: dict[str, Spread]
    ratios: dict[str, Spread]


class Dumped:
    """A run that only dumps, into a directory of its own."""

    def __init__(self, directory: Path) -> None:
        self.directory = Path(tempfile.mkdtemp(dir=directory))
        config = GrafterConfig(
            enable=True, role="baseline", dump_filter="True", dir=str(self.directory), run_name="run", log_level="error"
        )
        self.grafter = Grafter(config)
        # Opens what the first point opens.
        self.grafter.dump("first", torch.ones(1))

    def dump(self, tensors: Sequence[torch.Tensor]) -> tuple[float, float]:
        """(seconds in `dump`, seconds until all is on disk)."""
        start = time.perf_counter()
        for tensor in tensors:
            self.grafter.dump("x", tensor)
        stalled = time.perf_counter() - start
        self.grafter.dumps.flush()
        return stalled, time.perf_counter() - start

    def dump_spaced(self, tensors: Sequence[torch.Tensor]) -> tuple[float, float]:
        """The same, where each is on disk before the next one comes."""
        stalled, start = 0.0, time.perf_counter()
        for tensor in tensors:
            stalled += self.dump([tensor])[0]
        return stalled, time.perf_counter() - start

    def remove_files(self) -> None:
        for path in self.directory.glob("run/baseline/rank0/*"):
            path.unlink()

    def close(self) -> None:
        self.grafter.close()
        shutil.rmtree(self.directory)


def measure(size: int, count: int, rounds: int, directory: Path) -> DumpingResult:
    """size: bytes of one tensor. directory: where to write; what is written is removed."""
    values = [torch.randn(size // 4) for _ in range(max(1, min(count, 256 * MIB // size)))]
    tensors = [values[number % len(values)] for number in range(count)]
    copies = [torch.empty_like(value).copy_(value) for value in values]
    stalls: dict[str, list[float]] = {"cold": [], "warm": [], "spaced": []}

    def memcpy() -> float:
        start = time.perf_counter()
        for number, tensor in enumerate(tensors):
            copies[number % len(copies)].copy_(tensor)
        return time.perf_counter() - start

    def in_caller(save: Callable[[torch.Tensor, Path], None]) -> Callable[[], float]:
        def run() -> float:
            own = Path(tempfile.mkdtemp(dir=directory))
            start = time.perf_counter()
            for number, tensor in enumerate(tensors):
                save(tensor, own / f"{number:06d}.file")
            seconds = time.perf_counter() - start
            shutil.rmtree(own)
            return seconds

        return run

    def dump(which: str) -> Callable[[], float]:
        def run() -> float:
            dumped = Dumped(directory)
            if which != "cold":
                dumped.dump(tensors)
                # Else the system slows whoever has twice as much to be written back.
                dumped.remove_files()
                # Between two steps of a program; what the first one missed is made meanwhile.
                time.sleep(2.0)
            stalled, seconds = dumped.dump_spaced(tensors) if which == "spaced" else dumped.dump(tensors)
            dumped.close()
            stalls[which].append(stalled)
            return seconds

        return run

    ways = {
        "memcpy": memcpy,
        "torch.save": in_caller(lambda tensor, path: torch.save(tensor, path)),
        "save_file": in_caller(lambda tensor, path: save_file({"value": tensor}, path, METADATA)),
        "own writer": in_caller(lambda tensor, path: write_tensors(path, {"value": tensor}, METADATA)),
        "dump, cold": dump("cold"),
        "dump, warm": dump("warm"),
        "dump, spaced": dump("spaced"),
    }
    seconds = interleaved(ways, rounds)
    ratios = {
        **{f"torch.save / {way}": ratio(seconds["torch.save"], seconds[way]) for way in list(ways)[2:]},
        **{f"stall / memcpy, {which}": ratio(stalls[which], seconds["memcpy"]) for which in stalls},
    }
    figures = {way: spread(values) for way, values in seconds.items()}
    figures |= {f"stall, {which}": spread(stalled) for which, stalled in stalls.items()}
    return DumpingResult((size, count), figures, ratios)


def main() -> None:
    parser = argparse.ArgumentParser(description="Cost of saving points, against torch.save.")
    parser.add_argument("--mib", type=int, default=1024)
    parser.add_argument("--files", type=int, default=10_000)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--directory", type=Path, help="where to write; default: the system's temporary directory")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory(dir=arguments.directory) as directory:
        results = [
            measure(LARGE_BYTES, arguments.mib * MIB // LARGE_BYTES, arguments.rounds, Path(directory)),
            measure(SMALL_BYTES, arguments.files, arguments.rounds, Path(directory)),
        ]
    for result in results:
        size, count = result.sizes
        print(f"{count} tensors of {size // KIB} KiB, {arguments.rounds} rounds: median (middle half)")
        for what, figure in result.seconds.items():
            print(f"  {what:24} {figure.median:8.3f} s  ({figure.low:.3f} to {figure.high:.3f})")
        for what, figure in result.ratios.items():
            print(f"  {what:24} {figure.median:8.2f}    ({figure.low:.2f} to {figure.high:.2f})")
    print(f"targets, large: torch.save / dump >= {FASTER_THAN_TORCH_SAVE}; stall / memcpy <= {STALL_MEMCPYS}")
    if arguments.json:
        arguments.json.write_text(json.dumps([asdict(result) for result in results], indent=1))


if __name__ == "__main__":
    main()
