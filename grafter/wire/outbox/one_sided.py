"""Entries of one-sided points: kept until they are taken, or until the receivers have passed the end of their step.

Also the receivers as their sender sees them: which step they are in, and whether they still take anything.
"""

from __future__ import annotations

import contextlib
import heapq
import time
from collections.abc import Iterator
from typing import TYPE_CHECKING

from grafter.core.messages.roster import Roster, other_role
from grafter.core.messages.states import CLAIMED, EXPIRED, ONE_SIDED, WITHDRAWN
from grafter.core.roles import Role
from grafter.wire.monitor.absence import only_one_job_came
from grafter.wire.monitor.monitor_thread import MonitorThread
from grafter.wire.monitor.status_board import BoardLine
from grafter.wire.monitor.waits import Wait
from grafter.wire.store_client import StoreClient

_POLL_SECONDS, _SLOWEST_POLL_SECONDS = 0.001, 0.02
_LOOK_SECONDS = 0.5
# Receivers that all wait at their points for this long take nothing until more is posted. Their lines on the board are
# up to a third of this old.
_IDLE_SECONDS = 1.5
# This wait ends by itself at GRAFTER_TIMEOUT; the monitor thread would end the run at this much later.
_MORE_SECONDS = 60.0


class Receivers:
    """The ranks of the other job, which take what this job posts. One per rank, used by its dump thread.

    sender: this rank's job. role: the other one.
    """

    def __init__(self, monitor: MonitorThread, roster: Roster, sender: Role, timeout: float) -> None:
        self._monitor, self._timeout = monitor, timeout
        self.sender, self.role = sender, other_role(sender)
        self.graft_ranks = [roster.graft_rank(self.role, rank) for rank in range(len(roster.side(self.role)))]
        # Whether this rank has waited in vain for them, and nothing has been taken since.
        self.are_given_up = False

    def passed_step(self, client: StoreClient) -> int:
        """The step that all of them have reached: they reach no point of the steps before. Called on any thread."""
        return min(self._monitor.step_ends.reached(client, self.role))

    @contextlib.contextmanager
    def waited_for(self, *, posts_more: bool) -> Iterator[ReceiverWait]:
        """A `with` block in which this rank waits until they take something. posts_more: it posts more afterwards."""
        what = f"the {self.role} to take points out of the outbox"
        timeout = self._timeout + _MORE_SECONDS
        # A rank that posts no more does not end the run for a receiver that is gone: its entries have failed.
        needs = frozenset(self.graft_ranks if posts_more else ())
        wait = Wait("outbox", what, timeout, leader=True, needs=needs)
        with self._monitor.waiting(wait):
            yield ReceiverWait(self, self._monitor, self._timeout, posts_more=posts_more)


class ReceiverWait:
    """One wait for the receivers: whether it is over, and why (`story`)."""

    def __init__(self, receivers: Receivers, monitor: MonitorThread, timeout: float, *, posts_more: bool) -> None:
        self._receivers, self._monitor, self._timeout = receivers, monitor, timeout
        self._posts_more = posts_more
        self._since = time.monotonic()
        self._next_look = self._since + _LOOK_SECONDS
        self._pause = _POLL_SECONDS
        self._idle_since: tuple[list[int], float] = ([], 0.0)
        self.story = ""
        # Whether it is over because a receiver has left with an error.
        self.has_failed = False

    def is_over(self, client: StoreClient) -> bool:
        """Whether to stop waiting; sleeps up to 20 ms if not. Raises what ended the run."""
        self._monitor.check()
        if self._posts_more and self._receivers.are_given_up:
            return True
        now = time.monotonic()
        if now > self._since + self._timeout:
            self.story = f"no receiver took it within {self._timeout:g} s (GRAFTER_TIMEOUT)"
        elif now >= self._next_look:
            self._next_look = now + _LOOK_SECONDS
            self._look(self._monitor.read_board(client, self._receivers.graft_ranks), now)
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


if TYPE_CHECKING:
    from grafter.wire.outbox.entries import OutboxEntry
    from grafter.wire.outbox.outbox import Outbox

# How many of the oldest are looked up at a time: receivers take them in about this order.
_SWEPT = 64


class KeptEntries:
    """The entries of one outbox that belong to one-sided points. Its waits block the dump thread, so no entry is added
    meanwhile."""

    def __init__(self, outbox: Outbox, receivers: Receivers) -> None:
        self._outbox, self._receivers = outbox, receivers

    def wait_for_room(self, client: StoreClient) -> bool:
        """Wait until an entry has ended; False once the receivers take none any more. Raises what ended the run."""
        count = self._outbox.count
        if self._sweep(client, count):
            self._receivers.are_given_up = False
            return True
        with self._receivers.waited_for(posts_more=True) as receiver_wait:
            while not receiver_wait.is_over(client):
                if self._sweep(client, count):
                    return True
        return False

    def wait_until_taken(self, client: StoreClient) -> None:
        """Wait until none is left; ends what the receivers do not take any more. Raises what ended the run."""
        while self._kept():
            count = self._outbox.count
            with self._receivers.waited_for(posts_more=False) as receiver_wait:
                while not self._sweep(client, count):
                    if receiver_wait.is_over(client):
                        state = WITHDRAWN if receiver_wait.has_failed else EXPIRED
                        for entry in self._kept():
                            self._outbox.end(entry, client, state, receiver_wait.story)
                        return

    def passed_step(self, client: StoreClient) -> int:
        """The step that all receivers have reached. Asked before states are looked up: what they took until then is
        claimed."""
        return self._receivers.passed_step(client)

    def look_after_open(self, entry: OutboxEntry, client: StoreClient, gone: dict[int, str], passed: int) -> None:
        """End an entry that no receiver will take. gone: graft rank -> how its process ended. passed: their step."""
        assert entry.step is not None
        lost = next((gone[rank] for rank in self._receivers.graft_ranks if rank in gone), None)
        if passed > entry.step:
            self._outbox.end(entry, client, ONE_SIDED, only_one_job_came(self._receivers.sender))
        elif lost is not None:
            self._outbox.end(entry, client, WITHDRAWN, f"a rank of the {self._receivers.role} {lost}")

    def _kept(self) -> list[OutboxEntry]:
        """Those that are not claimed."""
        return [
            entry for entry in self._outbox.announced_entries() if entry.step is not None and entry.state != CLAIMED
        ]

    def _sweep(self, client: StoreClient, count: int) -> bool:
        """End those whose step the receivers have passed, and free what has been taken. Returns whether fewer than
        `count` entries are left: the monitor thread frees them as well."""
        passed = self.passed_step(client)
        for entry in self._kept():
            if entry.step is not None and entry.step < passed:
                self._outbox.end(entry, client, ONE_SIDED, only_one_job_came(self._receivers.sender), later=True)
        for entry in heapq.nsmallest(_SWEPT, self._outbox.announced_entries(), key=lambda entry: entry.since):
            self._outbox.has_been_taken(entry, client)
        return self._outbox.count < count
