"""Points that fail, in the job's log as it happens: one line for each name and reason, and the rest is counted."""

from __future__ import annotations

import logging
import threading
from collections import Counter

logger = logging.getLogger("grafter")

_MOST_LINES = 100
_LONGEST_REASON = 600


class FailureLog:
    """Of one rank. Called on its dump thread, and on its monitor thread where a sender hears of a failure."""

    def __init__(self, who: str) -> None:
        self._who = who
        self._lock = threading.Lock()
        # By name and reason: how often.
        self._counts: Counter[tuple[str, str]] = Counter()
        self._left_out = 0

    def add(self, name: str, point: object, reason: str) -> None:
        """point: as messages name it."""
        reason = " ".join(reason.split())
        if len(reason) > _LONGEST_REASON:
            reason = f"{reason[:_LONGEST_REASON]}... (the ledger has all of it)"
        with self._lock:
            known = (name, reason)
            is_new = known not in self._counts
            if is_new and len(self._counts) >= _MOST_LINES:
                self._left_out += 1
                return
            self._counts[known] += 1
        if is_new:
            logger.warning("grafter: %s: the point %s failed, and nothing was written: %s", self._who, point, reason)

    def close(self) -> None:
        """Say how many more there were."""
        with self._lock:
            again = {name: 0 for name, _ in self._counts}
            for (name, _), count in self._counts.items():
                again[name] += count - 1
            left_out = self._left_out
        repeated = [f"{name!r} {count} more time{'s' * (count != 1)}" for name, count in again.items() if count]
        if repeated:
            more = f", and {len(repeated) - 8} other points" if len(repeated) > 8 else ""
            logger.warning(
                "grafter: %s: failed again for a reason given above: %s%s", self._who, ", ".join(repeated[:8]), more
            )
        if left_out:
            logger.warning("grafter: %s: %d more failures, whose reasons are in the ledger alone", self._who, left_out)
