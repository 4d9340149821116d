"""Places that one process of a host takes: names of the kernel, whose first holder counts."""

from __future__ import annotations

import errno
import hashlib
import socket
import time
from collections import deque

from grafter.errors import ProtocolError
from grafter.rendezvous.connecting import process_at

_PLACES_HELD = 8
_MOST_ASKING = 4096


class HostPlaces:
    """Those of one rank."""

    def __init__(self) -> None:
        self._places: deque[socket.socket] = deque()

    def claim(self, key: str) -> int | None:
        """Take the one place of this name on this host: None if this process has it now, else the pid that has it.

        The kernel decides who is first. A process holds its last places only: a place is asked for in the instant
        between a decision and the letter that tells it.
        """
        name = f"\0grafter-{hashlib.blake2b(key.encode(), digest_size=16).hexdigest()}"
        while True:
            place = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
            try:
                place.bind(name)
                # Nobody accepts: every rank that asks stays in the queue.
                place.listen(_MOST_ASKING)
            except OSError as error:
                place.close()
                if error.errno not in (errno.EADDRINUSE, errno.EINVAL):
                    raise ProtocolError(f"no place can be taken on this host: {error}.") from error
                holder = _holder_of(name)
                if holder is not None:
                    return holder
                time.sleep(0.001)
                continue
            self._places.append(place)
            if len(self._places) > _PLACES_HELD:
                self._places.popleft().close()
            return None

    def close(self) -> None:
        for place in self._places:
            place.close()


def _holder_of(name: str) -> int | None:
    """The pid that has a place; None if it has just given it up."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as question:
        question.settimeout(5)
        try:
            question.connect(name)
        except (ConnectionRefusedError, FileNotFoundError):
            return None
        except OSError as error:
            raise ProtocolError(f"it cannot be asked who has a place on this host: {error}.") from error
        return process_at(question)[0]
