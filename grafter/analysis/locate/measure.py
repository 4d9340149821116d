"""What a run's ledgers say about each point: the largest difference between the two jobs, and what went wrong."""

from __future__ import annotations

import heapq
import json
import math
from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from grafter.core.points import OWN_TAGS, PHASE, is_rank_tag
from grafter.core.records import Difference, LedgerRecord, Role

RankLedger = tuple[Role, int, list[LedgerRecord]]


@dataclass(frozen=True)
class PointId:
    """One row of the verdict: a point over all steps. `tags` holds (name, JSON value) of the identifying tags."""

    name: str
    tags: tuple[tuple[str, str], ...]
    phase: str = PHASE
    occurrence: int = 0

    def __str__(self) -> str:
        parts = [self.name, *(f"{tag}={value}" for tag, value in self.tags)]
        if self.phase != PHASE:
            parts.append(f"phase={self.phase}")
        if self.occurrence:
            parts.append(f"occurrence={self.occurrence}")
        return " ".join(parts)


@dataclass(frozen=True)
class Measurement:
    """One point in one run, at its worst over steps, ranks and leaves.

    `rel` is the ledger's `rel` (0: equal; 2: opposite). It is infinite if one side is not finite and the other is not
    the same, and None if no difference was recorded. `problems` says why a record lacks its difference.
    """

    rel: float | None = None
    bitwise_equal: bool = False
    problems: tuple[str, ...] = ()


@dataclass(frozen=True)
class RunMeasurement:
    """Every point of one run, in the order in which the baseline executed them."""

    points: dict[PointId, Measurement]

    def __getitem__(self, point: PointId) -> Measurement:
        return self.points.get(point, Measurement())


def measure_run(ledgers: Iterable[RankLedger], key_tags: Collection[str] | None = None) -> RunMeasurement:
    """Condense the ledgers of one run. `key_tags`: the run's `key` setting, if it has one."""
    ledgers = list(ledgers)
    order: dict[PointId, list[LedgerRecord]] = {}
    # The target's own order is used only for points of which the baseline has no record.
    for role in ("baseline", "target"):
        for record in _in_order([records for r, _, records in ledgers if r == role]):
            order.setdefault(point_id(record, key_tags), []).append(record)
    return RunMeasurement({point: _worst(records) for point, records in order.items()})


def point_id(record: LedgerRecord, key_tags: Collection[str] | None = None) -> PointId:
    """The record's point without its step."""
    tags = {
        tag: value
        for tag, value in sorted(record.tags.items())
        if tag not in OWN_TAGS and (not is_rank_tag(tag) if key_tags is None else tag in key_tags)
    }
    return PointId(record.name, tuple((t, _as_text(v)) for t, v in tags.items()), record.phase, record.occurrence)


def _as_text(value: Any) -> str:
    return json.dumps(value, sort_keys=True, ensure_ascii=False)


def _in_order(rank_records: list[list[LedgerRecord]]) -> Iterator[LedgerRecord]:
    # Within a rank, `sequence` is exact. Ranks are merged by clock, which is needed for pipeline stages (none of their
    # ranks sees all points), and which cannot reorder the points of one rank.
    runs = [sorted(records, key=lambda record: record.sequence) for records in rank_records]
    return heapq.merge(*runs, key=lambda record: record.time)


def _worst(records: list[LedgerRecord]) -> Measurement:
    differences = [d for record in records for d in _differences(record)]
    values = [value for value in map(difference_value, differences) if value is not None]
    problems = dict.fromkeys(problem for record in records if (problem := _problem(record)) is not None)
    return Measurement(
        rel=max(values, default=None),
        bitwise_equal=bool(differences) and all(d.mismatched_fraction == 0 for d in differences),
        problems=tuple(problems),
    )


def _differences(record: LedgerRecord) -> list[Difference]:
    # If there are several leaves, the record's own difference is that of the largest `rel`; a leaf that is not finite
    # may be another one.
    found = [record.difference, *(leaf.difference for leaf in record.leaves)]
    return [difference for difference in found if difference is not None]


def difference_value(difference: Difference) -> float | None:
    """`rel`; infinite if non-finite values do not match; None if the run's statistics did not include it."""
    if difference.nan or difference.inf:
        return math.inf
    if difference.rel is None:
        # Values that are not numbers: they differ, and nothing says by how much.
        return math.inf if difference.mismatched_fraction else None
    return difference.rel if math.isfinite(difference.rel) else math.inf


def _problem(record: LedgerRecord) -> str | None:
    if record.outcome == "compared" and record.reason is not None and record.difference is None:
        return f"was compared without figures at step {record.step}: {record.reason}"
    if record.outcome not in ("failed", "skipped", "missed", "expired", "displaced"):
        return None
    return f"{record.outcome} at step {record.step}: {record.reason or 'no reason was recorded'}"
