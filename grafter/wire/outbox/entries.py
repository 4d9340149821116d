"""The outbox of one rank: snapshots that wait to be taken, and what became of each.

The dump thread adds entries, the housekeeping thread looks up their states once a second, and either may find that one
has ended. An entry's state is the same on all ranks of its side, since it changes by an exchange in the store alone;
each rank drops its own snapshot when it hears of a final one.
"""

from __future__ import annotations

import threading
import time
from collections import Counter, OrderedDict, deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Protocol

from grafter.core.messages.counts import Pending
from grafter.core.messages.manifest import StoreKeys
from grafter.core.messages.states import (
    CLAIMED,
    DISPLACED,
    EXPIRED,
    FAILED,
    FINAL,
    MISSED,
    ONE_SIDED,
    UNSEEN,
    WITHDRAWN,
    senders_outcome,
)
from grafter.core.messages.wire import Sealed
from grafter.core.processes import is_from_signal_handler
from grafter.core.records import LedgerRecord, Outcome
from grafter.core.roles import Direction
from grafter.errors import RunError
from grafter.wire.outbox.claims import claimers
from grafter.wire.outbox.kept_entries import KeptEntries
from grafter.wire.outbox.memory import Memory, Slot
from grafter.wire.outbox.receivers import Receivers
from grafter.wire.outbox.tombstones import Tombstones, put_tombstone
from grafter.wire.store_client import StoreClient

# So many states are looked up in one second, at 60 us each.
_MOST_LOOKED_UP = 512
_MOST_ENTRIES = 16384
# At the end of the run, for receivers that are in the middle of it.
_CLOSING_SECONDS = 5.0
_CLOSING_POLL_SECONDS = 0.02


@dataclass(eq=False)
class Entry:
    """One point in this rank's outbox. participants: graft ranks of the senders, this one among them.

    posted: its state as its leader posts it; the state is absent before. is_told: whether the other ranks of this side
    have this rank's word for it; before, its state is not looked up. step: of a one-sided point, which is kept until it
    is taken, or until all receivers have passed the end of that step.
    """

    keys: StoreKeys
    posted: Sealed
    direction: Direction
    participants: tuple[int, ...]
    slot: Slot | None
    nbytes: int
    step: int | None = None
    since: float = field(default_factory=time.monotonic)
    state: str = "open"
    is_told: bool = False
    is_over: bool = False
    record: LedgerRecord | None = None
    # Where it ended before its line was in the ledger.
    ended: tuple[Outcome, str] | None = None


class Watchers(Protocol):
    """What the outbox asks about the run: the housekeeping."""

    aborted: RunError | None

    def delete_later(self, keys: list[str]) -> None: ...


