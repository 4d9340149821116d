"""What must be reached, as ratios of one run, and whether it was."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from benchmarks.calls import CallResult
from benchmarks.capture import ALONE, CaptureResult
from benchmarks.conversation import GATHERED, NEW_ROWS, TOKENS, ConversationResult
from benchmarks.footprint import ImportResult
from benchmarks.planning import PlanningResult
from benchmarks.resharding import ReshardingResult
from benchmarks.rounds import Spread
from benchmarks.summaries import SummaryResult
from benchmarks.transfers import CaseResult
from benchmarks.units import KIB, MIB, size_text
from benchmarks.ways import AllGatherObject, Grafter, Memcpy, Ranks

# (ranks, bytes) -> how many times faster than `all_gather_object`.
FASTER_THAN_GATHERING = {
    (Ranks(1, 1), 4 * KIB): 6.0,
    (Ranks(2, 2), 4 * KIB): 15.0,
    (Ranks(1, 1), 64 * MIB): 50.0,
    (Ranks(2, 2), 64 * MIB): 60.0,
}
# (ranks, bytes) -> how many copies it may take.
WITHIN_MEMCPYS = {(Ranks(1, 1), 64 * MIB): 3.0}
DISABLED_OVER_EMPTY = 1.5
UNMATCHED_OVER_EMPTY = 10.0
IMPORT_SECONDS = 0.020
FULL_SUMMARY_MEMCPYS = 15.0
SUMMARY_BYTES = 64 * MIB
HOOKED_OVER_PLAIN = 1.05
# Of 256 MiB; the faster of 2->2 and 4->4 is what it is compared with.
RESHARDED_OVER_PLAIN = 1.5
RESHARDED_BYTES = 256 * MIB
# One rank's, among 1024 + 1024.
PLANNING_SECONDS = 0.020
# The field's figure for the same change, at as many tokens: 121 ms to 1.9 ms.
NEW_ROWS_FASTER = 64.0
# One of the last turns, in first ones.
NEW_ROWS_GROWTH = 1.25


@dataclass(frozen=True)
class Target:
    """One number to reach. `noise` is half the middle half of the rounds, as a fraction."""

    what: str
    measured: float
    limit: float
    at_least: bool
    unit: str
    noise: float

    @property
    def met(self) -> bool:
        return self.measured >= self.limit if self.at_least else self.measured <= self.limit

    @property
    def text(self) -> str:
        return f"{'at least' if self.at_least else 'at most'} {self.limit:g} {self.unit}"

    def as_json(self) -> dict[str, Any]:
        return {
            "what": self.what,
            "measured": self.measured,
            "target": self.limit,
            "at_least": self.at_least,
            "unit": self.unit,
            "noise": self.noise,
            "met": self.met,
        }


def transfer_targets(cases: Sequence[CaseResult]) -> list[Target]:
    targets = []
    for case in cases:
        place, what = (case.ranks, case.nbytes), f"{case.ranks}, {size_text(case.nbytes)}"
        faster = case.ratio(AllGatherObject.name, Grafter.name)
        if place in FASTER_THAN_GATHERING and faster is not None:
            limit = FASTER_THAN_GATHERING[place]
            targets.append(_target(f"{what}: faster than all_gather_object", faster, limit, "times", at_least=True))
        copies = case.ratio(Grafter.name, Memcpy.name)
        if place in WITHIN_MEMCPYS and copies is not None:
            targets.append(_target(f"{what}: as long as", copies, WITHIN_MEMCPYS[place], "memcpys"))
    return targets


def call_targets(calls: Sequence[CallResult]) -> list[Target]:
    limits = {"disabled": DISABLED_OVER_EMPTY, "unmatched": UNMATCHED_OVER_EMPTY}
    return [
        _target(f"{call.call} call: as long as", call.over_empty, limits[call.call], "empty functions")
        for call in calls
        if call.call in limits
    ]


def import_targets(result: ImportResult) -> list[Target]:
    return [_target("import grafter, after torch", _milliseconds(result.seconds), IMPORT_SECONDS * 1e3, "ms")]


def summary_targets(summaries: Sequence[SummaryResult]) -> list[Target]:
    return [
        _target(f"full statistics of {size_text(s.nbytes)}: as long as", s.memcpys, FULL_SUMMARY_MEMCPYS, "memcpys")
        for s in summaries
        if s.case == "full" and s.nbytes == SUMMARY_BYTES
    ]


def capture_targets(results: Sequence[CaptureResult]) -> list[Target]:
    return [
        _target("a forward pass with hooks and no match: as long as", r.over_plain, HOOKED_OVER_PLAIN, "plain passes")
        for r in results
        if r.case == ALONE
    ]


def resharding_targets(results: Sequence[ReshardingResult]) -> list[Target]:
    return [
        _target(f"resharding {r}: as long as", r.over_plain, RESHARDED_OVER_PLAIN, "plain grafts")
        for r in results
        if r.nbytes == RESHARDED_BYTES
    ]


def planning_targets(results: Sequence[PlanningResult]) -> list[Target]:
    return [
        _target(f"planning {r.name}", _milliseconds(r.slower_seconds), PLANNING_SECONDS * 1e3, "ms")
        for r in results
        if r.table == "layouts"
    ]


def conversation_targets(results: Sequence[ConversationResult]) -> list[Target]:
    targets = []
    for result in results:
        if result.lengths[-1] != TOKENS:
            continue
        what = f"new rows only, statistics {result.stats}"
        for named, faster in (
            ("all rows", result.faster(NEW_ROWS)),
            ("gathering them", result.faster(NEW_ROWS, GATHERED)),
        ):
            targets.append(_target(f"{what}: faster than {named}", faster, NEW_ROWS_FASTER, "times", at_least=True))
        targets.append(
            _target(f"{what}: a last turn, as long as", result.growth(NEW_ROWS), NEW_ROWS_GROWTH, "first ones")
        )
    return targets


def _milliseconds(seconds: Spread) -> Spread:
    return Spread(seconds.median * 1e3, seconds.low * 1e3, seconds.high * 1e3)


def _target(what: str, measured: Spread, limit: float, unit: str, *, at_least: bool = False) -> Target:
    return Target(what, measured.median, limit, at_least, unit, measured.noise)
