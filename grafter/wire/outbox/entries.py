"""One entry of an outbox: its state in the store, the receivers' claim, and the tombstone of an entry that has ended.

The state is one key of the store. It is changed only by a compare-and-exchange, so the first rank that changes it
decides.
"""

from __future__ import annotations

import json
import logging
import threading
import time
from collections import Counter, OrderedDict, deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from pydantic import TypeAdapter

from grafter.core.messages.counts import Pending
from grafter.core.messages.manifest import StoreKeys, store_keys
from grafter.core.messages.states import (
    CLAIMED,
    FAILED,
    GONE,
    ONE_SIDED,
    POSTED,
    NotMet,
    gone_text,
    receivers_account,
    senders_outcome,
)
from grafter.core.messages.wire import Sealed, read_message
from grafter.core.records import LedgerRecord, PointOutcome
from grafter.core.roles import Direction, Role
from grafter.wire.outbox.snapshots import Memory, Slot
from grafter.wire.store_client import StoreClient

logger = logging.getLogger("grafter")

_GRAFT_RANKS = TypeAdapter(list[int])


@dataclass(eq=False)
class OutboxEntry:
    """One point in this rank's outbox.

    posted: the state as the senders' leader posts it; until then the key is absent. participants: graft ranks of the
    senders, this one among them. nbytes: of the tensors. step: set for a one-sided point, which is kept until it is
    taken, or until all receivers have passed the end of that step. since: on `time.monotonic`'s clock. is_announced:
    whether this rank has announced it to its leader; before, its state is not looked up.
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
    is_announced: bool = False
    is_over: bool = False
    record: LedgerRecord | None = None
    # Set if it ended before its line was in the ledger.
    ended: tuple[PointOutcome, str] | None = None

    def change_state(self, client: StoreClient, state: str, reason: str) -> Sealed | None:
        """Change the state from open to this one: None if that is done, else the state that it has. Two round trips at
        most, as a rule. Raises PeerLostError if the store is lost."""
        while True:
            found = client.exchange(self.keys.state, self.posted, state, reason)
            if found != self.posted:
                return found
            # Its leader has not posted it yet, and finds this state when it does.
            found = client.put_if_absent(self.keys.state, state, reason)
            if found != self.posted:
                return found


class EntryTable:
    """The entries of one rank that have not ended, with their memory and their lines in the ledger.

    The dump thread adds entries; any thread may look at them and end them.
    """

    def __init__(self, memory: Memory, sender: Role, write: Callable[[LedgerRecord], None]) -> None:
        """sender: this rank's job. write: writes a line of the ledger."""
        self._memory, self._sender, self._write = memory, sender, write
        # Oldest first, but for those that `move_to_end` has moved.
        self._entries: OrderedDict[str, OutboxEntry] = OrderedDict()
        self._lock = threading.RLock()
        # How often each outcome has replaced `posted`.
        self.settled: Counter[str] = Counter()

    @property
    def pending(self) -> Pending:
        """How many entries have not ended, and their bytes. Asked on any thread."""
        entries = self.all_entries()
        claimed = sum(entry.state == CLAIMED for entry in entries)
        return Pending(len(entries), sum(entry.nbytes for entry in entries), len(entries) - claimed, claimed)

    @property
    def count(self) -> int:
        """How many entries have not ended. Asked on any thread."""
        return len(self._entries)

    def all_entries(self) -> list[OutboxEntry]:
        """Those that have not ended, roughly from the oldest on."""
        with self._lock:
            return list(self._entries.values())

    def announced_entries(self) -> list[OutboxEntry]:
        """Those that the other ranks of this side can know of, roughly from the oldest on."""
        return [entry for entry in self.all_entries() if entry.is_announced]

    def find(self, base: str) -> OutboxEntry | None:
        """The entry with this base of its store keys. Called on any thread."""
        with self._lock:
            return self._entries.get(base)

    @property
    def limit_bytes(self) -> int:
        """How much memory all snapshots may take."""
        return self._memory.limit_bytes

    def take(self, nbytes: int) -> Slot | None:
        """Memory for one snapshot; None if there is no room. Raises OSError if the system has none."""
        with self._lock:
            return self._memory.take(nbytes)

    def give_back(self, slot: Slot | None) -> None:
        """Free the memory of a snapshot that has not become an entry."""
        if slot is not None:
            with self._lock:
                self._memory.give_back(slot)

    def add(self, entry: OutboxEntry) -> None:
        """Take in an entry, which `recorded` or `drop` must follow."""
        with self._lock:
            self._entries[entry.keys.base] = entry

    def recorded(self, entry: OutboxEntry, record: LedgerRecord) -> PointOutcome:
        """Write the line of an entry; returns its outcome: `posted`, or its final one if it has ended already."""
        with self._lock:
            entry.record = record
            outcome, reason = entry.ended or (record.outcome, record.reason)
            if entry.ended is not None:
                self.settled[outcome] -= 1
            # Under the lock, so that the line of its end follows.
            only_in = self._sender if entry.state == ONE_SIDED else None
            update = {"outcome": outcome, "reason": reason or None, "only_in": only_in}
            self._write(record.model_copy(update=update))
        return outcome

    def move_to_end(self, entry: OutboxEntry) -> None:
        """Make it the last one that is looked up."""
        with self._lock:
            if not entry.is_over:
                self._entries.move_to_end(entry.keys.base)

    def _settle(self, entry: OutboxEntry, state: str, reason: str) -> bool:
        """Free the snapshot, and write the outcome to the ledger. False if another thread has done it already."""
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

    def drop(self, entry: OutboxEntry, reason: str) -> None:
        """End an entry without the store: the run is over, or this rank could not announce it.

        Its memory is not used again, since a receiver may be reading it.
        """
        entry.slot = None
        self._settle(entry, FAILED, reason)

    def drop_all(self, reason: str, *, keep_content: bool = False) -> None:
        """End all entries without the store, and free the memory. keep_content: receivers may be reading it."""
        left = self.all_entries()
        for entry in left:
            self.drop(entry, reason)
        with self._lock:
            self._memory.release(keep_content=keep_content or bool(left))


