"""The housekeeping's way to the store, which can be lost, or fall silent: where its process is stopped, say."""

from __future__ import annotations

from collections.abc import Callable

from grafter.core.processes import SILENT_AFTER_SECONDS
from grafter.errors import PeerLostError, PointTimeoutError, RunError
from grafter.wire.monitor.members import Members
from grafter.wire.monitor.waits import Wait
from grafter.wire.store_client import StoreClient

# A store that is merely slow answers sooner.
_SILENT_SECONDS = 5.0


class StoreLink:
    """One per rank, used by its housekeeping thread.

    A store that does not answer is not lost yet: the thread goes on without it, and with it once the answer has come.
    """

    def __init__(self, client: StoreClient, members: Members, who: str, warn: Callable[[], None]) -> None:
        """warn: called while the store owes an answer, to say of whoever is stopped that it is."""
        self.client = client
        self._members, self._who, self._warn = members, who, warn
        self.is_down = False
        client.patience = self

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
