"""A crew: the processes of both jobs that exchange tensors one way. They wait until they are told what to do next.

Its ranks are forked from a server that has torch imported: a fresh one takes milliseconds instead of seconds.
"""

from __future__ import annotations

import multiprocessing
import os
import statistics
import tempfile
import time
import traceback
from collections.abc import Callable, Iterable, Sequence
from itertools import repeat
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch

from benchmarks import empty
from benchmarks.ways import SOLITARY, WAYS, Grafter, Model, Ranks, Seat, Way
from grafter.wire.store_server import HostedStore, serve

_CONTEXT = multiprocessing.get_context("forkserver")
_PRELOAD = ["torch", "torch.distributed", "grafter.rank.grafter", "grafter.runtime.session", "benchmarks.ways"]
_CONTEXT.set_forkserver_preload(_PRELOAD)
_PATIENCE_SECONDS = 300.0


class CrewError(RuntimeError):
    """A process of a crew failed or hangs; holds its traceback."""


class Crew:
    """One way's processes. Commands go to all of them at once and return when all have answered."""

    def __init__(self, way: str, ranks: Ranks, *, sglang: Path | None = None, **settings: str) -> None:
        """`settings` are GRAFTER_ fields. Raises CrewError if a process does not come up."""
        self.way, self.ranks = way, ranks
        self._directory = tempfile.TemporaryDirectory()
        self._store: Any = HostedStore() if issubclass(WAYS[way], Grafter) else serve("127.0.0.1", 0)
        self._processes: list[Any] = []
        self._pipes: list[Connection] = []
        seats: list[tuple[Any, ...]] = []
        roles = [("baseline", k) for k in range(ranks.baseline)] + [("target", k) for k in range(ranks.target)]
        for role, role_rank in [("target", 0)] if way in SOLITARY else roles:
            seat = Seat(
                role,
                role_rank,
                ranks,
                self._store.port,
                self._directory.name,
                str(sglang) if sglang else None,
                settings,
            )
            seats.append((way, seat))
        self._start(_serve, seats)

    def _start(self, serve: Callable[..., None], seats: Iterable[tuple[Any, ...]]) -> None:
        """A process for each: `serve(pipe, *seat)`, which calls `obey`. Waits until all are ready."""
        for seat in seats:
            ours, theirs = _CONTEXT.Pipe()
            process = _CONTEXT.Process(target=serve, args=(theirs, *seat), daemon=True)
            process.start()
            theirs.close()
            self._processes.append(process)
            self._pipes.append(ours)
        try:
            self._hear()
        except BaseException:
            self._kill()
            raise

    def prepare(self, nbytes: int) -> float:
        """Tensors of this size on every rank, one exchange to warm up, and a check of what came. Its seconds."""
        return float(max(self._ask("prepare", nbytes)))

    def seconds_per_call(self, count: int, lead_in: int = 1) -> float:
        """The median of `count` exchanges after `lead_in` uncounted ones, as the slowest rank sees it."""
        medians = [statistics.median(seconds[lead_in:]) for seconds in self._ask("exchange", count + lead_in)]
        return float(max(medians))

    def memory_bytes(self, nbytes: int) -> list[int]:
        """Peak memory of one exchange over what was there with the tensor, per rank. For a crew of its own."""
        return list(self._ask("memory", nbytes))

    def nanoseconds(self, loop: str, count: int) -> float:
        """Per call of one of `LOOPS`, in the last target rank alone."""
        return float(self._ask("loop", loop, count, of=[len(self._pipes) - 1])[0])

    def seconds_per_pass(self, mode: str, count: int, *, alone: bool = False) -> float:
        """The median of `count` forward passes of a model, as the slower job sees it; or in the target's rank alone."""
        chosen = [len(self._pipes) - 1] if alone else None
        return float(max(statistics.median(seconds) for seconds in self._ask("passes", mode, count, of=chosen)))

    def model_facts(self) -> tuple[int, int]:
        """Hooks in the model, and points of one pass."""
        hooks, points = self._ask("facts", of=[len(self._pipes) - 1])[0]
        return int(hooks), int(points)

    def ledger_directory(self) -> Path:
        return Path(self._directory.name) / "run"

    def close(self) -> None:
        """Ends the processes in good order; the directory stays until `forget`."""
        try:
            self._ask("close")
            for process in self._processes:
                process.join(30)
        finally:
            self._kill()

    def forget(self) -> None:
        self._directory.cleanup()

    def __enter__(self) -> Crew:
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        try:
            if kind is None:
                self.close()
        finally:
            self._kill()
            self.forget()

    def _ask(self, command: str, *arguments: Any, of: Sequence[int] | None = None) -> list[Any]:
        chosen = range(len(self._pipes)) if of is None else of
        for number in chosen:
            self._pipes[number].send((command, arguments))
        return self._hear(chosen)

    def _hear(self, chosen: Sequence[int] | None = None) -> list[Any]:
        answers = []
        for number in range(len(self._pipes)) if chosen is None else chosen:
            pipe = self._pipes[number]
            try:
                if not pipe.poll(_PATIENCE_SECONDS):
                    raise CrewError(f"{self.way} {self.ranks}: process {number} hangs")
                good, answer = pipe.recv()
            except EOFError:
                raise CrewError(f"{self.way} {self.ranks}: process {number} died") from None
            if not good:
                raise CrewError(f"{self.way} {self.ranks}: process {number} failed\n{answer}")
            answers.append(answer)
        return answers

    def _kill(self) -> None:
        for process in self._processes:
            if process.is_alive():
                process.kill()
            process.join(10)
        for pipe in self._pipes:
            pipe.close()
        self._processes, self._pipes = [], []
        self._store = None


# In a rank's process.


def obey(pipe: Connection, make_rank: Callable[[], Any]) -> None:
    """Carry out commands, which are methods of a rank, until `close`; an error is told and ends the process."""
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


def _serve(pipe: Connection, way_name: str, seat: Seat) -> None:
    obey(pipe, lambda: _Rank(WAYS[way_name](seat)))


class _Rank:
    """The commands, as one rank carries them out."""

    def __init__(self, way: Way) -> None:
        self._way = way
        self._value = torch.zeros(1)

    def prepare(self, nbytes: int) -> float:
        self._fill(nbytes)
        (seconds,) = self.exchange(1)
        expected = self._way.seat.source + 1.0
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
        # Connections, groups and first pages of whatever a first call brings along are no part of the point's memory.
        self._fill(4096)
        self._way.exchange(self._value)
        self._fill(nbytes)
        before = _status_bytes("VmRSS")
        self._way.exchange(self._value)
        return _status_bytes("VmHWM") - before

    def loop(self, name: str, count: int) -> float:
        return LOOPS[name](self._way, torch.zeros(16), count) / count * 1e9

    def close(self) -> None:
        self._way.close()

    def _fill(self, nbytes: int) -> None:
        # Freed first: two of the largest at once are nobody's business.
        self._value = torch.zeros(1)
        value = float(self._way.seat.role_rank + 1) if self._way.seat.sends else 0.0
        self._value = torch.full((max(1, nbytes // 4),), value)


def _status_bytes(field: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"/proc/self/status has no {field}")


# One loop a function: bytecode adapts to what it calls, so that two functions called from one place slow each other.


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
