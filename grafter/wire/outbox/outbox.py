"""The outbox of one rank: snapshots that wait for their receivers, and how each entry ends.

The dump thread adds entries, the monitor thread looks up their states once a second, and either may find that one
has ended. An entry's state is the same on all ranks of its side, since only an exchange in the store changes it; each
rank frees its own snapshot when it reads a final state.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable
from typing import Protocol

from grafter.core.messages.states import (
    CLAIMED,
    DISPLACED,
    EXPIRED,
    FAILED,
    FINAL,
    MISSED,
    UNSEEN,
    WITHDRAWN,
)
from grafter.core.messages.wire import Sealed
from grafter.core.processes import is_from_signal_handler
from grafter.core.records import LedgerRecord
from grafter.errors import RunError
from grafter.wire.outbox.entries import EntryTable, OutboxEntry, Tombstones, claimers, put_tombstone
from grafter.wire.outbox.one_sided import KeptEntries, Receivers
from grafter.wire.outbox.snapshots import Memory, Slot
from grafter.wire.store_client import StoreClient

# How many states are looked up per second, at 60 us each.
_MOST_LOOKED_UP = 512
_MOST_ENTRIES = 16384
# Ended entries that wait for the monitor thread. On a busy machine it may be slower than a program that posts.
_MOST_CHORES = 1024
# How long the end of the run waits for receivers that have claimed an entry.
_CLOSING_SECONDS = 5.0
_CLOSING_POLL_SECONDS = 0.02


class RunMonitor(Protocol):
    """What the outbox needs of the monitor thread."""

    # What ended the run.
    aborted: RunError | None

    def delete_later(self, keys: list[str]) -> None:
        """Delete these keys of the store soon."""


class Outbox(EntryTable):
    """The outbox of one rank: its entries, and what ends them.

    Methods that ask the store take a client of the calling thread, and raise PeerLostError if the store is lost.
    """

    def __init__(
        self,
        memory: Memory,
        keep_seconds: float,
        graft_rank: int,
        monitor: RunMonitor,
        tombstones: Tombstones,
        find_gone: Callable[[], dict[int, str]],
        write: Callable[[LedgerRecord], None],
        receivers: Receivers,
    ) -> None:
        """keep_seconds: how long an entry is kept that is not taken. find_gone: graft rank -> how its process ended.
        write: writes a line of the ledger; called on any thread."""
        super().__init__(memory, receivers.sender, write)
        self._kept = KeptEntries(self, receivers)
        self._keep_seconds, self._graft_rank = keep_seconds, graft_rank
        self._gone: dict[int, str] = {}
        self._monitor, self._tombstones, self._find_gone = monitor, tombstones, find_gone
        # Entries that have ended but still have keys in the store: with their state, and the reason for a tombstone.
        self._chores: deque[tuple[OutboxEntry, str, str | None]] = deque()

    # What the dump thread calls.

    def make_room(self, nbytes: int, client: StoreClient, *, patient: bool = False) -> tuple[Slot | None, str | None]:
        """(memory for one snapshot, None), or (None, why there is none). The oldest open entries make room, not claimed
        ones.

        patient: waits first for the receivers to take entries. A value of no bytes needs no memory: (None, None).
        """
        free_one = self._wait_for_room if patient else self._displace_one
        limit = self.limit_bytes
        if nbytes > limit:
            return None, f"{nbytes} bytes do not fit into an outbox of {limit} (GRAFTER_OUTBOX_BYTES)"
        while self.count >= _MOST_ENTRIES and free_one(client):
            pass
        while nbytes:
            try:
                slot = self.take(nbytes)
            except (OSError, ValueError, OverflowError) as error:
                if is_from_signal_handler(error):
                    raise
                return None, f"{nbytes} bytes cannot be allocated for the outbox: {error}"
            if slot is not None:
                return slot, None
            if not free_one(client):
                claimed = self.pending.claimed
                return None, (
                    f"the outbox has no room for {nbytes} bytes: {claimed} of its entries are being taken, and the "
                    f"limit is {limit} (GRAFTER_OUTBOX_BYTES)"
                )
        return None, None

    def _wait_for_room(self, client: StoreClient) -> bool:
        return self._kept.wait_for_room(client) or self._displace_one(client)

    def _displace_one(self, client: StoreClient) -> bool:
        """End the oldest open entry; False if there is none. An entry that has ended by itself makes room as well."""
        for entry in [entry for entry in self.announced_entries() if entry.state != CLAIMED]:
            self.end(entry, client, DISPLACED, "newer points needed its room (GRAFTER_OUTBOX_BYTES)", later=True)
            if entry.is_over:
                return True
        # Entries that were claimed a second ago may have been taken by now.
        return any(self.has_been_taken(entry, client) for entry in self._claimed())

    def _claimed(self) -> list[OutboxEntry]:
        return [entry for entry in self.announced_entries() if entry.state == CLAIMED]

    def has_been_taken(self, entry: OutboxEntry, client: StoreClient) -> bool:
        """Free an entry that has ended by itself; returns whether it has. One round trip."""
        found = client.find_other(entry.keys.state, entry.posted)
        if found is not None and found.kind in FINAL and self._settle(entry, found.kind, found.payload):
            self._chores.append((entry, found.kind, None))
        return entry.is_over

    # Ending.

    def end(self, entry: OutboxEntry, client: StoreClient, state: str, reason: str, *, later: bool = False) -> None:
        """Give an entry this final state, unless it is claimed or has a final state already.

        later: one round trip frees its memory, and the monitor thread does the rest, unless it is far behind.
        """
        found = entry.change_state(client, state, reason)
        if found is not None and found.kind not in FINAL:
            entry.state = found.kind
            return
        if found is not None:
            state, reason = found.kind, found.payload
        to_leave = reason if found is None and state in UNSEEN else None
        if not self._settle(entry, state, reason):
            return
        if later and len(self._chores) < _MOST_CHORES:
            self._chores.append((entry, state, to_leave))
        else:
            self._finish(client, entry, state, to_leave)

    def ended(self, entry: OutboxEntry, client: StoreClient, state: str, reason: str) -> None:
        """An entry ended while it was posted; the store and the receivers have this state. Called by its leader."""
        if self._settle(entry, state, reason):
            self._finish(client, entry, state, None)

    def _finish(self, client: StoreClient, entry: OutboxEntry, state: str, reason: str | None) -> None:
        """Replace the keys of an entry that has ended by a tombstone, if a reason is given, and delete them.

        In this order: once its state is deleted, a posted entry would look open. Called by the thread that settled it.
        """
        if reason is not None:
            put_tombstone(client, entry.keys, self._tombstones, state, reason)
        self._tidy(entry, client, state)

    def _do_chores(self, client: StoreClient) -> None:
        while True:
            try:
                entry, state, reason = self._chores.popleft()
            except IndexError:
                return
            self._finish(client, entry, state, reason)

    def _read_state(self, entry: OutboxEntry, client: StoreClient, state: Sealed) -> None:
        if state.kind in FINAL:
            if self._settle(entry, state.kind, state.payload):
                self._finish(client, entry, state.kind, None)
        else:
            entry.state = state.kind

    def _tidy(self, entry: OutboxEntry, client: StoreClient, state: str) -> None:
        """Delete the entry's keys, if this rank is the last of the senders that reads of its end."""
        keys, done = entry.keys, [entry.keys.state]
        if len(entry.participants) > 1:
            client.set(keys.drained(self._graft_rank), "drained", "")
            living = [keys.drained(rank) for rank in entry.participants if rank not in self._gone]
            if not client.all_exist(living):
                return
            done += [keys.drained(rank) for rank in entry.participants]
        # A tombstone stays until the other side reaches the point.
        self._monitor.delete_later(done if state in UNSEEN | {MISSED} else [*done, keys.first])

    # What the monitor thread calls.

    def look_after(self, client: StoreClient) -> None:
        """Called once a second: free entries that have ended; end those that are too old, or whose ranks are gone."""
        self._do_chores(client)
        entries = self.announced_entries()[:_MOST_LOOKED_UP]
        if not entries:
            return
        if self._monitor.aborted is not None:
            self.drop_all(f"the run is over: {str(self._monitor.aborted).splitlines()[0]}", keep_content=True)
            return
        gone = self._gone = self._find_gone()
        passed = self._kept.passed_step(client) if any(entry.step is not None for entry in entries) else 0
        for entry in entries:
            found = client.find_other(entry.keys.state, entry.posted)
            if found is None:
                self._look_after_open(entry, client, gone, passed)
            elif found.kind == CLAIMED:
                self._look_after_claimed(entry, client, found, gone)
            else:
                self._read_state(entry, client, found)
            if len(entries) == _MOST_LOOKED_UP:
                # Behind those that have not been looked up in this second.
                self.move_to_end(entry)

    def _look_after_open(self, entry: OutboxEntry, client: StoreClient, gone: dict[int, str], passed: int) -> None:
        """End an open entry if it will not be taken. passed: the step that all receivers have reached."""
        lost = next((gone[rank] for rank in entry.participants if rank in gone), None)
        if lost is not None:
            self.end(entry, client, WITHDRAWN, f"a rank that holds a part of it {lost}")
        elif entry.step is not None:
            self._kept.look_after_open(entry, client, gone, passed)
        elif time.monotonic() - entry.since > self._keep_seconds:
            seconds = f"{self._keep_seconds:g} s (GRAFTER_OUTBOX_SECONDS)"
            self.end(entry, client, EXPIRED, f"no receiver took it for {seconds}")

    def _look_after_claimed(self, entry: OutboxEntry, client: StoreClient, claim: Sealed, gone: dict[int, str]) -> None:
        entry.state = CLAIMED
        # Only if the receivers' leader is gone. If another receiver is, their leader finds out. Until then the rest may
        # read this memory, and write what they have read.
        lost = gone.get(min(claimers(claim.payload), default=-1))
        if lost is None:
            return
        reason = f"a rank that was taking it {lost}"
        found = client.exchange(entry.keys.state, claim, FAILED, reason)
        self._read_state(entry, client, found or Sealed(FAILED, "", reason))

    # The end of the run.

    def close(self, client: StoreClient, *, patient: bool = False) -> None:
        """End what is left; wait up to 5 s for claimed entries. Called by the dump thread, which adds no more.

        patient: wait first until one-sided entries are taken, as long as the receivers take any.
        """
        try:
            if patient:
                self._kept.wait_until_taken(client)
            deadline = time.monotonic() + _CLOSING_SECONDS
            while self.count and self._monitor.aborted is None:
                for entry in self.all_entries():
                    self.end(entry, client, EXPIRED, "the run ended")
                if not self.count or time.monotonic() > deadline:
                    break
                time.sleep(_CLOSING_POLL_SECONDS)
            self._do_chores(client)
        except RunError:
            # The run is over, or the store is lost: no receiver can take anything any more.
            pass
        self.drop_all("the run ended before it was taken")
