"""The limits of a dump: which steps, how many bytes, how many points. Points that they leave out are counted."""

from __future__ import annotations

import logging
from collections import Counter
from typing import Literal

from grafter.core.sizes import read_size, read_steps

logger = logging.getLogger("grafter")

LimitName = Literal["steps", "points", "bytes"]


class Limits:
    """The limits of one rank's dumps, and what they left out.

    Once a limit of bytes or points is reached, it stays reached until it is changed, so the dumps are the beginning of
    the run without gaps. Used under the lock of the rank's points.
    """

    def __init__(self, steps: str | None, max_bytes: str | None, max_points: int | None, who: str) -> None:
        """steps, max_bytes: texts of the settings. who: this rank, for messages."""
        self._who = who
        self._bytes = self._points = 0
        self._is_full: LimitName | None = None
        self._given: tuple[str | None, str | None, int | None] = (None, None, None)
        self._reported: set[LimitName] = set()
        self.left_out: Counter[str] = Counter()
        self.change(steps, max_bytes, max_points)

    def change(self, steps: str | None, max_bytes: str | None, max_points: int | None) -> None:
        """Replace the limits. Points saved earlier still count; `also_allow` no longer applies."""
        self._steps = read_steps(steps) if steps is not None else None
        self._max_bytes = read_size(max_bytes) if max_bytes is not None else None
        self._max_points = max_points
        before, self._given = self._given, (steps, max_bytes, max_points)
        if before != self._given:
            self._reported.clear()
        if before[1:] != self._given[1:]:
            self._is_full = None

    def allows_step(self, step: int) -> bool:
        """Whether points of this step are saved. Counts a point that is not."""
        if self._steps is None or any(first <= step and (last is None or step <= last) for first, last in self._steps):
            return True
        self._leave_out("steps", f"step {step} is not among GRAFTER_DUMP_STEPS")
        return False

    def also_allow(self, first: int, end: int) -> None:
        """Allow the steps from `first` up to `end`, exclusive, whatever the limit of steps says."""
        if self._steps is not None:
            self._steps += ((first, end - 1),)

    def take(self, nbytes: int) -> bool:
        """Whether one more point, of `nbytes` in its file, is saved. Counts it in either case."""
        if self._is_full is None:
            if self._max_points is not None and self._points >= self._max_points:
                self._is_full = "points"
            elif self._max_bytes is not None and self._bytes + nbytes > self._max_bytes:
                self._is_full = "bytes"
        if self._is_full == "points":
            self._leave_out("points", f"GRAFTER_DUMP_MAX_POINTS={self._max_points} is reached")
        elif self._is_full == "bytes":
            self._leave_out("bytes", f"GRAFTER_DUMP_MAX_BYTES={self._max_bytes} would be exceeded")
        else:
            self._points += 1
            self._bytes += nbytes
            return True
        return False

    def _leave_out(self, limit: LimitName, why: str) -> None:
        if limit not in self._reported:
            self._reported.add(limit)
            logger.warning("grafter: %s: %s: such points are counted, not saved", self._who, why)
        self.left_out[limit] += 1
