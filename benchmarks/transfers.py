"""The time that one tensor takes to cross, by size and number of ranks, every way in every round."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks.memory_pages import available_bytes
from benchmarks.rounds import Spread, interleaved, ratio, spread
from benchmarks.units import KIB, MIB, size_text
from benchmarks.ways import WAYS, AllGatherObject, AllGatherObjectOfAll, Grafter, Memcpy, Ranks, RawGloo, Sglang
from benchmarks.workers import WayGroup

Say = Callable[[str], None]
# The rest is for the other jobs of the machine, and for what the estimate does not know.
_SHARE_OF_MEMORY = 0.7
_CALLS_PER_ROUND = 100
# Above this many seconds a call, neither clocks nor the start of a batch matter.
_SLOW_CALL = 0.05
# They take seconds where grafter takes milliseconds; only these sizes are theirs.
_SLOW_WAYS = (AllGatherObjectOfAll.name, Sglang.name)
_THEIR_SIZES = (4 * KIB, 64 * MIB)


@dataclass(frozen=True)
class Effort:
    """How long to measure: rounds of one batch per way, within the budget of a case where three rounds allow it."""

    rounds: int
    batch_seconds: float
    case_seconds: float
    gather_from_all: bool


@dataclass
class CaseResult:
    """One number of ranks and one size. Seconds per call, one value per round, by way."""

    ranks: Ranks
    nbytes: int
    seconds: dict[str, list[float]]
    calls_per_round: dict[str, int]
    left_out: dict[str, str] = field(default_factory=dict)

    def spread(self, way: str) -> Spread:
        return spread(self.seconds[way])

    def ratio(self, way: str, over: str) -> Spread | None:
        """Of the seconds of two ways, within rounds; None where one was left out."""
        if way not in self.seconds or over not in self.seconds:
            return None
        return ratio(self.seconds[way], self.seconds[over])

    def as_json(self) -> dict[str, Any]:
        return {
            "ranks": str(self.ranks),
            "bytes": self.nbytes,
            "seconds": self.seconds,
            "median_seconds": {way: self.spread(way).median for way in self.seconds},
            "calls_per_round": self.calls_per_round,
            "left_out": self.left_out,
        }


@dataclass
class StageResult:
    """Where the calls of one case spend their time, by the ledger: median seconds by stage, of one role's rank 0."""

    ranks: Ranks
    nbytes: int
    role: str
    stages: dict[str, float]
    call_seconds: float

    @property
    def elsewhere(self) -> float:
        """In `dump` and in no stage: tags, key and header before, the ledger after."""
        return max(0.0, self.call_seconds - sum(self.stages.values()))

    def as_json(self) -> dict[str, Any]:
        return {
            "ranks": str(self.ranks),
            "bytes": self.nbytes,
            "role": self.role,
            "seconds": {**self.stages, "elsewhere": self.elsewhere},
            "call_seconds": self.call_seconds,
        }


def measure_ranks(
    ranks: Ranks, sizes: Sequence[int], effort: Effort, say: Say, *, sglang: Path | None
) -> tuple[list[CaseResult], list[StageResult]]:
    """All sizes for one number of ranks; the processes of all ways live side by side and work in turn."""
    names = [Grafter.name, AllGatherObject.name, RawGloo.name, Memcpy.name]
    if effort.gather_from_all:
        names.append(AllGatherObjectOfAll.name)
    if sglang is not None and ranks.one_to_one:
        names.append(Sglang.name)
    cases = []
    with ExitStack() as stack:
        groups = {name: stack.enter_context(WayGroup(name, ranks, sglang=sglang)) for name in names}
        for nbytes in sizes:
            say(f"{ranks}, {size_text(nbytes)}")
            chosen = {name: group for name, group in groups.items() if name not in _SLOW_WAYS or nbytes in _THEIR_SIZES}
            cases.append(_measure_case(chosen, ranks, nbytes, effort))
        # The size costs memory until another takes its place.
        for group in groups.values():
            group.prepare(4096)
        stages = _read_stages(groups[Grafter.name], cases)
    return cases, stages


def _measure_case(groups: dict[str, WayGroup], ranks: Ranks, nbytes: int, effort: Effort) -> CaseResult:
    needed = {name: WAYS[name].bytes_needed(ranks, nbytes) for name in groups}
    left_out = {name: reason for name in groups if (reason := why_left_out(name, needed[name]))}
    measured = {name: group for name, group in groups.items() if name not in left_out}
    first = {name: group.prepare(nbytes) for name, group in measured.items()}
    measures, calls, round_seconds = {}, {}, 0.0
    for name, group in measured.items():
        # A first call pays for what later ones reuse; where that hardly matters, it saves two slow calls.
        one = first[name] if first[name] > 10 * _SLOW_CALL else group.seconds_per_call(1, lead_in=1)
        calls[name] = max(1, min(_CALLS_PER_ROUND, int(effort.batch_seconds / one)))
        # The first calls of a batch wait for ranks that get the command later, and find cold caches.
        lead_in = 0 if one > _SLOW_CALL else 1 if calls[name] < 10 else 3
        round_seconds += one * (calls[name] + lead_in)
        measures[name] = partial(group.seconds_per_call, calls[name], lead_in)
    rounds = max(3, min(effort.rounds, int(effort.case_seconds / round_seconds)))
    return CaseResult(ranks, nbytes, interleaved(measures, rounds), calls, left_out)


def why_left_out(way: str, needed: int) -> str | None:
    """Why a way that needs so many bytes in all is not measured here; None if it is."""
    available = available_bytes()
    if needed <= _SHARE_OF_MEMORY * available:
        return None
    return f"{way} needs {needed / 2**30:.1f} GiB in all, and {available / 2**30:.1f} GiB are free"


def _read_stages(group: WayGroup, cases: Sequence[CaseResult]) -> list[StageResult]:
    from grafter.store.ledger import read_run

    results = []
    for role, role_rank, records in read_run(group.run_directory):
        for case in cases if role_rank == 0 else ():
            # The first two are those of the warm-up.
            own = [record for record in records if record.tags["nbytes"] == case.nbytes][2:]
            stages = sorted({stage for record in own for stage in record.seconds})
            medians = {stage: statistics.median(r.seconds.get(stage, 0.0) for r in own) for stage in stages}
            results.append(StageResult(case.ranks, case.nbytes, role, medians, case.spread(Grafter.name).median))
    return results
