"""What saving points costs, against `torch.save` of the same tensors in the caller: CPU tensors, one torch thread.

    .venv/bin/python -m benchmarks.dumping [--mib 1024] [--files 10000] [--rounds 3] [--directory DIR] [--synced]

Large: so many MiB in tensors of 64 MiB. `cold` is a run's first step, whose buffers are new; `warm` a later one; both
dump one tensor right after the other. `spaced` is warm, and each tensor is on disk before the next dump, as in a
program that computes (large ones only). Small: files of 32 KiB. The library's `save_file`, in the caller, stands beside
our own writer.

A way's end is when all of its files are there as `torch.save` leaves them: in the page cache, and neither we nor it ask
the system to bring them to the disk. `--synced` measures also what it takes until they are there (`fsync` of each). The
stall is the time in `dump`, in copies of the same bytes into memory that is there; those that `spaced` is compared with
come after a file was written, as its dumps do. Processor time is that of all threads of the process.

Each round measures every way, in the same file system, and removes what it wrote; ratios are within rounds. A directory
in memory (`--directory /dev/shm`) shows what the code costs without a disk.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from rich.console import Console
from safetensors.torch import save_file

from benchmarks.dumping_table import dumping_table, dumping_targets
from benchmarks.memory_pages import PeakMemory, touch_free_memory
from benchmarks.rounds import Spread, ratio, spread
from benchmarks.units import KIB, MIB, size_text
from grafter.config.settings.config import GrafterConfig
from grafter.rank.grafter import Grafter
from grafter.store.dumps.writer import write_tensors

LARGE_BYTES, SMALL_BYTES = 64 * MIB, 32 * KIB
METADATA = {"grafter": "x" * 900}
# More distinct tensors than this would only take memory.
_MOST_VALUES_BYTES = 256 * MIB
# What a dump may keep in memory where that is measured.
_QUEUE_BYTES = 256 * MIB
_PAUSE_SECONDS = 0.2

TORCH_SAVE, SAVE_FILE, OWN_WRITER = "torch.save", "save_file", "own writer"

Save = Callable[[torch.Tensor, Path], None]


@dataclass(frozen=True)
class DumpingResult:
    """Of `count` tensors of `nbytes`: by way, seconds until the end and of the processor; how many times less than
    `torch.save` took; seconds in `dump` by kind, and in how many copies, by the clock and by the processor time of the
    thread that dumps. peak_bytes: by how much the process grew while it dumped with a queue of `queue_bytes`."""

    nbytes: int
    count: int
    seconds: dict[str, Spread]
    processor_seconds: dict[str, Spread]
    faster: dict[str, Spread]
    less_processor: dict[str, Spread]
    stalls: dict[str, Spread]
    stall_memcpys: dict[str, Spread]
    stall_processor_memcpys: dict[str, Spread]
    queue_bytes: int
    peak_bytes: int | None

    def __str__(self) -> str:
        return f"{self.count} tensors of {size_text(self.nbytes)}"

    def as_json(self) -> dict[str, Any]:
        return asdict(self)


class Elapsed(NamedTuple):
    """The time that passed: seconds by the clock, and of the processor on this thread."""

    seconds: float
    processor: float

    def __add__(self, other: Elapsed) -> Elapsed:  # type: ignore[override]
        return Elapsed(self.seconds + other.seconds, self.processor + other.processor)


class Stopwatch:
    """A stopwatch, which starts when it is made."""

    def __init__(self) -> None:
        self._start = Elapsed(time.perf_counter(), time.thread_time())

    def stop(self) -> Elapsed:
        return Elapsed(time.perf_counter() - self._start.seconds, time.thread_time() - self._start.processor)


class Dumped:
    """A run that only dumps, into its own directory."""

    def __init__(self, directory: Path, **settings: Any) -> None:
        self.directory = Path(tempfile.mkdtemp(dir=directory))
        config = GrafterConfig(
            enable=True, role="baseline", dump_filter="True", dir=str(self.directory), run_name="run",
            log_level="error", **settings,
        )  # fmt: skip
        self.grafter = Grafter(config)
        # Opens what the first point opens.
        self.grafter.dump("first", torch.ones(1))
        self.grafter.tools.dumps.flush()

    def dump(self, tensors: Sequence[torch.Tensor]) -> Elapsed:
        """The time in `dump`. All is on disk when it returns."""
        watch = Stopwatch()
        for tensor in tensors:
            self.grafter.dump("x", tensor)
        stalled = watch.stop()
        self.grafter.tools.dumps.flush()
        return stalled

    def remove_files(self) -> None:
        for path in self.files():
            path.unlink()

    def files(self) -> list[Path]:
        return sorted(self.directory.glob("run/baseline/rank0/*"))

    def close(self) -> None:
        self.grafter.close()
        shutil.rmtree(self.directory)


class Dumping:
    """All ways of saving `count` tensors of `nbytes` in one directory. Keeps what a way measures besides its time."""

    def __init__(self, nbytes: int, count: int, directory: Path) -> None:
        values = max(1, min(count, _MOST_VALUES_BYTES // nbytes))
        self._values = [torch.randn(nbytes // 4) for _ in range(values)]
        self._copies = [torch.empty_like(value).copy_(value) for value in self._values]
        self._tensors = [self._values[number % values] for number in range(count)]
        self._directory = directory
        # Of the page cache and of buffers, and some more.
        self._new_bytes = 9 * nbytes * count // 4
        self.processor: dict[str, list[float]] = defaultdict(list)
        self.stalls: dict[str, list[Elapsed]] = defaultdict(list)
        self.copies: dict[str, list[Elapsed]] = defaultdict(list)

    def ways(self, *, synced: bool) -> dict[str, Callable[[], float]]:
        def save(tensor: torch.Tensor, path: Path) -> None:
            torch.save(tensor, path)

        def write(tensor: torch.Tensor, path: Path) -> None:
            write_tensors(path, {"value": tensor}, METADATA)

        ways: dict[str, Callable[[], float]] = {
            "memcpy": self._memcpy,
            TORCH_SAVE: lambda: self._in_caller(TORCH_SAVE, save),
            SAVE_FILE: lambda: self._in_caller(
                SAVE_FILE, lambda tensor, path: save_file({"value": tensor}, path, METADATA)
            ),
            OWN_WRITER: lambda: self._in_caller(OWN_WRITER, write),
            "dump, cold": lambda: self._dump("cold"),
            "dump, warm": lambda: self._dump("warm"),
        }
        if self._values[0].nbytes >= MIB:
            # A small one takes less time than the other thread needs to wake up: that would be all one sees.
            ways["dump, spaced"] = self._dump_spaced
        if synced:
            ways[f"{TORCH_SAVE}, synced"] = lambda: self._in_caller(f"{TORCH_SAVE}, synced", save, synced=True)
            ways["dump, synced"] = lambda: self._dump("warm", "dump, synced", synced=True)
        return ways

    def _memcpy(self) -> float:
        watch = Stopwatch()
        for number, tensor in enumerate(self._tensors):
            self._copies[number % len(self._copies)].copy_(tensor)
        copied = watch.stop()
        for kind in ("cold", "warm"):
            self.copies[kind].append(copied)
        return copied.seconds

    def _in_caller(self, way: str, save: Save, *, synced: bool = False) -> float:
        own = Path(tempfile.mkdtemp(dir=self._directory))
        touch_free_memory(self._new_bytes)
        start, processor = time.perf_counter(), time.process_time()
        for number, tensor in enumerate(self._tensors):
            save(tensor, own / f"{number:06d}.file")
        if synced:
            _sync(sorted(own.iterdir()))
        self.processor[way].append(time.process_time() - processor)
        seconds = time.perf_counter() - start
        shutil.rmtree(own)
        return seconds

    def _dump(self, kind: str, way: str = "", *, synced: bool = False) -> float:
        dumped = Dumped(self._directory)
        if kind != "cold":
            dumped.dump(self._tensors)
            # Otherwise the system slows a process that has twice as much to be written back.
            dumped.remove_files()
            time.sleep(_PAUSE_SECONDS)
        touch_free_memory(self._new_bytes)
        start, processor = time.perf_counter(), time.process_time()
        stalled = dumped.dump(self._tensors)
        if synced:
            _sync(dumped.files())
        seconds = time.perf_counter() - start
        self.processor[way or f"dump, {kind}"].append(time.process_time() - processor)
        if not way:
            self.stalls[kind].append(stalled)
        dumped.close()
        return seconds

    def _dump_spaced(self) -> float:
        """Seconds of the dumps alone; between them, as many copies, each after a file was written, too."""
        dumped = Dumped(self._directory)
        dumped.dump(self._tensors)
        dumped.remove_files()
        touch_free_memory(self._new_bytes)
        own = Path(tempfile.mkdtemp(dir=self._directory))
        stalled = copied = Elapsed(0.0, 0.0)
        seconds = busy = 0.0
        for number, tensor in enumerate(self._tensors):
            start, processor = time.perf_counter(), time.process_time()
            stalled += dumped.dump([tensor])
            busy += time.process_time() - processor
            seconds += time.perf_counter() - start
            watch = Stopwatch()
            self._copies[number % len(self._copies)].copy_(tensor)
            copied += watch.stop()
            write_tensors(own / "x", {"value": tensor}, METADATA)
        self.processor["dump, spaced"].append(busy)
        self.stalls["spaced"].append(stalled)
        self.copies["spaced"].append(copied)
        dumped.close()
        shutil.rmtree(own)
        return seconds

    def peak_bytes(self) -> int | None:
        """By how much the process grows at most while it dumps with a queue of `_QUEUE_BYTES`."""
        dumped = Dumped(self._directory, dump_queue_bytes=str(_QUEUE_BYTES))
        memory = PeakMemory()
        dumped.dump(self._tensors)
        growth = memory.growth_bytes()
        dumped.close()
        return growth


def _shuffled(ways: dict[str, Callable[[], float]], rounds: int) -> dict[str, list[float]]:
    """The results of each way, one per round. Each round has another order, the same in every run: memory that a way
    frees is what the next one takes."""
    order, results = random.Random(0), defaultdict(list)
    for _ in range(rounds):
        for way in order.sample(list(ways), len(ways)):
            results[way].append(ways[way]())
    return {way: results[way] for way in ways}


def _sync(paths: Sequence[Path]) -> None:
    for path in paths:
        descriptor = os.open(path, os.O_RDONLY)
        os.fsync(descriptor)
        os.close(descriptor)


def measure_dumping(
    nbytes: int, count: int, rounds: int, directory: Path | None = None, *, synced: bool = False
) -> DumpingResult:
    """nbytes: of one tensor. directory: where to write, default the system's temporary one; what is written is
    removed."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with tempfile.TemporaryDirectory(dir=directory) as own:
            dumping = Dumping(nbytes, count, Path(own))
            seconds = _shuffled(dumping.ways(synced=synced), rounds)
            peak_bytes = dumping.peak_bytes()
    finally:
        torch.set_num_threads(threads)
    processor = dumping.processor

    def times_faster(of: dict[str, list[float]]) -> dict[str, Spread]:
        return {
            way: ratio(of[f"{TORCH_SAVE}, synced" if "synced" in way else TORCH_SAVE], of[way])
            for way in of
            if way != "memcpy" and TORCH_SAVE not in way
        }

    def in_copies(kind: str, field: int) -> Spread:
        return ratio([stall[field] for stall in dumping.stalls[kind]], [copy[field] for copy in dumping.copies[kind]])

    return DumpingResult(
        nbytes, count,
        seconds={way: spread(values) for way, values in seconds.items()},
        processor_seconds={way: spread(processor[way]) for way in seconds if way in processor},
        faster=times_faster(seconds),
        less_processor=times_faster(processor),
        stalls={kind: spread([stall.seconds for stall in dumping.stalls[kind]]) for kind in dumping.stalls},
        stall_memcpys={kind: in_copies(kind, 0) for kind in dumping.stalls},
        stall_processor_memcpys={kind: in_copies(kind, 1) for kind in dumping.stalls},
        queue_bytes=_QUEUE_BYTES, peak_bytes=peak_bytes,
    )  # fmt: skip


