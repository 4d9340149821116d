"""A tensor [b, s, h] from one number of shards to another, beside grafts that reshard nothing, and beside gathering.

    2->4 of h      rank 0 |      h/2      |      h/2      | rank 1        resharded: four pieces
                   rank 0 |  h/4  |  h/4  |  h/4  |  h/4  | rank 3

Beside it, the same global tensor 2->2 and 4->4: as many bytes cross in all, and each rank of the side that has as many
sends or receives just what it does when resharding. With h split the pieces are strided, with s split they are not.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks.rounds import Spread, interleaved, ratio, spread
from benchmarks.sharding import GATHERED, MOST_RANKS, RESHARDED, Crossing, ShardGroup
from benchmarks.transfers import why_left_out
from benchmarks.units import size_text
from benchmarks.ways import AllGatherObject, Ranks

Shape = tuple[int, int, int]
PLAIN = ("2->2", "4->4")
_WIDEST = 4096


@dataclass(frozen=True)
class ReshardingEffort:
    """Rounds of one batch per way. Gathering takes seconds a call: one call in each of the first rounds."""

    rounds: int
    gathering_rounds: int
    batch_seconds: float


@dataclass(frozen=True)
class ReshardingStages:
    """Where a call spends its time, by the ledger: median seconds by stage, of one role's rank 0."""

    case: str
    role: str
    stages: dict[str, float]
    call_seconds: float

    def as_json(self) -> dict[str, Any]:
        return {"case": self.case, "role": self.role, "seconds": self.stages, "call_seconds": self.call_seconds}


@dataclass
class ReshardingResult:
    """One change of shards. Seconds per call, one value per round, by way; gathering only in the first rounds.

    bytes_received: what all receivers of one call took in together, by the ledger.
    """

    ranks: Ranks
    dim: str
    shape: Shape
    nbytes: int
    seconds: dict[str, list[float]]
    calls_per_round: dict[str, int]
    bytes_received: int
    stages: list[ReshardingStages] = field(default_factory=list)
    left_out: dict[str, str] = field(default_factory=dict)

    def __str__(self) -> str:
        return f"{self.ranks} of {self.dim}, {size_text(self.nbytes)}"

    def spread(self, way: str) -> Spread:
        return spread(self.seconds[way])

    def ratio(self, way: str, over: str) -> Spread | None:
        """Of the seconds of two ways, within the rounds that both have; None where one was left out."""
        if way not in self.seconds or over not in self.seconds:
            return None
        return ratio(*_same_rounds(self.seconds[way], self.seconds[over]))

    @property
    def over_plain(self) -> Spread:
        """Resharded, as a multiple of the faster of the grafts that reshard nothing, round by round."""
        faster = [min(pair) for pair in zip(*(self.seconds[way] for way in PLAIN), strict=True)]
        return ratio(self.seconds[RESHARDED], faster)

    def as_json(self) -> dict[str, Any]:
        return {
            "ranks": str(self.ranks),
            "dim": self.dim,
            "shape": list(self.shape),
            "bytes": self.nbytes,
            "bytes_received": self.bytes_received,
            "seconds": self.seconds,
            "median_seconds": {way: self.spread(way).median for way in self.seconds},
            "calls_per_round": self.calls_per_round,
            "over_plain": self.over_plain.median,
            "stages": [stage.as_json() for stage in self.stages],
            "left_out": self.left_out,
        }


def _same_rounds(one: Sequence[float], other: Sequence[float]) -> tuple[Sequence[float], Sequence[float]]:
    rounds = min(len(one), len(other))
    return one[:rounds], other[:rounds]


def shape_of(nbytes: int) -> Shape:
    """[2, s, h] of float32 in so many bytes, h at most 4096. Raises ValueError where four ranks cannot share s or h."""
    count = nbytes // 4
    h = 4
    while h < _WIDEST and (2 * h) ** 2 <= count:
        h *= 2
    if count % (2 * h * MOST_RANKS):
        raise ValueError(f"{nbytes} bytes are no [2, s, {h}] of float32 with s a multiple of {MOST_RANKS}")
    return 2, count // (2 * h), h


def measure_resharding(nbytes: int, effort: ReshardingEffort, say: Callable[[str], None]) -> list[ReshardingResult]:
    """2->4 and 4->2, of h and of s. All processes live side by side, and those of one way work at a time."""
    shape = shape_of(nbytes)
    results = []
    with ShardGroup("grafter") as grafts, ShardGroup("gather") as gathers:
        for ranks in (Ranks(2, 4), Ranks(4, 2)):
            for dim in ("h", "s"):
                say(f"resharding {ranks} of {dim}, {size_text(nbytes)}")
                results.append(_measure(grafts, gathers, ranks, dim, shape, effort))
    return results


def _measure(
    grafts: ShardGroup, gathers: ShardGroup, ranks: Ranks, dim: str, shape: Shape, effort: ReshardingEffort
) -> ReshardingResult:
    ways = {RESHARDED: ranks, **{way: Ranks.parse(way) for way in PLAIN}}
    crossings = {way: Crossing(way, own, dim, shape) for way, own in ways.items()}
    measures, calls = {}, {}
    for way, crossing in crossings.items():
        grafts.prepare_crossing(crossing)
        calls[way] = max(2, int(effort.batch_seconds / grafts.seconds_of(crossing, 1, lead_in=1)))
        measures[way] = partial(grafts.seconds_of, crossing, calls[way], 1)
    gathering, left_out = Crossing(GATHERED, ranks, dim, shape), {}
    reason = _why_left_out(gathering)
    if reason is None:
        gathers.prepare_crossing(gathering)
        calls[GATHERED] = 1
        both = {**measures, GATHERED: partial(gathers.seconds_of, gathering, 1, 0)}
        seconds = interleaved(both, min(effort.rounds, effort.gathering_rounds))
        gathers.forget_tensors()
    else:
        left_out[GATHERED] = reason
        seconds = {way: [] for way in measures}
    more = interleaved(measures, effort.rounds - len(seconds[RESHARDED]))
    seconds = {way: own + more.get(way, []) for way, own in seconds.items()}
    grafts.forget_tensors()
    stages, received = _read_ledger(grafts.run_directory, crossings, seconds)
    nbytes = 4 * math.prod(shape)
    return ReshardingResult(ranks, dim, shape, nbytes, seconds, calls, received, stages, left_out)


def _why_left_out(crossing: Crossing) -> str | None:
    nbytes = 4 * math.prod(crossing.shape)
    # Beside what gathering itself takes, each receiver puts the global tensor together.
    needed = AllGatherObject.bytes_needed(crossing.ranks, nbytes // crossing.ranks.baseline)
    return why_left_out(crossing.way, needed + crossing.ranks.target * nbytes)


def _read_ledger(
    directory: Path, crossings: dict[str, Crossing], seconds: dict[str, list[float]]
) -> tuple[list[ReshardingStages], int]:
    from grafter.store.ledger import read_run

    stages, received = [], 0
    for role, role_rank, records in read_run(directory):
        for way, crossing in crossings.items():
            own = [record for record in records if record.tags["case"] == crossing.case]
            if way == RESHARDED and own:
                received += own[-1].bytes_received
            if role_rank == 0:
                # Not the first two, which also make room and map it.
                later = [record.seconds for record in own[2:]]
                names = sorted({stage for record in later for stage in record})
                medians = {name: statistics.median(record.get(name, 0.0) for record in later) for name in names}
                stages.append(ReshardingStages(f"{way} of {crossing.dim}", role, medians, spread(seconds[way]).median))
    return stages, received
