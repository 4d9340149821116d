"""The verdict as data: one row per point, and the conclusion."""

from __future__ import annotations

import dataclasses
import json
import math
from dataclasses import dataclass
from typing import Any, Literal

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
        return tuple(point.point for point in self.points if point.guilty)

    @property
    def exit_code(self) -> int:
        """0: no point adds error. 1: one is named. 2: it could not be judged."""
        if self.named is not None:
            return 1
        return 0 if self.points and all(point.judged for point in self.points) else 2


# A verdict as JSON.


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
