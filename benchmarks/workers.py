"""Worker processes: the ranks of both jobs, which wait for commands.

They are forked from a server that has torch imported: a fresh one takes milliseconds instead of seconds.
"""

from __future__ import annotations

import multiprocessing
import os
import statistics
import tempfile
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from itertools import repeat
from multiprocessing.connection import Connection
from pathlib import Path
from types import TracebackType
from typing import Any, TypeVar

import torch

from benchmarks import empty
from benchmarks.memory_pages import status_bytes
from benchmarks.ways import SOLITARY, WAYS, Grafter, Model, Ranks, Way, WorkerRank
from grafter.wire.store_server import HostedStore, serve

_CONTEXT = multiprocessing.get_context("forkserver")
_CONTEXT.set_forkserver_preload(
    ["torch", "torch.distributed", "grafter.rank.grafter", "grafter.runtime.session", "benchmarks.ways"]
)

Self = TypeVar("Self", bound="WorkerGroup")


class WorkerError(RuntimeError):
    """A worker failed or hangs; holds its traceback."""


class WorkerGroup:
    """Some workers, the store of their run, which this process hosts, and their directory. Leaves no process behind.

    A subclass calls `_start`. A command goes to all workers, or to some, and returns when each of them has answered.
    """

    patience_seconds = 300.0
    # False for workers that the end of the `with` block kills; they are closed before it where they should be.
    closes_at_exit = True

    def __init__(self, title: str, store: Any) -> None:
        """`title`: names the group in errors. `store`: a HostedStore, or torch's own."""
        self._title, self._store = title, store
        self._directory = tempfile.TemporaryDirectory()
        self.names: list[str] = []
        self._processes: list[Any] = []
        self._pipes: list[Connection] = []

    def _start(self, run_worker: Callable[..., None], workers: Mapping[str, tuple[Any, ...]]) -> None:
        """Start `run_worker(pipe, *arguments)`, which calls `obey_commands`, for each worker by name. Returns when all
        are ready. Raises WorkerError.
        """
        for arguments in workers.values():
            ours, theirs = _CONTEXT.Pipe()
            process = _CONTEXT.Process(target=run_worker, args=(theirs, *arguments), daemon=True)
            process.start()
            theirs.close()
            self._processes.append(process)
            self._pipes.append(ours)
        self.names = list(workers)
        try:
            self._receive("start", range(len(self.names)))
        except BaseException:
            self._kill()
            raise

    @property
    def run_directory(self) -> Path:
        return Path(self._directory.name) / "run"

    def close(self) -> None:
        """End the processes normally. The directory stays until the end of the `with` block."""
        self._ask("close")
        for process in self._processes:
            process.join(60)

    def __enter__(self: Self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, _: BaseException | None, __: TracebackType | None) -> None:
        try:
            if kind is None and self.closes_at_exit:
                self.close()
        finally:
            self._kill()
            self._directory.cleanup()

    def _ask(self, command: str, *arguments: Any, of: Sequence[int] | None = None) -> list[Any]:
        """The answers to one command of all workers, or of those with these numbers. Raises WorkerError."""
        chosen = range(len(self._pipes)) if of is None else of
        for number in chosen:
            self._pipes[number].send((command, arguments))
        return self._receive(command, chosen)

    def _receive(self, command: str, chosen: Sequence[int]) -> list[Any]:
        answers = []
        for number in chosen:
            where = f"{self._title}: {self.names[number]} in {command!r}"
            try:
                if not self._pipes[number].poll(self.patience_seconds):
                    raise WorkerError(f"{where} hangs")
                succeeded, answer = self._pipes[number].recv()
            except EOFError:
                raise WorkerError(f"{where} ended") from None
            if not succeeded:
                raise WorkerError(f"{where} failed:\n{answer}")
            answers.append(answer)
        return answers

    def _kill(self) -> None:
        for process in self._processes:
            if process.is_alive():
                process.kill()
            process.join(10)
        for pipe in self._pipes:
            pipe.close()
        self._processes, self._pipes, self._store = [], [], None


def worker_names(ranks: Ranks) -> dict[str, tuple[str, int]]:
    """Name -> (role, role rank) of each rank, the baseline's first."""
    places = [("baseline", rank) for rank in range(ranks.baseline)] + [("target", k) for k in range(ranks.target)]
    return {f"{role} {rank}": (role, rank) for role, rank in places}


def obey_commands(pipe: Connection, make_rank: Callable[[], Any]) -> None:
    """Carry out commands in a worker, which are methods of its rank, until `close`. An error is sent and ends it."""
    for name in [name for name in os.environ if name.startswith(("GRAFTER_", "DUMPER_GRAFTER_"))]:
        del os.environ[name]
    # Host names that do not resolve are no reason to fail, nor is a firewall.
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    torch.set_num_threads(1)
    try:
        rank = make_rank()
        pipe.send((True, None))
        while True:
            command, arguments = pipe.recv()
            pipe.send((True, getattr(rank, command)(*arguments)))
            if command == "close":
                return
    except EOFError:
        return
    except BaseException:
        pipe.send((False, traceback.format_exc()))


