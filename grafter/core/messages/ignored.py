"""Values in the store that this run did not write. With a secret they are ignored, counted, and reported once."""

from __future__ import annotations

import logging
import threading

logger = logging.getLogger("grafter")

_MOST_KEYS = 1024
_KEYS_SHOWN = 4


class IgnoredValues:
    """Of one process. Used by every thread that reads the store."""

    def __init__(self, who: str) -> None:
        self._who = who.replace("/", " rank ")
        self._lock = threading.Lock()
        # Of each key the value that was ignored last: it is read again and again.
        self._last: dict[str, int] = {}
        self.count = 0
        self._first_reason = ""

    def add(self, key: str, value: bytes, reason: str) -> None:
        """Count a value, unless it is the one that was ignored under this key before. The first one is logged."""
        with self._lock:
            seen = hash(value)
            if self._last.get(key) == seen:
                return
            if key in self._last or len(self._last) < _MOST_KEYS:
                self._last[key] = seen
            self.count += 1
            if self.count > 1:
                return
            self._first_reason = reason
        logger.warning(
            "grafter: %s ignores a value under %r in the rendezvous store, since this run did not write it: %s If "
            "there are more, they are ignored, too, and counted.",
            self._who, key, reason,
        )  # fmt: skip

    @property
    def keys(self) -> list[str]:
        """Under which they lay, oldest first."""
        with self._lock:
            return list(self._last)

    @property
    def note(self) -> str:
        """What a message says of them; empty where there are none."""
        with self._lock:
            if not self.count:
                return ""
            keys = ", ".join(repr(key) for key in list(self._last)[:_KEYS_SHOWN])
            more = ", ..." if len(self._last) > _KEYS_SHOWN else ""
            values = "1 value" if self.count == 1 else f"{self.count} values"
            return (
                f"{self._who} has ignored {values} in the rendezvous store that this run did not write, under "
                f"{keys}{more}. Of the first: {self._first_reason}"
            )
