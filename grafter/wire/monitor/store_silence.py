"""A store that does not answer, because its process is stopped, say: what each thread of a rank does meanwhile."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Protocol

from grafter.core.processes import SILENT_AFTER_SECONDS
from grafter.errors import PeerLostError, PointTimeoutError, RunError
from grafter.wire.monitor.members import Members
from grafter.wire.monitor.status_board import Underway
from grafter.wire.monitor.waits import Wait, WaitKeeper
from grafter.wire.store_client import StoreClient

# How long the monitor thread waits for an answer. A store that is only slow answers sooner.
_SILENT_SECONDS = 5.0


class StoreLink:
    """The monitor thread's client of the store, which may not answer. One per rank; the `CallMonitor` of that client.

    A store that does not answer is not lost: the thread continues without it, and uses it again once it has answered.
    """

    def __init__(self, client: StoreClient, members: Members, who: str, warn: Callable[[], None]) -> None:
        """warn: called while an answer is awaited, to log which processes are stopped."""
        self.client = client
        self._members, self._who, self._warn = members, who, warn
        self.is_down = False
        client.call_monitor = self

    @property
    def is_hopeless(self) -> bool:
        """Always: the thread has other things to do than to wait for an answer."""
        return True

    def look(self, seconds: float) -> None:
        """Raises PeerLostError, which ends the wait, if the store's process is stopped or has not answered for 5 s."""
        self._warn()
        if self._members.host.is_stopped or seconds > _SILENT_SECONDS:
            raise PeerLostError(f"the rendezvous store, hosted by {self._members.host}, does not answer")

    def interrupted(self, error: BaseException) -> None:
        """Never called: signal handlers run on the main thread."""

    def over(self) -> None:
        """Nothing to do."""

    def lose(self, error: RunError) -> RunError | None:
        """A call of the store has failed with this error. Why the run is over; None if the store only does not
        answer."""
        self.is_down = True
        return None if self.client.silent_seconds else self._lost(str(error))

    def look_again(self, wait: Wait | None) -> RunError | None:
        """Why the run is over; None if it is not. Asked while the store does not answer.

        wait: what the dump thread waits for meanwhile.
        """
        silent, host = self.client.silent_seconds, self._members.host
        if not silent:
            self.is_down = False
            return None
        if host.is_gone:
            return self._lost(f"the rendezvous store is lost: {host}, which hosted it, has ended.")
        if wait is None:
            return None
        if wait.seconds > wait.timeout:
            return self._time_is_up(wait)
        if not host.is_here and silent > SILENT_AFTER_SECONDS:
            return self._lost(f"the rendezvous store, hosted by {host}, has not answered for {silent:.0f} s.")
        return None

    def _lost(self, text: str) -> PeerLostError:
        board = self._members.describe_last_board()
        return PeerLostError(f"{text}\nThe board as {self._who} read it last:\n{board}" if board else text)

    def _time_is_up(self, wait: Wait) -> RunError:
        host = self._members.host
        why = "is stopped (SIGSTOP, Ctrl-Z or a debugger)" if host.is_stopped else "does not answer"
        board = self._members.describe_last_board(self._members.stopped())
        return PointTimeoutError(
            f"{self._who} waited {wait.timeout:.0f} s for {wait.what} ({wait.stage}), and the rendezvous store does "
            f"not answer: {host}, which hosts it, {why}. The board as {self._who} read it last:\n{board}\n"
            "Continue that process (kill -CONT) before you start the run again, or raise GRAFTER_TIMEOUT if it is "
            "stopped for longer on purpose."
        )


class DumpThreadWaitKeeper(WaitKeeper, Protocol):
    """What `StoreWait` needs of the monitor thread."""

    @property
    def underway(self) -> Underway | None: ...

    @property
    def current_wait(self) -> Wait | None: ...

    @property
    def store_is_silent(self) -> bool: ...

    def interrupted(self, wait: Wait, error: BaseException) -> None: ...


class StoreWait:
    """The dump thread's wait for an answer of the store: it is shown and ends like any other wait. The `CallMonitor` of
    the dump thread's client."""

    def __init__(self, keeper: DumpThreadWaitKeeper, timeout: float) -> None:
        """timeout: how long a point waits, in seconds."""
        self._keeper, self._timeout = keeper, timeout
        self._wait: Wait | None = None

    @property
    def is_hopeless(self) -> bool:
        """Whether the store does not answer the monitor thread either."""
        return self._keeper.store_is_silent

    def look(self, seconds: float) -> None:
        """Begins a wait, unless this rank is in one already. Raises what ended the run."""
        keeper = self._keeper
        keeper.check()
        if seconds and keeper.current_wait is None:
            underway = keeper.underway
            what = underway.point if underway is not None else "an answer of the rendezvous store"
            site = underway.call_site if underway is not None else ""
            wait = Wait("store", what, self._timeout, call_site=site, since=time.monotonic() - seconds)
            keeper.begin(wait)
            self._wait = wait

    def interrupted(self, error: BaseException) -> None:
        """End the run if the call waits for another rank's value: it would block for ever, and no other call could be
        made. The end of the run wakes it."""
        wait = self._keeper.current_wait
        if wait is not None and wait.awaits and not wait.is_polled:
            self._keeper.interrupted(wait, error)

    def over(self) -> None:
        """The answer has arrived, or is not awaited any more."""
        if self._wait is not None:
            self._keeper.end(self._wait)
            self._wait = None
