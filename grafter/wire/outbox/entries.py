"""Claims: the receivers' leader takes an entry up, and says how it ended. Whoever changes its state first decides."""

from __future__ import annotations

import json
import logging
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from pydantic import TypeAdapter

from grafter.core.direction import Direction
from grafter.core.messages.manifest import StoreKeys, store_keys
from grafter.core.messages.states import CLAIMED, GONE, POSTED, NotMet, gone_text, receivers_account
from grafter.core.messages.wire import Sealed, read_message
from grafter.core.records import LedgerRecord, Outcome
from grafter.wire.outbox.snapshots import Slot
from grafter.wire.store_client import StoreClient

logger = logging.getLogger("grafter")

_GRAFT_RANKS = TypeAdapter(list[int])


@dataclass(eq=False)
class OutboxEntry:
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

    def change_state(self, client: StoreClient, state: str, reason: str) -> Sealed | None:
        """Change it in the store from open to this state: None if that is done, else the state that it has."""
        while True:
            found = client.exchange(self.keys.state, self.posted, state, reason)
            if found != self.posted:
                return found
            # Its leader has not posted it yet, and finds this state when it does.
            found = client.put_if_absent(self.keys.state, state, reason)
            if found != self.posted:
                return found


class Claims:
    """One per rank; used by its dump thread, where it leads the receivers of a point."""

    def __init__(self, client: StoreClient) -> None:
        self._client = client
        self._held: dict[str, Sealed] = {}

    def claim(self, keys: StoreKeys, digest: str, posted: Sealed, receivers: Sequence[int]) -> NotMet | None:
        """None: the entry stays where it is until `settle`. Else what became of it.

        posted: its state as it was posted (`open_state`). receivers: graft ranks.
        """
        text = json.dumps(list(receivers))
        found = self._client.exchange(keys.state, posted, CLAIMED, text)
        if found == posted:
            # The state is deleted once all senders have dropped the entry: this rank was held up since it looked.
            return NotMet("missed", "the sender's entry went while the receivers were held up")
        if found is not None:
            return receivers_account(found.kind, found.payload)
        self._held[digest] = Sealed(CLAIMED, self._client.seal.writer, text)
        return None

    def settle(self, digest: str, state: str, reason: str | None) -> None:
        """All receivers are done with an entry that this rank has claimed; of any other, nothing happens."""
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


# Words for a side that may never come are kept for so many points, at half a kilobyte of the store each.
_MOST_WORDS = 16384


class Tombstones:
    """Words that this rank has left at meeting places, for whoever comes: `missed`, `gone`.

    Whoever comes removes the word. One that nobody comes for is removed once so many more have been left, so that
    the store does not grow.
    """

    def __init__(self, delete_later: Callable[[Sequence[str]], None]) -> None:
        self._delete_later = delete_later
        self._places: deque[str] = deque()

    def left_at(self, place: str) -> None:
        """Called on any thread."""
        self._places.append(place)
        if len(self._places) > _MOST_WORDS:
            self._delete_later([self._places.popleft()])


def put_tombstone(client: StoreClient, keys: StoreKeys, words: Tombstones, state: str, reason: str) -> None:
    """An entry is no more: say so to receivers that still come. One that waits there already is told by the leader."""
    text = gone_text(state, reason)
    found = client.put_if_absent(keys.first, GONE, text)
    if found is not None and (found.kind != POSTED or client.exchange(keys.first, found, GONE, text) is not None):
        return
    words.left_at(keys.first)