def measure_large_and_small(
    total_bytes: int, files: int, rounds: int, directory: Path | None = None, *, synced: bool = False
) -> list[DumpingResult]:
    """`total_bytes` in tensors of 64 MiB, and so many files of 32 KiB; 0 leaves one of them out."""
    given = ((LARGE_BYTES, total_bytes // LARGE_BYTES), (SMALL_BYTES, files))
    return [measure_dumping(nbytes, count, rounds, directory, synced=synced) for nbytes, count in given if count]


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Cost of saving points, against torch.save.")
    parser.add_argument("--mib", type=int, default=1024)
    parser.add_argument("--files", type=int, default=10_000)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--directory", type=Path, help="where to write; default: the system's temporary directory")
    parser.add_argument("--synced", action="store_true", help="also: until all is on the disk")
    parser.add_argument("--json", type=Path)
    given = parser.parse_args(arguments)
    results = measure_large_and_small(given.mib * MIB, given.files, given.rounds, given.directory, synced=given.synced)
    console = Console(width=None if sys.stdout.isatty() else 180)
    console.print(dumping_table(results))
    for target in dumping_targets(results):
        console.print(f"{target.what}: {target.measured:.3g}, {target.text}: {'met' if target.met else 'NOT met'}")
    if given.json:
        given.json.write_text(json.dumps([result.as_json() for result in results], indent=1) + "\n")


if __name__ == "__main__":
    main()
