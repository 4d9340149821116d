"""Spinning: a wait on this host first polls without sleeping, since a wake-up takes 40 us, most of a small point."""

from __future__ import annotations

import time

_SPIN_SECONDS = 0.0003
_LONGEST_PAUSE = 256


class Spinning:
    """Whether the next wait of one kind spins: only as long as that pays.

    If a spin ends without a message (another program uses this rank's cores, or the other job computes between two
    points), the next waits sleep at once: 1 of them, then 2, then 4, up to 256.
    """

    def __init__(self, worthwhile: bool) -> None:
        """worthwhile: whether every rank of this host can have a core of its own. Otherwise a spinning rank would keep
        its peer from running."""
        self.is_worthwhile = worthwhile
        self._pause = self._left = 0

    def until(self) -> float:
        """Until when to poll, on `time.monotonic`'s clock; 0.0: not this time."""
        if not self.is_worthwhile:
            return 0.0
        if self._left:
            self._left -= 1
            return 0.0
        return time.monotonic() + _SPIN_SECONDS

    def record(self, *, paid: bool) -> None:
        """Record how a spin ended. paid: whether the messages arrived during it."""
        self._pause = 0 if paid else min(2 * self._pause or 1, _LONGEST_PAUSE)
        self._left = self._pause
