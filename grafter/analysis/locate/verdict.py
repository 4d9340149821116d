"""The verdict of `grafter locate`: one row per point and the conclusion, as data, as JSON and in words."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from grafter.analysis.locate.measure import RunMeasurement

JudgedBy = Literal["floor", "others"]


@dataclass(frozen=True)
class PointVerdict:
    """One row. All differences are `rel`; None: not measured. `limit` is the largest `added` that is not an error."""

    point: str
    alone: float | None
    added: float | None
    floor: float | None = None
    floor_alone: float | None = None
    limit: float | None = None
    judged_by: JudgedBy | None = None
    guilty: bool = False
    # Why the point could not be judged, or what weakens its judgement.
    note: str | None = None
    # The earlier point that was not grafted, whose error this one inherits.
    inherits_from: str | None = None

    @property
    def judged(self) -> bool:
        """Whether the point was judged at all."""
        return self.judged_by is not None


@dataclass(frozen=True)
class Verdict:
    """All points in the baseline's order, and the conclusion.

    `named` is the point that adds most error. (A first point that differs only shows that the inputs differ, and is
    named if no other point adds error.) `inputs` says whether the first point differs.
    """

    points: tuple[PointVerdict, ...]
    named: str | None
    inputs: str
    sentence: str
    notes: tuple[str, ...] = ()

    @property
    def guilty(self) -> tuple[str, ...]:
        """The points that add error."""
        return tuple(point.point for point in self.points if point.guilty)

    @property
    def exit_code(self) -> int:
        """0: no point adds error. 1: one is named. 2: it could not be judged."""
        if self.named is not None:
            return 1
        return 0 if self.points and all(point.judged for point in self.points) else 2


def verdict_as_json(verdict: Verdict) -> str:
    """The verdict as one JSON object; an infinite difference (NaN or Inf that do not match) is the string "inf"."""
    content = dataclasses.asdict(verdict) | {"guilty": list(verdict.guilty), "exit_code": verdict.exit_code}
    return json.dumps(_without_infinities(content), indent=1, ensure_ascii=False, allow_nan=False)


def _without_infinities(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_infinities(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_without_infinities(item) for item in value]
    if isinstance(value, float) and math.isinf(value):
        return "inf"
    return value


def describe_number(value: float | None) -> str:
    """A difference in a table cell or sentence: two digits; `-` if it was not measured."""
    if value is None:
        return "-"
    if math.isinf(value):
        return "NaN/Inf"
    return "0" if value == 0 else f"{value:.1e}"


def describe_inputs(first: PointVerdict | None, bitwise_equal: bool) -> str:
    """Whether the two jobs already differ at the first point, in the run left alone."""
    if first is None:
        return "Inputs: the two jobs share no point."
    if first.alone is None:
        return f"Inputs: unknown; the first point, {first.point}, was not compared ({_clause(first.note)})."
    if bitwise_equal:
        return f"Inputs: equal; the first point, {first.point}, is the same in both jobs to the last bit."
    if first.alone == 0:
        return f"Inputs: the first point, {first.point}, differs by 0, but not all of its bits are equal."
    size = f"by {describe_number(first.alone)}" if math.isfinite(first.alone) else "in NaN or Inf"
    if first.guilty:
        return (
            f"Inputs: they already differ; the first point, {first.point}, differs {size}{_against(first)}. "
            "Check the inputs of both jobs, and what runs before that point."
        )
    if first.judged:
        return f"Inputs: equal except for rounding; the first point, {first.point}, differs {size}{_against(first)}."
    return f"Inputs: the first point, {first.point}, differs {size}; it could not be judged ({_clause(first.note)})."


def describe_inputs_alone(alone: RunMeasurement) -> str:
    """What the first run shows about the inputs, before anything can be judged."""
    if not alone.points:
        return "Inputs: the two jobs share no point."
    point, measured = next(iter(alone.points.items()))
    if measured.bitwise_equal:
        return f"Inputs: equal to the last bit at the first point, {point}."
    if measured.rel is None:
        return f"Inputs: unknown; the first point, {point}, was not compared."
    size = f"by {describe_number(measured.rel)}" if math.isfinite(measured.rel) else "in NaN or Inf"
    return f"Inputs: they differ {size} at the first point, {point}; whether that matters is judged at the end."


def describe_verdict(rows: Sequence[PointVerdict], named: str | None) -> str:
    """The sentence at the end."""
    if not rows:
        return "Nothing could be judged: no point was both compared and grafted."
    if named is not None:
        return _describe_guilty(rows, next(row for row in rows if row.point == named))
    unjudged = [row for row in rows if not row.judged]
    if len(unjudged) == len(rows) or (unjudged and all(row.added is not None for row in unjudged)):
        return (
            f"Could not judge {_listed([row.point for row in unjudged])}: {_clause(unjudged[0].note)}; "
            "give `--floor`, the command of a target that is known to be correct, to measure what rounding alone does."
        )
    if unjudged:
        return (
            f"No layer that could be judged stands out, but {_listed([row.point for row in unjudged])} could not be: "
            f"{_clause(unjudged[0].note)}."
        )
    how = "its measured floor explains" if all(row.judged_by == "floor" for row in rows) else "the other points do"
    return (
        f"No layer stands out: none adds more difference than {how}, so if the two jobs' results still differ, "
        f"the fault is after {rows[-1].point}, the last point."
    )


def _describe_guilty(rows: Sequence[PointVerdict], named: PointVerdict) -> str:
    if named is rows[0]:
        start = f"The two jobs already differ at {named.point}, the first point, "
    else:
        start = f"The target goes wrong in {named.point}: given the baseline's values it still differs "
    size = "in NaN or Inf" if named.added is None or math.isinf(named.added) else f"by {describe_number(named.added)}"
    sentence = start + size + _against(named)
    if named.inherits_from is not None:
        sentence += f", or before it, since {named.inherits_from} could not be grafted"
    others = [row.point for row in rows if row.guilty and row is not named]
    if others:
        sentence += f"; {_listed(others)} {'adds' if len(others) == 1 else 'add'} error too"
    return sentence + "."


def _against(row: PointVerdict) -> str:
    """`, 4e+07 times its floor of 1.2e-14`: the measure by which this row was judged."""
    if row.added is None or math.isinf(row.added):
        return ""
    if row.judged_by == "floor" and row.floor is not None:
        if row.floor == 0:
            return ", where its floor is 0" if row.added else ""
        return f", {_times(row.added / row.floor)} its floor of {describe_number(row.floor)}"
    if row.judged_by == "others" and row.limit is not None:
        if row.limit == 0:
            return ", where all other points are equal" if row.added else ""
        relation = "above" if row.guilty else "within"
        return f", {relation} the limit of {describe_number(row.limit)} set by the other points"
    return ""


def _clause(note: str | None) -> str:
    """A note as a part of a sentence: its first line without the full stop."""
    return (note or "no reason is known").splitlines()[0].rstrip(".")


def _times(ratio: float) -> str:
    return f"{ratio:.2g} times" if ratio < 1000 else f"{ratio:.0e} times"


def _listed(names: Sequence[str], limit: int = 4) -> str:
    shown = list(names[:limit])
    if len(names) > limit:
        return f"{', '.join(shown)} and {len(names) - limit} more"
    return " and ".join([", ".join(shown[:-1]), shown[-1]] if len(shown) > 1 else shown)
