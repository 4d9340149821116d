"""Points in compiled code: how each is taken was settled when its code was traced, and a change must fit that."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from grafter.config.direction_filters import DirectionFilters


@dataclass(frozen=True)
class Verdict:
    """How a point in compiled code is taken, and whether it is only compared (or saved) there."""

    kind: Literal["operator", "break", "nothing"]
    only_compares: bool

    def serves(self, wanted: Verdict) -> bool:
        """Whether code that was traced with this verdict does what another one wants. Each operator asks the filters
        again at each call, and a break is a call as in eager code."""
        if self.kind == "break" or wanted.kind == "nothing":
            return True
        if self.kind == "nothing" or wanted.kind == "break":
            return False
        return wanted.only_compares or not self.only_compares


Judge = Callable[[Sequence[DirectionFilters], str, dict[str, Any]], Verdict]


class TracedPoints:
    """Those of one rank. Used under the lock of its control: a trace and a change never pass each other unseen."""

    def __init__(self, judge: Judge) -> None:
        """judge: the verdict of a point with this name and these arguments, whichever of the filters matches."""
        self._judge = judge
        self._points: dict[tuple[str, str], tuple[dict[str, Any], Verdict]] = {}

    def trace(self, filters: Sequence[DirectionFilters], name: str, arguments: dict[str, Any]) -> Verdict:
        """filters: those in force, and all that may follow without the code being traced again."""
        verdict = self._judge(filters, name, dict(arguments))
        known = name, repr(sorted(arguments.items()))
        before = self._points.get(known)
        # Older code of the same point may still run: what the least able of them can do counts.
        if before is None or before[1].serves(verdict):
            self._points[known] = dict(arguments), verdict
        return verdict

    def why_not(self, filters: DirectionFilters) -> str | None:
        """Why these filters cannot come now; None where they can."""
        unfit = [
            name
            for (name, _), (arguments, traced) in self._points.items()
            if not traced.serves(self._judge([filters], name, dict(arguments)))
        ]
        if not unfit:
            return None
        shown = ", ".join(dict.fromkeys(unfit[:5])) + (", ..." if len(unfit) > 5 else "")
        return (
            f"the points {shown} are in compiled code that was traced for other filters: what no filter could match "
            "then was left out of it, and what could only be compared cannot be grafted. Start the run with filters "
            "that could match them (`... and step < 0` matches nothing, and keeps the points), or leave them out of "
            "this change"
        )
