"""Messages that have arrived over channels and are not used yet: bounded in number, in bytes and in descriptors."""

from __future__ import annotations

import os

from grafter.core.messages.wire import Sealed
from grafter.errors import ProtocolError

# The kind of a message that withdraws an earlier one under its key.
RECALL = "recall"
_MOST_MESSAGES = 100_000
_MOST_BYTES = 256 << 20
# Of one writer, which sends its block again, under the same key, only when it has a larger one.
_MOST_DESCRIPTORS = 4
_MOST_UNWANTED = 4096
_LONG_MESSAGE_BYTES = 8 << 10


class UnreadMessages:
    """The unread messages of one rank, by key. Only its dump thread changes them, each time in one step, so that
    another thread may read them."""

    def __init__(self, who: str) -> None:
        self._who = who
        self.by_key: dict[str, Sealed] = {}
        # Keys whose messages are dropped when they arrive.
        self._unwanted: dict[str, None] = {}

    def put(self, key: str, sealed: Sealed, nbytes: int) -> None:
        """Add a message that has arrived; it replaces an earlier one under its key.

        nbytes: the length of the sealed message. Raises ProtocolError if there are more than a run can have.
        """
        by_key = self.by_key
        if (
            nbytes <= _LONG_MESSAGE_BYTES and key not in by_key and not self._unwanted and sealed.kind != RECALL
            and sealed.descriptor is None and len(by_key) < _MOST_MESSAGES
        ):  # fmt: skip
            # Nearly all messages.
            by_key[key] = sealed
            return
        if sealed.kind == RECALL:
            # It was sent to the wrong rank. The messages of one writer arrive in order, so it is here.
            _close_descriptor(sealed)
            if (recalled := by_key.pop(key, None)) is not None:
                _close_descriptor(recalled)
            return
        if self._unwanted and key in self._unwanted:
            del self._unwanted[key]
            _close_descriptor(sealed)
            return
        if nbytes > _LONG_MESSAGE_BYTES or sealed.descriptor is not None or len(by_key) >= _MOST_MESSAGES:
            self._check_room(sealed)
        earlier = by_key.get(key)
        by_key[key] = sealed
        if earlier is not None:
            _close_descriptor(earlier)

    def _check_room(self, sealed: Sealed) -> None:
        waiting = self.by_key.values()
        nbytes = sum(len(message.payload) for message in waiting)
        # Each of many receivers may have sent its block to one sender.
        descriptors = sum(message.descriptor is not None and message.writer == sealed.writer for message in waiting)
        if len(waiting) < _MOST_MESSAGES and nbytes <= _MOST_BYTES and descriptors < _MOST_DESCRIPTORS:
            return
        _close_descriptor(sealed)
        raise ProtocolError(
            f"{len(waiting)} messages ({nbytes >> 20} MiB) wait at {self._who} for points that it does not reach, "
            f"the last from {sealed.writer}, which has sent {descriptors} file descriptors with its own."
        )

    def discard(self, key: str) -> None:
        """Drop the message for this key, now or when it arrives."""
        message = self.by_key.pop(key, None)
        if message is not None:
            _close_descriptor(message)
            return
        self._unwanted[key] = None
        if len(self._unwanted) > _MOST_UNWANTED:
            del self._unwanted[next(iter(self._unwanted))]

    def close(self) -> None:
        """Drop all messages, and close their descriptors."""
        for message in self.by_key.values():
            _close_descriptor(message)
        self.by_key.clear()


def _close_descriptor(message: Sealed) -> None:
    if message.descriptor is not None:
        os.close(message.descriptor)
