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
from grafter.wire.store_client import StoreClient

logger = logging.getLogger("grafter")


class FailedPoints:
    """One rank's view of the list."""

    def __init__(self, run_prefix: str, on_failure: Callable[[str, str], None]) -> None:
        """on_failure: called with the digest and the reason of each, on the thread that listens."""
        self._run_prefix, self._on_failure = run_prefix, on_failure
        self._untold: deque[tuple[str, str]] = deque()
        self._lock = threading.RLock()
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
            self.hear(client)
        except RunError as error:
            logger.debug("grafter: failed points could not be told, or heard of: %s", error)
        finally:
            self._lock.release()

    @property
    def has_told_all(self) -> bool:
        return not self._untold

    def hear(self, client: StoreClient) -> None:
        """Called about once a second, and at the end on another thread."""
        with self._lock:
            while self.is_listening and (sealed := client.peek(self._place(self._heard))) is not None:
                self._heard += 1
                digest, reason = json.loads(sealed.payload)
                self._on_failure(digest, str(reason))

    def _place(self, number: int) -> str:
        return f"{self._run_prefix}/failure/{number}"
