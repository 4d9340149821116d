"""Entries of one-sided points: kept until they are taken, or until the receivers have passed the end of their step."""

from __future__ import annotations

import heapq
from typing import TYPE_CHECKING

from grafter.core.messages.states import CLAIMED, EXPIRED, ONE_SIDED, WITHDRAWN
from grafter.wire.monitor.absence import only_one_job_came
from grafter.wire.outbox.receivers import Receivers
from grafter.wire.store_client import StoreClient

if TYPE_CHECKING:
    from grafter.wire.outbox.entries import Entry, Outbox

# So many of the oldest are looked up at a time: receivers take them in about this order.
_SWEPT = 64


class KeptEntries:
    """Those of one outbox. The waits are the dump thread's, which adds no entry meanwhile."""

    def __init__(self, outbox: Outbox, receivers: Receivers) -> None:
        self._outbox, self._receivers = outbox, receivers

    def wait_for_room(self, client: StoreClient) -> bool:
        """Until an entry has ended; False once the receivers take none any more. Raises what ended the run."""
        count = self._outbox.count
        if self._sweep(client, count):
            self._receivers.are_given_up = False
            return True
        with self._receivers.waited_for(posts_more=True) as patience:
            while not patience.is_over(client):
                if self._sweep(client, count):
                    return True
        return False

    def wait_until_taken(self, client: StoreClient) -> None:
        """Until none is left; what the receivers do not take any more ends. Raises what ended the run."""
        while self._kept():
            count = self._outbox.count
            with self._receivers.waited_for(posts_more=False) as patience:
                while not self._sweep(client, count):
                    if patience.is_over(client):
                        state = WITHDRAWN if patience.has_failed else EXPIRED
                        for entry in self._kept():
                            self._outbox.end(entry, client, state, patience.story)
                        return

    def passed_step(self, client: StoreClient) -> int:
        """The step that all receivers have reached. To be asked before states are looked up: what they had taken by
        then is claimed."""
        return self._receivers.passed_step(client)

    def look_after_open(self, entry: Entry, client: StoreClient, gone: dict[int, str], passed: int) -> None:
        """End an entry that nobody will take. gone: graft rank -> how its process went."""
        assert entry.step is not None
        lost = next((gone[rank] for rank in self._receivers.graft_ranks if rank in gone), None)
        if passed > entry.step:
            self._outbox.end(entry, client, ONE_SIDED, only_one_job_came(self._receivers.sender))
        elif lost is not None:
            self._outbox.end(entry, client, WITHDRAWN, f"a rank of the {self._receivers.role} {lost}")

    def _kept(self) -> list[Entry]:
        """Those that nobody is taking."""
        return [entry for entry in self._outbox.told_entries() if entry.step is not None and entry.state != CLAIMED]

    def _sweep(self, client: StoreClient, count: int) -> bool:
        """End those whose step the receivers have passed, and drop what has been taken. Whether fewer than `count`
        entries are left: the housekeeping thread drops them as well."""
        passed = self.passed_step(client)
        for entry in self._kept():
            if entry.step is not None and entry.step < passed:
                self._outbox.end(entry, client, ONE_SIDED, only_one_job_came(self._receivers.sender), later=True)
        for entry in heapq.nsmallest(_SWEPT, self._outbox.told_entries(), key=lambda entry: entry.since):
            self._outbox.has_been_taken(entry, client)
        return self._outbox.count < count