class Claims:
    """The entries that this rank has claimed, as the leader of their receivers. One per rank, used by its dump thread.

    Its methods take one round trip, and raise PeerLostError if the store is lost.
    """

    def __init__(self, client: StoreClient) -> None:
        self._client = client
        self._held: dict[str, Sealed] = {}

    def claim(self, keys: StoreKeys, digest: str, posted: Sealed, receivers: Sequence[int]) -> NotMet | None:
        """Claim an entry for these receivers (graft ranks). None: it keeps its snapshots until `settle`. Else why not.

        posted: the state as it was posted (`open_state`).
        """
        text = json.dumps(list(receivers))
        found = self._client.exchange(keys.state, posted, CLAIMED, text)
        if found == posted:
            # The state is deleted once all senders have dropped the entry: this rank was slow since it looked.
            return NotMet("missed", "the sender's entry went while the receivers were held up")
        if found is not None:
            return receivers_account(found.kind, found.payload)
        self._held[digest] = Sealed(CLAIMED, self._client.seal.writer, text)
        return None

    def settle(self, digest: str, state: str, reason: str | None) -> None:
        """Give an entry its final state, if this rank has claimed it: all receivers are done with it."""
        mine = self._held.pop(digest, None)
        if mine is None:
            return
        place = store_keys(self._client.run_prefix, digest).state
        found = self._client.exchange(place, mine, state, reason or "")
        if found is not None:
            logger.warning("grafter: an entry is %s here, and its senders say that it is %s", state, found.kind)


def claimers(payload: str) -> list[int]:
    """The graft ranks of the receivers that a claim names. Raises ProtocolError."""
    return read_message(_GRAFT_RANKS.validate_json, payload, "a claim")


# How many are kept, at half a kilobyte of the store each.
_MOST_TOMBSTONES = 16384


class Tombstones:
    """The tombstones of one rank: `missed` and `gone`, under the keys of points that the other side has not reached.

    The other side deletes a tombstone when it reaches the point. One that it does not reach is deleted once 16384 more
    have been put, so that the store does not grow.
    """

    def __init__(self, delete_later: Callable[[Sequence[str]], None]) -> None:
        self._delete_later = delete_later
        self._places: deque[str] = deque()

    def add(self, place: str) -> None:
        """A tombstone has been put under this key. Called on any thread."""
        self._places.append(place)
        if len(self._places) > _MOST_TOMBSTONES:
            self._delete_later([self._places.popleft()])


def put_tombstone(client: StoreClient, keys: StoreKeys, tombstones: Tombstones, state: str, reason: str) -> None:
    """Leave the final state of an entry for receivers that have not reached the point. If they wait there already, the
    senders' leader has sent it to them. Two round trips at most. Raises PeerLostError if the store is lost."""
    text = gone_text(state, reason)
    found = client.put_if_absent(keys.first, GONE, text)
    if found is not None and (found.kind != POSTED or client.exchange(keys.first, found, GONE, text) is not None):
        return
    tombstones.add(keys.first)
