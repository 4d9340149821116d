"""The monitor thread's way to the store, which can be lost, or fall silent: where its process is stopped, say."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Protocol

from grafter.core.processes.liveness import SILENT_AFTER_SECONDS
from grafter.errors import PeerLostError, PointTimeoutError, RunError
from grafter.wire.monitor.members import Members
from grafter.wire.monitor.status_board import Underway
from grafter.wire.monitor.waits import Wait, WaitKeeper
from grafter.wire.store_client import StoreClient

# A store that is merely slow answers sooner.
_SILENT_SECONDS = 5.0


class StoreLink:
    """One per rank, used by its monitor thread.

    A store that does not answer is not lost yet: the thread goes on without it, and with it once the answer has come.
    """

    def __init__(self, client: StoreClient, members: Members, who: str, warn: Callable[[], None]) -> None:
        """warn: called while the store owes an answer, to say of whoever is stopped that it is."""
        self.client = client
        self._members, self._who, self._warn = members, who, warn
        self.is_down = False
        client.call_monitor = self

    @property
    def is_hopeless(self) -> bool:
        """The thread has other things to do."""
        return True

    def look(self, seconds: float) -> None:
        """While an answer is owed. Raises PeerLostError where this thread has better things to do than to wait."""
        self._warn()
        if self._members.host.is_stopped or seconds > _SILENT_SECONDS:
            raise PeerLostError(f"the rendezvous store, hosted by {self._members.host}, does not answer")

    def interrupted(self, error: BaseException) -> None:
        """Signals' handlers run on the main thread."""

    def over(self) -> None:
        """Nothing is to be done."""

    def lose(self, error: RunError) -> RunError | None:
        """A call of the store has failed. Why the run is over; None while the store is only silent."""
        self.is_down = True
        return None if self.client.silent_seconds else self._lost(str(error))

    def look_again(self, wait: Wait | None) -> RunError | None:
        """While the store is silent: why the run is over, if it is. wait: what the dump thread waits for meanwhile."""
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
    """The keeper of the dump thread's waits, as far as a silent store concerns it: the monitor thread."""

    @property
    def underway(self) -> Underway | None: ...

    @property
    def current_wait(self) -> Wait | None: ...

    @property
    def store_is_silent(self) -> bool: ...

    def interrupted(self, wait: Wait, error: BaseException) -> None: ...


class StoreWait:
    """Of the dump thread's client. See `grafter.wire.bounded_calls.CallMonitor`."""

    def __init__(self, keeper: DumpThreadWaitKeeper, timeout: float) -> None:
        """timeout: how long a point waits, in seconds."""
        self._keeper, self._timeout = keeper, timeout
        self._wait: Wait | None = None

    @property
    def is_hopeless(self) -> bool:
        """Whether the store is silent for the monitor thread as well."""
        return self._keeper.store_is_silent

    def look(self, seconds: float) -> None:
        """Raises what ended the run. An answer that is not there yet is a wait, unless the rank is in one already."""
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
        """Where the call waits for another rank's value, it would block on for ever, and keep all others from being
        made: the run ends, and that wakes it."""
        wait = self._keeper.current_wait
        if wait is not None and wait.awaits and not wait.is_polled:
            self._keeper.interrupted(wait, error)

    def over(self) -> None:
        """The answer has come, or is not waited for any more."""
        if self._wait is not None:
            self._keeper.end(self._wait)
            self._wait = None
