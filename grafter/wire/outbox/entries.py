"""One entry of an outbox: its state in the store, the receivers' claim, and the tombstone of an entry that has ended.

The state is one key of the store. It is changed only by a compare-and-exchange, so the first rank that changes it
decides.
"""

from __future__ import annotations

import json
import logging
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from pydantic import TypeAdapter

from grafter.core.messages.manifest import StoreKeys, store_keys
from grafter.core.messages.states import CLAIMED, GONE, POSTED, NotMet, gone_text, receivers_account
from grafter.core.messages.wire import Sealed, read_message
from grafter.core.records import LedgerRecord, Outcome
from grafter.core.roles import Direction
from grafter.wire.outbox.snapshots import Slot
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
    ended: tuple[Outcome, str] | None = None

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
