"""What an entry has in the store: its state, who has drained it, and the words at its meeting place."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence

from grafter.core.messages.manifest import StoreKeys
from grafter.core.messages.states import GONE, POSTED, gone_text
from grafter.wire.store_client import StoreClient

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
