"""Failed points: one list in the store, which receivers add to and senders read.

A sender has recorded a point as sent, and gone on, before the receivers have voted. Every receiver that finds a point
refused tells the senders, so that it does not matter which of them is stopped or gone; the first to do so adds it.

The list fills the places 0, 1, 2, ... in their order, and keeps the last `KEPT` of them: whoever fills another one
deletes the one that falls out. `failure/last` holds the highest place that is known to be filled, and never a lower one
than before. A place that is empty although it is not behind that one was deleted, so senders skip it, and whoever puts
something there puts it at the end as well.
"""

from __future__ import annotations

import json
import logging
import threading
from collections import OrderedDict, deque
from collections.abc import Callable
from typing import Generic, TypeVar

from grafter.errors import RunError
from grafter.wire.store_client import StoreClient

logger = logging.getLogger("grafter")

# Senders look about once a second.
KEPT = 4096
_LONGEST_REASON = 2000
# So many places at one look, or this part of those that are left; two round trips each.
_PLACES_PER_LOOK, _PART_PER_LOOK = 256, 4


_Line = TypeVar("_Line")


class SentPoints(Generic[_Line]):
    """What one sender has recorded as sent, and what it was told had failed, whichever of the two came first.

    A receiver may tell of a failure before the sender has come to record the point. Keeps the last `KEPT` of each.
    """

    def __init__(self) -> None:
        self._sent: OrderedDict[str, _Line] = OrderedDict()
        self._failed: OrderedDict[str, str] = OrderedDict()

    def add(self, digest: str, line: _Line) -> str | None:
        """Remember the ledger line of a point that was sent. Returns why it failed, where that is known already."""
        self._sent[digest] = line
        if len(self._sent) > KEPT:
            self._sent.popitem(last=False)
        return self._failed.pop(digest, None) if self._failed else None

    def take_failed(self, digest: str, reason: str) -> _Line | None:
        """The ledger line of a point that has failed, once; None where this rank has not recorded it."""
        line = self._sent.pop(digest, None)
        if line is None:
            self._failed[digest] = reason
            if len(self._failed) > KEPT:
                self._failed.popitem(last=False)
        return line


class FailedPoints:
    """One rank's view of the list."""

    def __init__(self, run_prefix: str, on_failure: Callable[[str, str], None]) -> None:
        """on_failure: called with the digest and the reason of each, on the thread that listens; now and then twice."""
        self._run_prefix, self._on_failure = run_prefix, on_failure
        self._untold: deque[tuple[str, str]] = deque()
        self._lock = threading.RLock()
        # How far this rank has read, to add something and to hear of something.
        self._told = self._heard = 0
        # How many places were empty, though they had been filled.
        self._missed = 0
        self.is_listening = False

    def add(self, digest: str, reason: str) -> None:
        """A point has failed here. Does not wait for the store, which may not answer; `tell` does."""
        if len(reason) > _LONGEST_REASON:
            reason = f"{reason[:_LONGEST_REASON]}... (the receivers' ledgers have all of it)"
        self._untold.append((digest, reason))

    def tell(self, client: StoreClient) -> None:
        """Put into the store what was added. May be called on any thread. Raises PeerLostError if the store is lost."""
        with self._lock:
            if not self._untold:
                return
            self._told = max(self._told, self._find_last(client) - KEPT + 1)
            while self._untold:
                digest, reason = self._untold[0]
                place = self._told
                found = client.put_if_absent(self._place(place), "failure", json.dumps([digest, reason]))
                self._told += 1
                if found is not None:
                    is_told = json.loads(found.payload)[0] == digest
                else:
                    # Behind it senders may have been already.
                    is_told = self._raise_last(client, place)
                    if place >= KEPT:
                        client.delete(self._place(place - KEPT))
                if is_told:
                    self._untold.popleft()

    def leave(self, client: StoreClient, patience_seconds: float) -> None:
        """Tell and hear once more. Does not wait long for a store that does not answer."""
        if not self._untold and not self.is_listening:
            return
        if not self._lock.acquire(timeout=patience_seconds):
            # The other thread waits for the store.
            return
        try:
            client.set_timeout(patience_seconds)
            self.tell(client)
            self._hear(client, KEPT)
        except RunError as error:
            logger.debug("grafter: failed points could not be told, or heard of: %s", error)
        finally:
            self._lock.release()

    @property
    def has_told_all(self) -> bool:
        return not self._untold

    def hear(self, client: StoreClient) -> None:
        """Called about once a second, and at the end on another thread. Reads a bounded part of what is there."""
        with self._lock:
            if self._hear(client, _PLACES_PER_LOOK) == _PLACES_PER_LOOK:
                self._hear(client, (self._find_last(client) - self._heard) // _PART_PER_LOOK)

    def _hear(self, client: StoreClient, most: int) -> int:
        """Returns how many were read."""
        read = 0
        while self.is_listening and read < most:
            sealed = client.peek(self._place(self._heard))
            if sealed is not None:
                read += 1
                digest, reason = json.loads(sealed.payload)
                self._on_failure(digest, str(reason))
                self._heard += 1
                continue
            last = self._find_last(client)
            if last < self._heard:
                break
            if client.peek(self._place(self._heard)) is not None:
                # Filled between the two looks.
                continue
            # It was there. The next place, or the first one that is kept.
            skipped = max(1, last - KEPT + 1 - self._heard)
            self._heard += skipped
            self._note_missed(skipped)
        return read

    def _note_missed(self, count: int) -> None:
        if not self._missed:
            logger.warning(
                "grafter: this rank cannot hear of some points that failed on their receivers, since they are no "
                "longer in the store: more than %d failed before it looked, or another program has deleted them. Its "
                "ledger has them as sent; the receivers' ledgers say that they failed.",
                KEPT,
            )
        self._missed += count

    def _find_last(self, client: StoreClient) -> int:
        """The highest place that is known to be filled; -1 if none is."""
        last = client.peek(self._place("last"))
        return -1 if last is None else int(last.payload)

    def _raise_last(self, client: StoreClient, place: int) -> bool:
        """This place is filled. Whether it is behind all that were known to be."""
        key = self._place("last")
        while (found := client.put_if_absent(key, "last", str(place))) is not None:
            if int(found.payload) >= place:
                return False
            if client.exchange(key, found, "last", str(place)) is None:
                break
        return True

    def _place(self, number: int | str) -> str:
        return f"{self._run_prefix}/failure/{number}"
