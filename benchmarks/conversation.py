"""A conversation that grows turn by turn, whose per-token data (routed experts) cross at each turn: what a turn costs.

    .venv/bin/python -m benchmarks --parts conversation
    .venv/bin/python -m benchmarks.conversation [--tokens 32768] [--turns 64] [--rounds 7] [--stats full light off]

The tensor is `[t, 48, 8]` int32, b2t from one rank to one, one point a turn. `everything` gives all tokens so far, at
each turn; `start=` the same tensor, with the position from which on rows count; `new rows only` the same, where grafter
remembers it. `a plain point` gives the new rows as a tensor of their own, without tokens: what a point of so many bytes
costs at least. `gathered` is what one writes without grafter: `all_gather_object` of all tokens so far, over gloo, with
no statistics, ledger or check.

Each round goes through the turns of each way, one after the other (of the expensive ones, `everything` and `gathered`,
through some of the first and of the last alone). A turn's time is that of the slower rank, from making the tokens to
the return of `dump`; its processor seconds are those of both, and say more where something else runs on the machine:
waits, and being woken, are the machine's. Ratios are within rounds, of the last eighth of the turns. The receiver's
tensor is checked after each conversation.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from benchmarks.rounds import Spread, interleaved, ratio, spread
from benchmarks.ways import Ranks, import_grafter
from benchmarks.workers import WorkerGroup, obey_commands, worker_names
from grafter.wire.store_server import HostedStore, serve

ROW = (48, 8)
EVERYTHING, START, NEW_ROWS, PLAIN, GATHERED = "everything", "start=", "new rows only", "a plain point", "gathered"
WAYS = (EVERYTHING, START, NEW_ROWS, PLAIN, GATHERED)
TOKENS, TURNS = 32768, 64
STATS = ("full", "light", "off")
_UNTOUCHED = -1
# The first turns map memory and meet for the first time.
_LEAD_IN = 2
_GATHERED_TURNS = 3


@dataclass(frozen=True)
class Conversation:
    """lengths: how many tokens there are at each turn that is taken. before: at the turn before each of them."""

    way: str
    number: int
    lengths: tuple[int, ...]
    before: tuple[int, ...]


@dataclass(frozen=True)
class ConversationResult:
    """Per way and round: seconds and processor seconds of a turn among the first (after two) and the last eighth.

    seconds_by_turn: of those ways that take all turns, the median over rounds.
    """

    stats: str
    lengths: tuple[int, ...]
    seconds_early: dict[str, list[float]]
    seconds_late: dict[str, list[float]]
    processor_early: dict[str, list[float]]
    processor_late: dict[str, list[float]]
    seconds_by_turn: dict[str, list[float]]

    def faster(self, way: str, than: str = EVERYTHING) -> Spread:
        """How many times as fast one of the last turns is."""
        return ratio(self.seconds_late[than], self.seconds_late[way])

    def cheaper(self, way: str, than: str = EVERYTHING) -> Spread:
        """The same, in processor seconds."""
        return ratio(self.processor_late[than], self.processor_late[way])

    def growth(self, way: str) -> Spread:
        """What one of the last turns costs, in first ones."""
        return ratio(self.seconds_late[way], self.seconds_early[way])

    def processor_growth(self, way: str) -> Spread:
        """The same, in processor seconds."""
        return ratio(self.processor_late[way], self.processor_early[way])

    def as_json(self) -> dict[str, Any]:
        return asdict(self)


class ConversationGroup(WorkerGroup):
    """One rank of each job, with a second store for gathering."""

    def __init__(self, stats: str) -> None:
        super().__init__("conversation", HostedStore())
        self._gathering = serve("127.0.0.1", 0)
        place = self._store.port, self._gathering.port, self._directory.name, stats
        self._start(_run_worker, {name: (role, *place) for name, (role, _) in worker_names(Ranks(1, 1)).items()})

    def prepare_tokens(self, tokens: int) -> None:
        self._ask("prepare", tokens)

    def talk(self, conversation: Conversation) -> tuple[list[float], list[float]]:
        """(seconds, processor seconds) of each turn."""
        one, other = self._ask("talk", conversation)
        seconds = [max(pair) for pair in zip(one[0], other[0], strict=True)]
        return seconds, [sum(pair) for pair in zip(one[1], other[1], strict=True)]


def _run_worker(pipe: Connection, role: str, port: int, gathering_port: int, directory: str, stats: str) -> None:
    obey_commands(pipe, lambda: _Rank(role, port, gathering_port, directory, stats))


class _Rank:
    """The commands of a ConversationGroup, as one rank carries them out."""

    def __init__(self, role: str, port: int, gathering_port: int, directory: str, stats: str) -> None:
        self._grafter = import_grafter(role, 0, 1, port, directory, b2t_filter="True", stats=stats)
        self._sends = role == "baseline"
        self._sent = self._experts = torch.zeros(0)
        self._grafter.step()
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
        for length, before in zip(conversation.lengths, conversation.before, strict=True):
            experts = self._experts[:length]
            windows: dict[str, dict[str, Any]] = {START: {"start": before}, NEW_ROWS: {"new_rows_only": True}}
            options = windows.get(way, {})
            # In this order: asking for processor time is a system call, ten times as expensive.
            used, began = time.process_time(), time.perf_counter()
            if way == GATHERED:
                self._gather(experts)
            elif way == PLAIN:
                grafter.dump("experts", experts[before:], way=way)
            else:
                tokens = grafter.Tokens.from_lengths([conversation.number], [length])
                grafter.dump("experts", experts, dims="t layer k", tokens=tokens, way=way, **options)
            seconds.append(time.perf_counter() - began)
            processor.append(time.process_time() - used)
            if way != GATHERED:
                grafter.step()
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


def conversation_of(way: str, number: int, lengths: Sequence[int]) -> Conversation:
    """All turns; of the expensive ways, as many as are judged."""
    every = list(zip(lengths, (0, *lengths), strict=False))
    eighth = max(1, len(lengths) // 8)
    if way == EVERYTHING and len(every) > _LEAD_IN + 2 * eighth:
        every = every[: _LEAD_IN + eighth] + every[-eighth:]
    elif way == GATHERED:
        every = every[-_GATHERED_TURNS:]
    return Conversation(way, number, tuple(length for length, _ in every), tuple(before for _, before in every))


def measure_conversation(
    stats: str, rounds: int, *, tokens: int = TOKENS, turns: int = TURNS, first: int | None = None
) -> ConversationResult:
    """One kind of statistics. first: how many of the tokens are there at the first turn; the others are added
    in equal turns. By default all turns are equal.
    """
    lengths = lengths_of(tokens, turns, first)
    eighth = max(1, turns // 8)
    early: dict[str, list[float]] = {way: [] for way in WAYS}
    processor_early: dict[str, list[float]] = {way: [] for way in WAYS}
    processor_late: dict[str, list[float]] = {way: [] for way in WAYS}
    whole: dict[str, list[list[float]]] = {START: [], NEW_ROWS: [], PLAIN: []}
    numbers = iter(range(1 << 30))
    with ConversationGroup(stats) as group:
        group.prepare_tokens(tokens)

        def late_turn(way: str) -> float:
            seconds, used = group.talk(conversation_of(way, next(numbers), lengths))
            for found, values in ((early, seconds), (processor_early, used)):
                found[way].append(statistics.median(values[_LEAD_IN : _LEAD_IN + eighth] or values))
            processor_late[way].append(statistics.median(used[-eighth:]))
            if way in whole:
                whole[way].append(seconds)
            return statistics.median(seconds[-eighth:])

        measures: dict[str, Callable[[], float]] = {way: partial(late_turn, way) for way in WAYS}
        # Memory is mapped, and code warm, after one conversation of each.
        interleaved(measures, 1)
        for found in (early, processor_early, processor_late):
            for values in found.values():
                values.clear()
        for turns_of_rounds in whole.values():
            turns_of_rounds.clear()
        late = interleaved(measures, rounds)
    by_turn = {way: [statistics.median(turn) for turn in zip(*rows, strict=True)] for way, rows in whole.items()}
    return ConversationResult(stats, lengths, early, late, processor_early, processor_late, by_turn)


def shown(result: ConversationResult) -> list[str]:
    """Lines for a person."""
    last = result.lengths[-1] - (result.lengths[-2] if len(result.lengths) > 1 else 0)
    lines = [
        f"statistics {result.stats}: {result.lengths[-1]} tokens of {list(ROW)} int32, {len(result.lengths)} turns, "
        f"the last of {last}",
        f"{'way':16} {'early ms':>9} {'late ms':>9} {'growth':>7} {'faster':>7} {'± %':>5} "
        f"{'cpu ms':>8} {'growth':>7} {'cheaper':>8} {'± %':>5}",
    ]
    for way in result.seconds_late:
        early, late = spread(result.seconds_early[way]).median, spread(result.seconds_late[way]).median
        faster, cheaper = result.faster(way), result.cheaper(way)
        lines.append(
            f"{way:16} {early * 1e3:9.2f} {late * 1e3:9.2f} {result.growth(way).median:7.2f} {faster.median:7.1f} "
            f"{faster.noise * 100:5.0f} {spread(result.processor_late[way]).median * 1e3:8.2f} "
            f"{result.processor_growth(way).median:7.2f} {cheaper.median:8.1f} {cheaper.noise * 100:5.0f}"
        )
    turns = [turn for turn in (2, 4, 8, 16, 32, 64) if turn <= len(result.lengths)]
    by_turn = [f"{turn}: {result.seconds_by_turn[NEW_ROWS][turn - 1] * 1e3:.2f}" for turn in turns]
    return [*lines, f"new rows only, ms of turn {', '.join(by_turn)}"]


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="What a turn of a growing conversation costs.")
    parser.add_argument("--tokens", type=int, default=TOKENS)
    parser.add_argument("--turns", type=int, default=TURNS)
    parser.add_argument("--first", type=int, help="tokens of the first turn; default: as many as of the others")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--stats", nargs="+", choices=STATS, default=STATS)
    parser.add_argument("--json", type=Path)
    given = parser.parse_args(arguments)
    print(f"load before: {os.getloadavg()[0]:.2f}")
    results = []
    for stats in given.stats:
        result = measure_conversation(stats, given.rounds, tokens=given.tokens, turns=given.turns, first=given.first)
        results.append(result)
        print("\n".join(shown(result)))
        for than in (EVERYTHING, GATHERED):
            print(f"new rows only, over {than}: {result.faster(NEW_ROWS, than).median:.1f} times as fast")
    if given.json:
        given.json.write_text(json.dumps([result.as_json() for result in results], indent=1))


if __name__ == "__main__":
    main()