class Outbox:
    """One per rank."""

    def __init__(
        self,
        memory: Memory,
        keep_seconds: float,
        graft_rank: int,
        watchers: Watchers,
        words: Tombstones,
        find_gone: Callable[[], dict[int, str]],
        write: Callable[[LedgerRecord], None],
        receivers: Receivers,
    ) -> None:
        """find_gone: graft rank -> how its process went. write: puts a line into the ledger; called on any thread."""
        self._sender, self._kept = receivers.sender, KeptEntries(self, receivers)
        self._keep_seconds, self._graft_rank = keep_seconds, graft_rank
        self._gone: dict[int, str] = {}
        self._watchers, self._words, self._find_gone, self._write = watchers, words, find_gone, write
        self._memory = memory
        # Oldest first.
        self._entries: OrderedDict[str, Entry] = OrderedDict()
        self._lock = threading.RLock()
        # Outcomes that have taken the place of `posted`.
        self.settled: Counter[str] = Counter()
        # Entries that have ended, whose end is not in the store in full; and what to leave for receivers, if anything.
        self._chores: deque[tuple[Entry, str, str | None]] = deque()

    @property
    def pending(self) -> Pending:
        with self._lock:
            entries = list(self._entries.values())
        claimed = sum(entry.state == CLAIMED for entry in entries)
        return Pending(len(entries), sum(entry.nbytes for entry in entries), len(entries) - claimed, claimed)

    @property
    def count(self) -> int:
        return len(self._entries)

    def told_entries(self) -> list[Entry]:
        """Those that the other ranks of this side know of, about the oldest first."""
        with self._lock:
            return [entry for entry in self._entries.values() if entry.is_told]

    def find(self, base: str) -> Entry | None:
        """By the base of its store keys. Called on any thread."""
        with self._lock:
            return self._entries.get(base)

    # What the dump thread calls.

    def make_room(self, nbytes: int, client: StoreClient, *, patient: bool = False) -> tuple[Slot | None, str | None]:
        """(memory for one snapshot, None), or why there is none. The oldest open entries make room; claimed ones stay.

        patient: what the receivers may still take is given the time for it first. A value of no bytes needs no memory.
        """
        free_one = self._wait_for_room if patient else self._displace_one
        limit = self._memory.limit_bytes
        if nbytes > limit:
            return None, f"{nbytes} bytes do not fit into an outbox of {limit} (GRAFTER_OUTBOX_BYTES)"
        while len(self._entries) >= _MOST_ENTRIES and free_one(client):
            pass
        while nbytes:
            try:
                with self._lock:
                    slot = self._memory.take(nbytes)
            except (OSError, ValueError, OverflowError) as error:
                if is_from_signal_handler(error):
                    raise
                return None, f"{nbytes} bytes cannot be had for the outbox: {error}"
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
        """End the oldest open entry; False where there is none. One that has ended by itself makes room as well."""
        for entry in [entry for entry in self.told_entries() if entry.state != CLAIMED]:
            self.end(entry, client, DISPLACED, "newer points needed its room (GRAFTER_OUTBOX_BYTES)", later=True)
            if entry.is_over:
                return True
        # What was being taken a second ago may have been taken by now.
        return any(self.has_been_taken(entry, client) for entry in self._claimed())

    def _claimed(self) -> list[Entry]:
        return [entry for entry in self.told_entries() if entry.state == CLAIMED]

    def has_been_taken(self, entry: Entry, client: StoreClient) -> bool:
        """Drop an entry that has ended by itself; whether it has."""
        found = client.find_other(entry.keys.state, entry.posted)
        if found is not None and found.kind in FINAL and self._settle(entry, found.kind, found.payload):
            self._chores.append((entry, found.kind, None))
        return entry.is_over

    def give_back(self, slot: Slot | None) -> None:
        """Memory for a snapshot that never became an entry."""
        if slot is not None:
            with self._lock:
                self._memory.give_back(slot)

    def add(self, entry: Entry) -> None:
        with self._lock:
            self._entries[entry.keys.base] = entry

    def recorded(self, entry: Entry, record: LedgerRecord) -> Outcome:
        """The line of an entry, written; the outcome is `posted`, or what became of it already."""
        with self._lock:
            entry.record = record
            outcome, reason = entry.ended or (record.outcome, record.reason)
            if entry.ended is not None:
                self.settled[outcome] -= 1
            # Here, so that the line of its end comes after it.
            only_in = self._sender if entry.state == ONE_SIDED else None
            update = {"outcome": outcome, "reason": reason or None, "only_in": only_in}
            self._write(record.model_copy(update=update))
        return outcome

    # Ending.

    def end(self, entry: Entry, client: StoreClient, state: str, reason: str, *, later: bool = False) -> None:
        """Give an entry this final state, unless it has been claimed, or has another already.

        later: its memory is free at once, by one round trip; the rest is the housekeeping thread's to do.
        """
        found = self._change(entry, client, state, reason)
        if found is not None and found.kind not in FINAL:
            entry.state = found.kind
            return
        if found is not None:
            state, reason = found.kind, found.payload
        to_leave = reason if found is None and state in UNSEEN else None
        if not self._settle(entry, state, reason):
            return
        if later:
            self._chores.append((entry, state, to_leave))
        else:
            self._finish(client, entry, state, to_leave)

    def _change(self, entry: Entry, client: StoreClient, state: str, reason: str) -> Sealed | None:
        """From open to this state: None if that is done, else what it is."""
        while True:
            found = client.exchange(entry.keys.state, entry.posted, state, reason)
            if found != entry.posted:
                return found
            # Its leader has not come here yet, and finds this when it does.
            found = client.put_if_absent(entry.keys.state, state, reason)
            if found != entry.posted:
                return found

    def ended(self, entry: Entry, client: StoreClient, state: str, reason: str) -> None:
        """An entry has ended as it was posted: the store says so, and the receivers know. Called by its leader."""
        if self._settle(entry, state, reason):
            self._finish(client, entry, state, None)

    def _finish(self, client: StoreClient, entry: Entry, state: str, reason: str | None) -> None:
        """What is in the store of an entry that has ended. reason: to be left for receivers that come later.

        In this order: once the state is deleted, an entry that looks posted would look open. By whoever has settled it.
        """
        if reason is not None:
            put_tombstone(client, entry.keys, self._words, state, reason)
        self._tidy(entry, client, state)

    def _do_chores(self, client: StoreClient) -> None:
        while True:
            try:
                entry, state, reason = self._chores.popleft()
            except IndexError:
                return
            self._finish(client, entry, state, reason)

    def drop(self, entry: Entry, reason: str) -> None:
        """The run is over, or this rank could not say that it has the entry: nothing is left to agree on.

        Its memory is not used again, since a receiver may be reading it.
        """
        entry.slot = None
        self._settle(entry, FAILED, reason)

    def _heard(self, entry: Entry, client: StoreClient, state: Sealed) -> None:
        if state.kind in FINAL:
            if self._settle(entry, state.kind, state.payload):
                self._finish(client, entry, state.kind, None)
        else:
            entry.state = state.kind

    def _settle(self, entry: Entry, state: str, reason: str) -> bool:
        """Drop the snapshot, and say in the ledger what became of it. False where another thread has done it."""
        outcome = senders_outcome(state, entry.direction)
        with self._lock:
            if entry.is_over:
                return False
            entry.is_over, entry.state = True, state
            del self._entries[entry.keys.base]
            if entry.slot is not None:
                self._memory.give_back(entry.slot)
            self.settled[outcome] += 1
            entry.ended = (outcome, reason)
            record, only_in = entry.record, self._sender if state == ONE_SIDED else None
        if record is not None:
            sent = entry.nbytes if outcome in ("sent", "compared") else 0
            update = {"outcome": outcome, "reason": reason or None, "bytes_sent": sent, "only_in": only_in}
            self._write(record.model_copy(update=update))
        return True

    def _tidy(self, entry: Entry, client: StoreClient, state: str) -> None:
        """The last of the senders to hear of the end deletes what is in the store."""
        keys, done = entry.keys, [entry.keys.state]
        if len(entry.participants) > 1:
            client.set(keys.drained(self._graft_rank), "drained", "")
            living = [keys.drained(rank) for rank in entry.participants if rank not in self._gone]
            if not client.all_exist(living):
                return
            done += [keys.drained(rank) for rank in entry.participants]
        # Words for the other side stay until it comes.
        self._watchers.delete_later(done if state in UNSEEN | {MISSED} else [*done, keys.first])

    # What the housekeeping thread calls.

    def look_after(self, client: StoreClient) -> None:
        """Once a second: drop what has ended, end what is too old, or whose other ranks are gone."""
        self._do_chores(client)
        entries = self.told_entries()[:_MOST_LOOKED_UP]
        if not entries:
            return
        if self._watchers.aborted is not None:
            self._drop_all()
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
                self._heard(entry, client, found)
            with self._lock:
                # Behind those that have not been looked up in this second.
                if len(entries) == _MOST_LOOKED_UP and not entry.is_over:
                    self._entries.move_to_end(entry.keys.base)

    def _look_after_open(self, entry: Entry, client: StoreClient, gone: dict[int, str], passed: int) -> None:
        """passed: the step that all receivers have reached."""
        lost = next((gone[rank] for rank in entry.participants if rank in gone), None)
        if lost is not None:
            self.end(entry, client, WITHDRAWN, f"a rank that holds a part of it {lost}")
        elif entry.step is not None:
            self._kept.look_after_open(entry, client, gone, passed)
        elif time.monotonic() - entry.since > self._keep_seconds:
            seconds = f"{self._keep_seconds:g} s (GRAFTER_OUTBOX_SECONDS)"
            self.end(entry, client, EXPIRED, f"nobody took it for {seconds}")

    def _look_after_claimed(self, entry: Entry, client: StoreClient, claim: Sealed, gone: dict[int, str]) -> None:
        entry.state = CLAIMED
        # The leader alone: if another receiver is gone, it is the leader that finds out, and until it does, those that
        # are left may read this memory, and write what they have read.
        lost = gone.get(min(claimers(claim.payload), default=-1))
        if lost is None:
            return
        reason = f"a rank that was taking it {lost}"
        found = client.exchange(entry.keys.state, claim, FAILED, reason)
        self._heard(entry, client, found or Sealed(FAILED, "", reason))

    def _drop_all(self) -> None:
        with self._lock:
            entries = list(self._entries.values())
        head = str(self._watchers.aborted).splitlines()[0] if self._watchers.aborted is not None else ""
        for entry in entries:
            self.drop(entry, f"the run is over: {head}")
        with self._lock:
            self._memory.release(keep_content=True)

    # The end of the run.

    def close(self, client: StoreClient, *, patient: bool = False) -> None:
        """End what is left; wait a moment for what is being taken. Called by the dump thread, which adds no more.

        patient: entries of one-sided points are given the time to be taken, as long as the receivers take any.
        """
        try:
            if patient:
                self._kept.wait_until_taken(client)
            deadline = time.monotonic() + _CLOSING_SECONDS
            while self._entries and self._watchers.aborted is None:
                for entry in list(self._entries.values()):
                    self.end(entry, client, EXPIRED, "the run ended")
                if not self._entries or time.monotonic() > deadline:
                    break
                time.sleep(_CLOSING_POLL_SECONDS)
            self._do_chores(client)
        except RunError:
            # The run is over, or the store is gone, and with it all who could take something.
            pass
        with self._lock:
            left = list(self._entries.values())
        for entry in left:
            self.drop(entry, "the run ended before it was taken")
        with self._lock:
            self._memory.release(keep_content=bool(left))
