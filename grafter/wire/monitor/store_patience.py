"""What the dump thread does while the store owes it an answer: that is a wait, too, and ends as any other."""

from __future__ import annotations

import time

from grafter.wire.monitor.housekeeping import Housekeeping
from grafter.wire.monitor.waits import Wait


class StorePatience:
    """Of the dump thread's client. See `grafter.wire.bounded_calls.Patience`."""

    def __init__(self, housekeeping: Housekeeping, timeout: float) -> None:
        """timeout: how long a point waits, in seconds."""
        self._housekeeping, self._timeout = housekeeping, timeout
        self._wait: Wait | None = None

    @property
    def is_hopeless(self) -> bool:
        """Whether the store is silent for the housekeeping as well."""
        return self._housekeeping.store_is_silent

    def look(self, seconds: float) -> None:
        """Raises what ended the run. An answer that is not there yet is a wait, unless the rank is in one already."""
        housekeeping = self._housekeeping
        housekeeping.check()
        if seconds and housekeeping.current_wait is None:
            underway = housekeeping.underway
            what = underway.point if underway is not None else "an answer of the rendezvous store"
            site = underway.call_site if underway is not None else ""
            wait = Wait("store", what, self._timeout, call_site=site, since=time.monotonic() - seconds)
            housekeeping.begin(wait)
            self._wait = wait

    def interrupted(self, error: BaseException) -> None:
        """Where the call waits for another rank's value, it would block on for ever, and keep all others from being
        made: the run ends, and that wakes it."""
        wait = self._housekeeping.current_wait
        if wait is not None and wait.awaits and not wait.is_polled:
            self._housekeeping.interrupted(wait, error)

    def over(self) -> None:
        """The answer has come, or is not waited for any more."""
        if self._wait is not None:
            self._housekeeping.end(self._wait)
            self._wait = None