class WayGroup(WorkerGroup):
    """The workers that exchange tensors in one way."""

    def __init__(self, way: str, ranks: Ranks, *, sglang: Path | None = None, **settings: str) -> None:
        """`settings` are GRAFTER_ fields. Raises WorkerError if a process does not start."""
        super().__init__(f"{way} {ranks}", HostedStore() if issubclass(WAYS[way], Grafter) else serve("127.0.0.1", 0))
        places = {"target 0": ("target", 0)} if way in SOLITARY else worker_names(ranks)
        port, directory, wheel = self._store.port, self._directory.name, str(sglang) if sglang else None
        workers = {
            name: (way, WorkerRank(role, rank, ranks, port, directory, wheel, settings))
            for name, (role, rank) in places.items()
        }
        self._start(_run_worker, workers)
        self._last = [len(self._pipes) - 1]

    def prepare(self, nbytes: int) -> float:
        """Make tensors of this size on every rank, exchange them once to warm up, and check them. Returns the seconds
        of the exchange.
        """
        return float(max(self._ask("prepare", nbytes)))

    def seconds_per_call(self, count: int, lead_in: int = 1) -> float:
        """The median of `count` exchanges after `lead_in` uncounted ones, as the slowest rank sees it."""
        medians = [statistics.median(seconds[lead_in:]) for seconds in self._ask("exchange", count + lead_in)]
        return float(max(medians))

    def memory_bytes(self, nbytes: int) -> list[int]:
        """Peak memory of one exchange, per rank, beyond that of the process with its tensor. For a fresh group."""
        return list(self._ask("memory", nbytes))

    def nanoseconds(self, loop: str, count: int) -> float:
        """Nanoseconds per call of one of `LOOPS`, in the last target rank alone."""
        return float(self._ask("loop", loop, count, of=self._last)[0])

    def seconds_per_pass(self, mode: str, count: int, *, alone: bool = False) -> float:
        """The median of `count` forward passes of a model, as the slower job sees it; or in the target's rank alone."""
        passes = self._ask("passes", mode, count, of=self._last if alone else None)
        return float(max(statistics.median(seconds) for seconds in passes))

    def model_facts(self) -> tuple[int, int]:
        """(hooks in the model, points of one pass)."""
        hooks, points = self._ask("facts", of=self._last)[0]
        return int(hooks), int(points)


def _run_worker(pipe: Connection, way_name: str, rank: WorkerRank) -> None:
    obey_commands(pipe, lambda: _WayRank(WAYS[way_name](rank)))


class _WayRank:
    """The commands of a WayGroup, as one rank carries them out."""

    def __init__(self, way: Way) -> None:
        self._way = way
        self._value = torch.zeros(1)

    def prepare(self, nbytes: int) -> float:
        self._fill(nbytes)
        (seconds,) = self.exchange(1)
        expected = self._way.rank.source + 1.0
        if not bool((self._value == expected).all()):
            raise AssertionError(f"{self._way.name} brought {self._value[:4].tolist()} instead of {expected}")
        return seconds

    def exchange(self, count: int) -> list[float]:
        exchange, value, clock = self._way.exchange, self._value, time.perf_counter
        seconds = []
        for _ in range(count):
            start = clock()
            exchange(value)
            seconds.append(clock() - start)
        return seconds

    def passes(self, mode: str, count: int) -> list[float]:
        assert isinstance(self._way, Model)
        seconds = []
        for _ in range(count):
            start = time.perf_counter()
            self._way.run(mode)
            seconds.append(time.perf_counter() - start)
        return seconds

    def facts(self) -> tuple[int, int]:
        assert isinstance(self._way, Model)
        return self._way.facts()

    def memory(self, nbytes: int) -> int:
        # Connections, groups and first pages that a first call brings along are not part of the point's memory.
        self._fill(4096)
        self._way.exchange(self._value)
        self._fill(nbytes)
        before = status_bytes("VmRSS")
        self._way.exchange(self._value)
        return status_bytes("VmHWM") - before

    def loop(self, name: str, count: int) -> float:
        return LOOPS[name](self._way, torch.zeros(16), count) / count * 1e9

    def close(self) -> None:
        self._way.close()

    def _fill(self, nbytes: int) -> None:
        # Freed first, so that the two largest are never there at once.
        self._value = torch.zeros(1)
        value = float(self._way.rank.role_rank + 1) if self._way.rank.sends else 0.0
        self._value = torch.full((max(1, nbytes // 4),), value)


# One function per loop: bytecode adapts to what it calls, so two functions called from one place slow each other.


def _loop_empty(way: Way, value: torch.Tensor, count: int) -> float:
    start = time.perf_counter()
    for _ in repeat(None, count):
        empty.dump("other", value, layer_id=3)
    return time.perf_counter() - start


def _loop_grafter(way: Way, value: torch.Tensor, count: int) -> float:
    import grafter

    start = time.perf_counter()
    for _ in repeat(None, count):
        grafter.dump("other", value, layer_id=3)
    return time.perf_counter() - start


def _loop_sglang(way: Any, value: torch.Tensor, count: int) -> float:
    dumper = way.dumper
    start = time.perf_counter()
    for _ in repeat(None, count):
        dumper.dump("other", value, layer_id=3)
    return time.perf_counter() - start


def _loop_sglang_disabled(way: Any, value: torch.Tensor, count: int) -> float:
    dumper = way.disabled_dumper
    start = time.perf_counter()
    for _ in repeat(None, count):
        dumper.dump("other", value, layer_id=3)
    return time.perf_counter() - start


LOOPS: dict[str, Callable[[Any, torch.Tensor, int], float]] = {
    "empty": _loop_empty,
    "grafter": _loop_grafter,
    "sglang": _loop_sglang,
    "sglang disabled": _loop_sglang_disabled,
}
