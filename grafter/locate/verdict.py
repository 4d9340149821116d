"""The verdict: one row per point, and what follows from them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

JudgedBy = Literal["floor", "others"]


@dataclass(frozen=True)
class PointVerdict:
    """One row. All differences are `rel`; None: not measured. `limit` is the largest `added` that is no error."""

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
    # The point before it that was not grafted, whose error this one inherits.
    inherits_from: str | None = None

    @property
    def judged(self) -> bool:
        return self.judged_by is not None


@dataclass(frozen=True)
class Verdict:
    """All points in the baseline's order, and what follows from them.

    `named` is the guilty point that adds most (a guilty first point, which only shows that the inputs differ, is named
    when no other is guilty). `inputs` says whether the first point differs.
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
