"""A wait that the housekeeping thread looks after only once it lasts: most small ones never do."""

from __future__ import annotations

from collections.abc import Callable

from grafter.core.processes import Abandoned, Watch
from grafter.wire.monitor.housekeeping import Housekeeping
from grafter.wire.monitor.waits import Wait


class LastingWait:
    """Around what may have to wait for another rank. The wait that `make_wait` makes begins with the first `check`."""

    __slots__ = ("_housekeeping", "_make_wait", "_wait")

    def __init__(self, housekeeping: Housekeeping, make_wait: Callable[[], Wait]) -> None:
        self._housekeeping, self._make_wait = housekeeping, make_wait
        self._wait: Wait | None = None

    def check(self) -> None:
        """Raises what ended the run, or Abandoned if the other side has given the point up."""
        self._housekeeping.check()
        if self._wait is None:
            wait = self._make_wait()
            self._housekeeping.begin(wait)
            self._wait = wait
        elif self._wait.abandoned is not None:
            raise Abandoned(self._wait.abandoned)

    def __enter__(self) -> Watch:
        self._housekeeping.check()
        return self

    def __exit__(self, *_: object) -> None:
        if self._wait is not None:
            self._housekeeping.end(self._wait)
