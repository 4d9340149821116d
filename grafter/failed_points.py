"""Failed points: one list in the store, which receivers add to and senders read.

A sender has recorded a point as sent, and gone on, before the receivers have voted. Every receiver that finds a point
refused tells the senders, so that it does not matter which of them is stopped or gone; the first to do so adds it.
"""

from __future__ import annotations

import json
import logging
import threading
from collections import deque
from collections.abc import Callable

from grafter.errors import RunError
from grafter.rendezvous.store import StoreClient

logger = logging.getLogger("grafter")


class FailedPoints:
    """One rank's view of the list."""

    def __init__(self, hall: str, on_failure: Callable[[str, str], None]) -> None:
        """on_failure: called with the digest and the reason of each, on the thread that listens."""
        self._hall, self._on_failure = hall, on_failure
        self._untold: deque[tuple[str, str]] = deque()
        self._lock = threading.Lock()
        # How far this rank has read, to add something and to hear of something.
        self._told = self._heard = 0
        self.is_listening = False

    def add(self, digest: str, reason: str) -> None:
        """A point has failed here. Does not wait for the store, which may not answer; `tell` does."""
        self._untold.append((digest, reason))

    def tell(self, client: StoreClient) -> None:
        """Put into the store what was added. May be called on any thread. Raises PeerLostError if the store is lost."""
        with self._lock:
            while self._untold:
                digest, reason = self._untold[0]
                found = client.put_if_absent(self._place(self._told), "failure", json.dumps([digest, reason]))
                self._told += 1
                if found is None or json.loads(found.payload)[0] == digest:
                    self._untold.popleft()

    def tell_before_leaving(self, client: StoreClient, patience_seconds: float) -> None:
        """What was not told yet. Does not wait long for a store that does not answer."""
        if self._untold:
            client.set_timeout(patience_seconds)
            try:
                self.tell(client)
            except RunError as error:
                logger.debug("grafter: the senders could not be told of failed points: %s", error)

    @property
    def has_told_all(self) -> bool:
        return not self._untold

    def hear(self, client: StoreClient) -> None:
        """Called about once a second."""
        while self.is_listening and (sealed := client.peek(self._place(self._heard))) is not None:
            self._heard += 1
            digest, reason = json.loads(sealed.payload)
            self._on_failure(digest, str(reason))

    def _place(self, number: int) -> str:
        return f"{self._hall}/failure/{number}"
