"""How long a sender that does not wait stands still at a point (`wait="job"`), against a memcpy of the value: CPU.

    .venv/bin/python -m benchmarks.posting [--sizes 4KiB 1MiB 64MiB] [--rounds 9] [--calls 20] [--json FILE]

Two jobs of one rank, a process each. `taken`: the other job takes each point before the next is posted. `left`: no rank
takes them, the outbox is full, and each point displaces the oldest. In both, memory is used again, as in a program that
has run for a while. `waiting` is the same tensor with wait="both", for comparison: the sender then waits for the
receiver, which is there. Statistics are off. Each round measures every way in turn; ratios are within rounds.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch

from benchmarks.rounds import Spread, interleaved, ratio, spread
from benchmarks.units import MIB, parse_size, size_text, time_text
from grafter.config.settings.config import GrafterConfig
from grafter.rank.grafter import Grafter
from grafter.wire.store_server import HostedStore

# What must be reached.
STALL_MEMCPYS = 1.5
STALL_BYTES = 64 * MIB
SIZES = ("4KiB", "1MiB", "64MiB")
_OUTBOX_VALUES = 4
# Enough to fill an outbox of so many values twice, and to learn of all that was taken.
_WARM_UP_CALLS = 12


@dataclass(frozen=True)
class PostingResult:
    """Seconds in `dump` by way, and how many times those of a memcpy of the value."""

    nbytes: int
    seconds: dict[str, Spread]
    memcpys: dict[str, Spread]


class Other:
    """The job that receives. It takes a point when it gets its number."""

    def __init__(self, port: int, directory: str) -> None:
        context = multiprocessing.get_context("spawn")
        self._pipe, theirs = context.Pipe()
        self._process = context.Process(target=_receive, args=(theirs, port, directory), daemon=True)
        self._process.start()
        theirs.close()
        assert self._pipe.recv() == "joined"

    def order(self, name: str, number: int, nbytes: int) -> None:
        self._pipe.send((name, number, nbytes))

    def wait(self) -> str:
        outcome: str = self._pipe.recv()
        return outcome

    def close(self) -> None:
        self._pipe.send(None)
        self._process.join(60)


def _receive(pipe: Connection, port: int, directory: str) -> None:
    torch.set_num_threads(1)
    grafter = Grafter(_config("target", port, directory))
    grafter.begin()
    pipe.send("joined")
    values: dict[int, torch.Tensor] = {}
    while (order := pipe.recv()) is not None:
        name, number, nbytes = order
        value = values.setdefault(nbytes, torch.zeros(nbytes // 4))
        grafter.dump(name, value, number=number, wait="both" if name == "waiting" else "job")
        pipe.send("done")
    grafter.close()


def _config(role: str, port: int, directory: str, **settings: Any) -> GrafterConfig:
    return GrafterConfig(
        enable=True, role=role, rank=0, b2t_filter="True", master_port=port, store_host="launcher", dir=directory,
        run_name="run", stats="off", log_level="error", baseline_world_size=1, target_world_size=1, **settings,
    )  # fmt: skip


class Sender:
    """The sender: this process, as the baseline."""

    def __init__(self, grafter: Grafter, other: Other, nbytes: int) -> None:
        self._grafter, self._other, self._nbytes = grafter, other, nbytes
        self._value, self._copy = torch.ones(nbytes // 4), torch.zeros(nbytes // 4)
        self._number = 0

    def memcpy(self, calls: int) -> float:
        return self._median([_timed(lambda: self._copy.copy_(self._value)) for _ in range(calls)])

    def left(self, calls: int) -> float:
        return self._median([self._post("left") for _ in range(calls)])

    def taken(self, calls: int) -> float:
        seconds = []
        for _ in range(calls):
            seconds.append(self._post("taken"))
            self._other.order("taken", self._number, self._nbytes)
            self._other.wait()
        return self._median(seconds)

    def waiting(self, calls: int) -> float:
        seconds = []
        for _ in range(calls):
            self._other.order("waiting", self._number + 1, self._nbytes)
            seconds.append(self._post("waiting", wait="both"))
            self._other.wait()
        return self._median(seconds)

    def _post(self, name: str, wait: str = "job") -> float:
        self._number += 1
        return _timed(lambda: self._grafter.dump(name, self._value, number=self._number, wait=wait))

    def _median(self, seconds: list[float]) -> float:
        return sorted(seconds)[len(seconds) // 2]


def _timed(call: Callable[[], object]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def measure(nbytes: int, rounds: int, calls: int) -> PostingResult:
    """nbytes: of one value. One process is started for it."""
    with tempfile.TemporaryDirectory() as directory:
        store = HostedStore()
        limit = max(_OUTBOX_VALUES * nbytes, 64 * 1024)
        grafter = Grafter(_config("baseline", store.port, directory, outbox_bytes=str(limit)))
        grafter.begin()
        other = Other(store.port, directory)
        try:
            # Points before both have joined are another benchmark's.
            assert grafter.session
            sender = Sender(grafter, other, nbytes)
            ways = {name: getattr(sender, name) for name in ("memcpy", "left", "taken", "waiting")}
            for way in ways.values():
                way(_WARM_UP_CALLS)
            seconds = interleaved({name: partial(way, calls) for name, way in ways.items()}, rounds)
        finally:
            other.close()
            grafter.close()
            store.close()
    figures = {name: spread(values) for name, values in seconds.items()}
    memcpys = {name: ratio(seconds[name], seconds["memcpy"]) for name in list(ways)[1:]}
    return PostingResult(nbytes, figures, memcpys)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="The stall of a sender that does not wait, against a memcpy.")
    parser.add_argument("--sizes", nargs="+", type=parse_size, default=[parse_size(size) for size in SIZES])
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--calls", type=int, default=20)
    parser.add_argument("--json", type=Path)
    given = parser.parse_args(arguments)
    torch.set_num_threads(1)
    results = [measure(nbytes, given.rounds, given.calls) for nbytes in given.sizes]
    for result in results:
        for way, seconds in result.seconds.items():
            over = result.memcpys.get(way)
            times = f"{over.median:6.2f} memcpys ({over.low:.2f} to {over.high:.2f})" if over is not None else ""
            print(f"{size_text(result.nbytes):>8}  {way:8} {time_text(seconds.median):>9}  {times}")
        if result.nbytes == STALL_BYTES:
            met = all(result.memcpys[way].median <= STALL_MEMCPYS for way in ("left", "taken"))
            print(f"          at most {STALL_MEMCPYS:g} memcpys: {'met' if met else 'NOT met'}")
    if given.json is not None:
        given.json.write_text(json.dumps([asdict(result) for result in results], indent=1) + "\n")


if __name__ == "__main__":
    main()
