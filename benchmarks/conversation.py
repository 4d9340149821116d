"""A conversation that grows turn by turn, whose per-token data (routed experts) cross at each turn: what a turn costs.

    .venv/bin/python -m benchmarks.conversation [--tokens 32768] [--turns 64] [--rounds 5] [--stats full] [--json FILE]

The tensor is `[t, 48, 8]` int32, b2t from one rank to one. `everything` gives all tokens so far, at each turn; `start=`
the same tensor, with the position from which on rows count; `new rows only` the same, where grafter remembers it.
`gathered` is what one writes without grafter: `all_gather_object` of all tokens so far, over gloo; the last turns only.
`first` is how many of the tokens are there at the first turn; the others come in equal turns after it. By default they
are all equal.

Each round goes through all turns of each way, one after the other. A turn's time is that of the slower rank; its
processor seconds are those of both, and say more where something else runs on the machine. Ratios are within rounds,
of the last eighth of the turns. The receiver's tensor is checked after each conversation.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from benchmarks.crew import Crew, obey
from benchmarks.rounds import Spread, interleaved, ratio, spread
from benchmarks.ways import Ranks
from grafter.rendezvous.store import HostedStore, serve

ROW = (48, 8)
GATHERED = "gathered"
WAYS = ("everything", "start=", "new rows only", GATHERED)
# The field's figure for the same change, at as many tokens: 121 ms to 1.9 ms.
FASTER = 64.0
_UNTOUCHED = -1


@dataclass(frozen=True)
class Conversation:
    """lengths: how many tokens there are at each turn."""

    way: str
    number: int
    lengths: tuple[int, ...]


@dataclass(frozen=True)
class ConversationResult:
    """Per way and round: seconds and processor seconds of a turn among the first (after two) and the last eighth."""

    lengths: tuple[int, ...]
    seconds_early: dict[str, list[float]]
    seconds_late: dict[str, list[float]]
    processor_late: dict[str, list[float]]

    def faster(self, way: str, than: str = "everything") -> Spread:
        """How many times as fast one of the last turns is."""
        return ratio(self.seconds_late[than], self.seconds_late[way])

    def cheaper(self, way: str) -> Spread:
        """The same, in processor seconds."""
        return ratio(self.processor_late["everything"], self.processor_late[way])

    def growth(self, way: str) -> Spread:
        """What one of the last turns costs, in first ones."""
        return ratio(self.seconds_late[way], self.seconds_early[way])


class ConversationCrew(Crew):
    """One rank of each job."""

    def __init__(self, stats: str) -> None:
        self.way, self.ranks = "grafter", Ranks(1, 1)
        self._directory = tempfile.TemporaryDirectory()
        self._store: Any = HostedStore()
        self._gathering = serve("127.0.0.1", 0)
        self._processes, self._pipes = [], []
        ports = self._store.port, self._gathering.port
        self._start(_serve, [(role, *ports, self._directory.name, stats) for role in ("baseline", "target")])

    def __enter__(self) -> ConversationCrew:
        return self

    def prepare_tokens(self, tokens: int) -> None:
        self._ask("prepare", tokens)

    def talk(self, conversation: Conversation) -> tuple[list[float], list[float]]:
        """(seconds, processor seconds) of each turn."""
        one, other = self._ask("talk", conversation)
        return [max(pair) for pair in zip(one[0], other[0], strict=True)], [
            sum(pair) for pair in zip(one[1], other[1], strict=True)
        ]


# In a rank's process.


def _serve(pipe: Connection, role: str, port: int, gathering_port: int, directory: str, stats: str) -> None:
    obey(pipe, lambda: _Rank(role, port, gathering_port, directory, stats))


class _Rank:
    def __init__(self, role: str, port: int, gathering_port: int, directory: str, stats: str) -> None:
        settings = {
            "enable": "1", "role": role, "master_port": str(port), "store_host": "launcher", "b2t_filter": "True",
            "dir": directory, "run_name": "run", "log_level": "warning", "stats": stats,
        }  # fmt: skip
        os.environ.update({f"GRAFTER_{name.upper()}": value for name, value in settings.items()})
        os.environ.update({"RANK": "0", "WORLD_SIZE": "1"})
        import grafter

        torch.set_num_threads(1)
        self._grafter, self._sends = grafter, role == "baseline"
        self._sent = self._experts = torch.zeros(0)
        grafter.step()
        # After grafter has found out who this rank is.
        store = dist.TCPStore("127.0.0.1", gathering_port, is_master=False)
        dist.init_process_group("gloo", store=store, rank=0 if self._sends else 1, world_size=2)

    def prepare(self, tokens: int) -> None:
        generator = torch.Generator().manual_seed(0)
        self._sent = torch.randint(0, 128, (tokens, *ROW), dtype=torch.int32, generator=generator)
        self._experts = self._sent.clone()

    def talk(self, conversation: Conversation) -> tuple[list[float], list[float]]:
        grafter, way = self._grafter, conversation.way
        if not self._sends:
            self._experts.fill_(_UNTOUCHED)
        seconds, processor = [], []
        before = 0
        for length in conversation.lengths:
            if way == GATHERED:
                began, used = time.perf_counter(), time.process_time()
                self._gather(self._experts[:length])
                seconds.append(time.perf_counter() - began)
                processor.append(time.process_time() - used)
                continue
            experts = self._experts[:length]
            options = {"start=": {"start": before}, "new rows only": {"new_rows_only": True}}.get(way, {})
            began, used = time.perf_counter(), time.process_time()
            tokens = grafter.Tokens.from_lengths([conversation.number], [length])
            grafter.dump("experts", experts, dims="t layer k", tokens=tokens, way=way, **options)
            seconds.append(time.perf_counter() - began)
            processor.append(time.process_time() - used)
            grafter.step()
            before = length
        if not torch.equal(self._experts, self._sent):
            raise AssertionError(f"{way} brought something else")
        return seconds, processor

    def _gather(self, experts: torch.Tensor) -> None:
        gathered: list[Any] = [None, None]
        dist.all_gather_object(gathered, experts if self._sends else None)
        if not self._sends:
            experts.copy_(gathered[0])

    def close(self) -> None:
        self._grafter.close()
        dist.destroy_process_group()


def lengths_of(tokens: int, turns: int, first: int | None) -> tuple[int, ...]:
    """How long the conversation is at each turn, the last one being of all tokens."""
    begin = tokens // turns if first is None else first
    return tuple(begin + (tokens - begin) * turn // max(1, turns - 1) for turn in range(turns))


def measure(tokens: int, turns: int, rounds: int, stats: str, first: int | None = None) -> ConversationResult:
    lengths = lengths_of(tokens, turns, first)
    eighth = max(1, turns // 8)
    early: dict[str, list[float]] = {way: [] for way in WAYS}
    processor: dict[str, list[float]] = {way: [] for way in WAYS}
    numbers = iter(range(1 << 30))
    with ConversationCrew(stats) as crew:
        crew.prepare_tokens(tokens)

        def late_turn(way: str) -> float:
            turns_of_way = lengths[-eighth:] if way == GATHERED else lengths
            seconds, used = crew.talk(Conversation(way, next(numbers), turns_of_way))
            early[way].append(statistics.median(seconds[2 : 2 + eighth] or seconds))
            processor[way].append(statistics.median(used[-eighth:]))
            return statistics.median(seconds[-eighth:])

        measures: dict[str, Callable[[], float]] = {way: partial(late_turn, way) for way in WAYS}
        # Memory is mapped, and code warm, after one conversation of each.
        interleaved(measures, 1)
        for found in (early, processor):
            for values in found.values():
                values.clear()
        late = interleaved(measures, rounds)
    return ConversationResult(lengths, early, late, processor)


def _shown(result: ConversationResult) -> list[str]:
    lines = [f"{'way':16} {'early ms':>9} {'late ms':>9} {'growth':>7} {'faster':>7} {'± %':>5} {'processor':>10}"]
    for way in result.seconds_late:
        early, late = spread(result.seconds_early[way]).median, spread(result.seconds_late[way]).median
        faster = result.faster(way)
        lines.append(
            f"{way:16} {early * 1e3:9.2f} {late * 1e3:9.2f} {result.growth(way).median:7.2f} {faster.median:7.1f} "
            f"{faster.noise * 100:5.0f} {result.cheaper(way).median:10.1f}"
        )
    return lines


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="What a turn of a growing conversation costs.")
    parser.add_argument("--tokens", type=int, default=32768)
    parser.add_argument("--turns", type=int, default=64)
    parser.add_argument("--first", type=int, help="tokens of the first turn; default: as many as of the others")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--stats", choices=("full", "light", "off"), default="full")
    parser.add_argument("--json", type=Path)
    given = parser.parse_args(arguments)
    result = measure(given.tokens, given.turns, given.rounds, given.stats, given.first)
    last = result.lengths[-1] - (result.lengths[-2] if len(result.lengths) > 1 else 0)
    print(
        f"{given.tokens} tokens of {list(ROW)} int32, {given.turns} turns, the last of {last}, statistics {given.stats}"
    )
    print("\n".join(_shown(result)))
    for than in ("everything", GATHERED):
        times = result.faster("new rows only", than).median
        met = "met" if times >= FASTER else "not met"
        print(f"new rows only, over {than}: {times:.1f} times as fast; the target is {FASTER:.0f}: {met}")
    if given.json:
        given.json.write_text(json.dumps(asdict(result), indent=1))


if __name__ == "__main__":
    main()
