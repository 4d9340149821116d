"""The housekeeping's way to the store, which can be lost, and come back where its host was only stopped."""

from __future__ import annotations

from collections.abc import Callable

from grafter.errors import PeerLostError, PointTimeoutError, RunError
from grafter.rendezvous.store import StoreClient
from grafter.watching.members import Members
from grafter.watching.waits import Wait


class StoreLink:
    """One per rank, used by its housekeeping thread."""

    def __init__(self, client: StoreClient, reconnect: Callable[[], StoreClient], members: Members, who: str) -> None:
        self.client = client
        self._reconnect, self._members, self._who = reconnect, members, who
        self.is_down = False

    def lose(self, error: RunError) -> RunError | None:
        """The store does not answer. Why the run is over; None while its host is stopped: it may run again."""
        self.is_down = True
        if self._members.store_host_stopped():
            return None
        board = self._members.describe_last_board()
        return PeerLostError(f"{error}\nThe last board that {self._who} has seen:\n{board}" if board else str(error))

    def revive(self, wait: Wait | None) -> RunError | None:
        """A client that timed out has lost its place in the conversation: make a new one once its host runs again.

        Why the run is over, if it is. wait: what the dump thread waits for meanwhile.
        """
        if self._members.store_host_stopped():
            return self._time_is_up(wait) if wait is not None and wait.seconds > wait.timeout else None
        try:
            self.client = self._reconnect()
        except RunError as error:
            return self.lose(error)
        self.is_down = False
        return None

    def _time_is_up(self, wait: Wait) -> RunError:
        board = self._members.describe_last_board(self._members.stopped())
        return PointTimeoutError(
            f"{self._who} waited {wait.timeout:.0f} s for {wait.what} ({wait.stage}), and the rendezvous store "
            f"does not answer: {self.client.hosted_by} hosts it, and is stopped. The last that was seen:\n{board}"
        )
