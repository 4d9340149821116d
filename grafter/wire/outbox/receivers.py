"""The receivers of one-sided points, as their sender sees them: how far they are, and whether they take anything."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator

from grafter.core.messages.roster import Roster, other_role
from grafter.core.roles import RoleName
from grafter.wire.monitor.housekeeping import Housekeeping
from grafter.wire.monitor.status_board import BoardLine
from grafter.wire.monitor.waits import Wait
from grafter.wire.store_client import StoreClient

_POLL_SECONDS, _SLOWEST_POLL_SECONDS = 0.001, 0.02
_LOOK_SECONDS = 0.5
# Receivers that all wait at their points for so long take nothing until more is posted. Their lines on the board are
# old by up to a third of this.
_IDLE_SECONDS = 1.5
# A wait that is longer than this rank's patience would end the run.
_BEYOND_PATIENCE_SECONDS = 60.0


class Receivers:
    """One per rank; used by its dump thread. `sender` is the own job."""

    def __init__(self, housekeeping: Housekeeping, roster: Roster, sender: RoleName, timeout: float) -> None:
        self._housekeeping, self._timeout = housekeeping, timeout
        self.sender, self.role = sender, other_role(sender)
        self.graft_ranks = [roster.graft_rank(self.role, rank) for rank in range(len(roster.side(self.role)))]
        # Whether nothing has been taken since this rank waited for it in vain.
        self.are_given_up = False

    def passed_step(self, client: StoreClient) -> int:
        """The step that all of them have reached: they come to no point of the steps before."""
        return min(self._housekeeping.step_ends.reached(client, self.role))

    @contextlib.contextmanager
    def waited_for(self, *, posts_more: bool) -> Iterator[Patience]:
        """While this rank waits until they take something. posts_more: it posts more points after that."""
        what = f"the {self.role} to take points out of the outbox"
        timeout = self._timeout + _BEYOND_PATIENCE_SECONDS
        # At its end this rank does not end the run for a receiver that is gone: what it was to take has failed.
        needs = frozenset(self.graft_ranks if posts_more else ())
        wait = Wait("outbox", what, timeout, leader=True, needs=needs)
        with self._housekeeping.waiting(wait):
            yield Patience(self, self._housekeeping, self._timeout, posts_more=posts_more)


class Patience:
    """Of one wait for the receivers. `story`: why it is over."""

    def __init__(self, receivers: Receivers, housekeeping: Housekeeping, timeout: float, *, posts_more: bool) -> None:
        self._receivers, self._housekeeping, self._timeout = receivers, housekeeping, timeout
        self._posts_more = posts_more
        self._since = time.monotonic()
        self._next_look = self._since + _LOOK_SECONDS
        self._pause = _POLL_SECONDS
        self._idle_since: tuple[list[int], float] = ([], 0.0)
        self.story = ""
        # Whether a receiver has left with an error.
        self.has_failed = False

    def is_over(self, client: StoreClient) -> bool:
        """Asked again and again; pauses for a moment where it is not. Raises what ended the run."""
        self._housekeeping.check()
        if self._posts_more and self._receivers.are_given_up:
            return True
        now = time.monotonic()
        if now > self._since + self._timeout:
            self.story = f"nobody took it within {self._timeout:g} s (GRAFTER_TIMEOUT)"
        elif now >= self._next_look:
            self._next_look = now + _LOOK_SECONDS
            self._look(self._housekeeping.read_board(client, self._receivers.graft_ranks), now)
        if self.story:
            self._receivers.are_given_up = self._posts_more
            return True
        time.sleep(self._pause)
        self._pause = min(2 * self._pause, _SLOWEST_POLL_SECONDS)
        return False

    def _look(self, lines: list[BoardLine], now: float) -> None:
        crashed = next((line for line in lines if line.state == "left" and line.note), None)
        if crashed is not None:
            self.story, self.has_failed = f"{crashed.who} has left with {crashed.note}", True
        if not self._posts_more or any(line.state == "running" for line in lines):
            self._idle_since = ([], now)
            return
        sequences = [line.sequence for line in lines]
        if sequences != self._idle_since[0]:
            self._idle_since = (sequences, now)
        elif now - self._idle_since[1] > _IDLE_SECONDS:
            self.story = f"the {self._receivers.role} waits at points that are not posted"
