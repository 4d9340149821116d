"""Failed points: one list in the store, which receivers append to and senders read.

A sender has recorded a point as sent, and continued, before the receivers have voted. Every receiver that finds a point
refused reports it to the senders, so that it does not matter which of them is stopped or gone; the first report is
appended.

The list fills the places 0, 1, 2, ... in order, and keeps the last `KEPT` of them: a rank that fills a place deletes
the place that falls out. `failure/last` holds the highest place that is known to be filled; it never decreases. A place
up to that one that is empty was deleted, so senders skip it, and a rank that fills it appends its report again.
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
# How many places are read at one look: at least 256, and at least a quarter of those that are left; two round trips
# each.
_PLACES_PER_LOOK, _PART_PER_LOOK = 256, 4


_Line = TypeVar("_Line")


class SentPoints(Generic[_Line]):
    """The points that one sender has recorded as sent, and those that receivers have reported as failed.

    A receiver may report a failure before the sender has recorded the point. Keeps the last `KEPT` of each.
    """

    def __init__(self) -> None:
        self._sent: OrderedDict[str, _Line] = OrderedDict()
        self._failed: OrderedDict[str, str] = OrderedDict()

    def add(self, digest: str, line: _Line) -> str | None:
        """Remember the ledger line of a point that was sent. Returns why it failed, if that is known already."""
        self._sent[digest] = line
        if len(self._sent) > KEPT:
            self._sent.popitem(last=False)
        return self._failed.pop(digest, None) if self._failed else None

    def take_failed(self, digest: str, reason: str) -> _Line | None:
        """The ledger line of a point that has failed, once; None if this rank has not recorded it yet."""
        line = self._sent.pop(digest, None)
        if line is None:
            self._failed[digest] = reason
            if len(self._failed) > KEPT:
                self._failed.popitem(last=False)
        return line


class FailedPoints:
    """One rank's view of the list. Methods that take a client may be called on any thread, with its own client.

    They raise PeerLostError if the store is lost.
    """

    def __init__(self, run_prefix: str, on_failure: Callable[[str, str], None]) -> None:
        """on_failure: called with the digest and the reason of each failed point, on the thread that reads the list. It
        may be called twice for one point."""
        self._run_prefix, self._on_failure = run_prefix, on_failure
        self._unreported: deque[tuple[str, str]] = deque()
        self._lock = threading.RLock()
        # The next place to fill, and the next one to read.
        self._next_to_fill = self._next_to_read = 0
        # How many places were deleted before they were read.
        self._missed = 0
        self.is_listening = False

    def add(self, digest: str, reason: str) -> None:
        """A point has failed here: `report` will append it. Does not wait for the store."""
        if len(reason) > _LONGEST_REASON:
            reason = f"{reason[:_LONGEST_REASON]}... (the receivers' ledgers have all of it)"
        self._unreported.append((digest, reason))

    def report(self, client: StoreClient) -> None:
        """Append what was added to the list in the store."""
        with self._lock:
            if not self._unreported:
                return
            self._next_to_fill = max(self._next_to_fill, self._find_last(client) - KEPT + 1)
            while self._unreported:
                digest, reason = self._unreported[0]
                place = self._next_to_fill
                found = client.put_if_absent(self._place(place), "failure", json.dumps([digest, reason]))
                self._next_to_fill += 1
                if found is not None:
                    is_reported = json.loads(found.payload)[0] == digest
                else:
                    # Senders may have passed this place already.
                    is_reported = self._raise_last(client, place)
                    if place >= KEPT:
                        client.delete(self._place(place - KEPT))
                if is_reported:
                    self._unreported.popleft()

    def leave(self, client: StoreClient, patience_seconds: float) -> None:
        """Append and read once more, at the end. Waits no longer than `patience_seconds` for the store."""
        if not self._unreported and not self.is_listening:
            return
        if not self._lock.acquire(timeout=patience_seconds):
            # Another thread waits for the store.
            return
        try:
            client.set_timeout(patience_seconds)
            self.report(client)
            self._read(client, KEPT)
        except RunError as error:
            logger.debug("grafter: failed points could not be reported or read: %s", error)
        finally:
            self._lock.release()

    @property
    def has_reported_all(self) -> bool:
        """Whether all points that were added are in the store."""
        return not self._unreported

    def read(self, client: StoreClient) -> None:
        """Read a bounded part of the list. Called about once a second."""
        with self._lock:
            if self._read(client, _PLACES_PER_LOOK) == _PLACES_PER_LOOK:
                self._read(client, (self._find_last(client) - self._next_to_read) // _PART_PER_LOOK)

    def _read(self, client: StoreClient, most: int) -> int:
        """Read up to `most` places; return how many were read."""
        read = 0
        while self.is_listening and read < most:
            sealed = client.peek(self._place(self._next_to_read))
            if sealed is not None:
                read += 1
                digest, reason = json.loads(sealed.payload)
                self._on_failure(digest, str(reason))
                self._next_to_read += 1
                continue
            last = self._find_last(client)
            if last < self._next_to_read:
                break
            if client.peek(self._place(self._next_to_read)) is not None:
                # Filled between the two looks.
                continue
            # This place was deleted. Continue with the next one, or the first one that is kept.
            skipped = max(1, last - KEPT + 1 - self._next_to_read)
            self._next_to_read += skipped
            self._note_missed(skipped)
        return read

    def _note_missed(self, count: int) -> None:
        if not self._missed:
            logger.warning(
                "grafter: this rank cannot learn of some points that failed on their receivers, since they are no "
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
        """Publish that this place is filled; return whether it is the highest one."""
        key = self._place("last")
        while (found := client.put_if_absent(key, "last", str(place))) is not None:
            if int(found.payload) >= place:
                return False
            if client.exchange(key, found, "last", str(place)) is None:
                break
        return True

    def _place(self, number: int | str) -> str:
        return f"{self._run_prefix}/failure/{number}"
