"""Judges which points add error, from measurements alone.

`added` is a point's difference when everything before it was grafted. The ledger computes it before the write, so it is
the error of what the target computed from the baseline's values. A point adds error when `added` exceeds its limit:

* With a floor (the same pair without the fault): FLOOR_FACTOR times what that same point adds in the floor's run.
  `rel` is a square, so the factor of 16 is an error whose amplitude is 4 times that of the floor. A floor of exactly
  zero gives a limit of zero.
* Without one, or for a point that the floor lacks: against the other points that differ at all. In logarithms, their
  median plus the larger of log10(PEER_FACTOR) and PEER_DEVIATIONS robust standard deviations (1.4826 times the median
  absolute deviation). If only one point differs, and two or more are equal, this point adds error.

NaN or Inf that do not match are an infinite difference. Both rules use the worst over steps, ranks and leaves, on both
sides of the comparison. There is no constant threshold: what is an error in float32 is rounding in bf16.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import replace

from grafter.analysis.locate.measure import PointId, PointMeasurement, RunMeasurement
from grafter.analysis.locate.verdict import PointVerdict, Verdict, describe_inputs, describe_verdict

FLOOR_FACTOR = 16.0
PEER_FACTOR = 100.0
PEER_DEVIATIONS = 3.0


def judge(
    alone: RunMeasurement,
    grafted: RunMeasurement,
    floor_alone: RunMeasurement | None = None,
    floor_grafted: RunMeasurement | None = None,
    notes: Sequence[str] = (),
) -> Verdict:
    """The verdict on a pair left alone and grafted, and on its floor if that was run."""
    order = list(dict.fromkeys([*alone.points, *grafted.points]))
    rows = _rows(order, alone, grafted, floor_alone, floor_grafted)
    judged = tuple(_judge_row(i, rows, with_floor=floor_grafted is not None) for i in range(len(rows)))
    judged = _withdraw_if_undecidable(judged)
    first = judged[0] if judged else None
    bitwise = bool(order) and alone[order[0]].bitwise_equal
    return Verdict(
        points=judged,
        named=_name(judged),
        inputs=describe_inputs(first, bitwise),
        sentence=describe_verdict(judged, _name(judged)),
        notes=tuple(notes),
    )


def _rows(
    order: list[PointId],
    alone: RunMeasurement,
    grafted: RunMeasurement,
    floor_alone: RunMeasurement | None,
    floor_grafted: RunMeasurement | None,
) -> list[PointVerdict]:
    rows: list[PointVerdict] = []
    ungrafted: str | None = None
    for point in order:
        measured = grafted[point]
        rows.append(
            PointVerdict(
                point=str(point),
                alone=alone[point].rel,
                added=measured.rel,
                floor=floor_grafted[point].rel if floor_grafted else None,
                floor_alone=floor_alone[point].rel if floor_alone else None,
                note=_why_unmeasured(measured, alone[point]),
                inherits_from=ungrafted,
            )
        )
        # A point that was not written leaves the target's own error in place for the following points, until the next
        # write.
        if measured.problems or measured.rel is None:
            ungrafted = ungrafted or str(point)
        else:
            ungrafted = None
    return rows


def _why_unmeasured(grafted: PointMeasurement, alone: PointMeasurement) -> str | None:
    if grafted.problems:
        return grafted.problems[0]
    if grafted.rel is not None:
        return None
    if alone.problems:
        return f"in the run left alone: {alone.problems[0]}"
    if alone.rel is None:
        return "no difference was recorded (statistics are off, or no receiver wrote a ledger)"
    return "it was compared, but never grafted"


def _judge_row(index: int, rows: Sequence[PointVerdict], *, with_floor: bool) -> PointVerdict:
    row = rows[index]
    if row.added is None:
        return row
    judged = _judge_by_floor(row, row.floor) if row.floor is not None else _judge_by_others(index, rows, with_floor)
    if row.note is not None and not judged.guilty:
        # The point failed in some steps: the measured steps can show that it adds error, but not that it does not.
        return replace(judged, judged_by=None)
    return judged


def _judge_by_others(index: int, rows: Sequence[PointVerdict], with_floor: bool) -> PointVerdict:
    row = rows[index]
    others = [
        other.added
        for i, other in enumerate(rows)
        if i != index and other.added is not None and math.isfinite(other.added) and other.inherits_from is None
    ]
    limit = peer_limit(others)
    if row.added is not None and math.isinf(row.added):
        # NaN on one side only fails any rule, however few the other points are.
        return replace(row, limit=limit, judged_by="others", guilty=True)
    if limit is None:
        return replace(row, note=row.note or f"{len(others)} other points are too few for a judgement")
    if with_floor:
        row = replace(row, note=row.note or "the floor lacks this point; judged against the others")
    return replace(row, limit=limit, judged_by="others", guilty=_exceeds(row, limit))


def _judge_by_floor(row: PointVerdict, floor: float) -> PointVerdict:
    if math.isinf(floor):
        return replace(row, note=row.note or "the floor itself has NaN or Inf that do not match here")
    limit = FLOOR_FACTOR * floor
    return replace(row, limit=limit, judged_by="floor", guilty=_exceeds(row, limit))


def _exceeds(row: PointVerdict, limit: float) -> bool:
    return row.added is not None and row.added > limit


def peer_limit(others: Sequence[float]) -> float | None:
    """The limit that the other points' added differences set (finite, 0 or more); None if there are too few points.

    >>> peer_limit([0.0, 0.0, 0.0]) 0.0
    """
    if len(others) < 2:
        return None
    # A point that is equal to the last bit has no rounding error with which others could be compared.
    logarithms = [math.log10(value) for value in others if value > 0]
    if not logarithms:
        return 0.0
    median = statistics.median(logarithms)
    deviation = 1.4826 * statistics.median(abs(value - median) for value in logarithms)
    return math.pow(10.0, median + max(math.log10(PEER_FACTOR), PEER_DEVIATIONS * deviation))


def _withdraw_if_undecidable(rows: tuple[PointVerdict, ...]) -> tuple[PointVerdict, ...]:
    """Withdraw the judgement on two points that differ alike while all others are equal: both may be faults or
    rounding.
    """
    differing = [row for row in rows if row.added is not None and row.added > 0]
    if len(differing) != 2 or any(row.guilty or row.judged_by != "others" for row in differing):
        return rows
    note = (
        "only two points differ, by about as much, and all others are equal: "
        "only a floor can distinguish rounding from a fault"
    )
    return tuple(
        replace(row, judged_by=None, limit=None, note=row.note or note) if row in differing else row for row in rows
    )


def _name(rows: Sequence[PointVerdict]) -> str | None:
    guilty = [row for row in rows if row.guilty]
    # Different inputs are not the fault of a layer: they are reported first, and named only if no other point adds
    # error.
    candidates = [row for row in guilty if row is not rows[0]] or guilty
    worst = max(candidates, key=lambda row: row.added or 0.0, default=None)
    return None if worst is None else worst.point
