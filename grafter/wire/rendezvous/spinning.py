"""Spinning: a wait on this host first looks again and again, since being woken costs 40 us: most of a small point."""

from __future__ import annotations

import time

_SPIN_SECONDS = 0.0003
_LONGEST_PAUSE = 256


class Spinning:
    """One per kind of wait. It spins only while that pays.

    Where what is waited for has not come by the end of a spin (another program has this rank's cores, or the other job
    computes between two points), the next waits sleep at once: 1 of them, then 2, then 4, up to 256.
    """

    def __init__(self, worthwhile: bool) -> None:
        """worthwhile: every rank of this host can have a core of its own. A spinning rank would else keep its peer from
        running."""
        self.is_worthwhile = worthwhile
        self._pause = self._left = 0

    def until(self) -> float:
        """Until when to look without sleeping, on `time.monotonic`'s clock; 0.0: not this time."""
        if not self.is_worthwhile:
            return 0.0
        if self._left:
            self._left -= 1
            return 0.0
        return time.monotonic() + _SPIN_SECONDS

    def tell(self, *, paid: bool) -> None:
        """How a spin ended."""
        self._pause = 0 if paid else min(2 * self._pause or 1, _LONGEST_PAUSE)
        self._left = self._pause
