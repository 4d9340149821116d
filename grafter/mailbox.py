"""Mail between ranks of one host: sealed text over abstract Unix datagram sockets, 20 us where the store takes 110.

The kernel says who wrote each message (SCM_CREDENTIALS), so a stranger's is dropped. A datagram that was sent has
arrived: there is nothing on its way that the receiver's housekeeping thread could not see.
"""

from __future__ import annotations

import errno
import hashlib
import os
import select
import socket
import struct
import threading
import time
from collections import deque
from collections.abc import Sequence

from grafter.errors import ProtocolError
from grafter.roster import Roster
from grafter.watch import PeerGone, Watch
from grafter.wire import Seal, Sealed

_CREDENTIALS = struct.Struct("3i")
_CREDENTIALS_SPACE = socket.CMSG_SPACE(_CREDENTIALS.size)
# As plain numbers: arithmetic with the enum costs more than the system call.
_TRUNCATED = int(socket.MSG_TRUNC)
_POLL_SECONDS = 0.25
# Well under the kernel's limit for a datagram; what is larger goes through the store.
LONGEST_MAIL_BYTES = 64 << 10
_MOST_UNREAD = 100_000
RECALL = "recall"
_PLACES_HELD = 8
_MOST_ASKING = 4096


def mailbox_name(socket_name: str) -> str:
    return f"\0{socket_name}.mail"


def open_mailbox(socket_name: str) -> socket.socket:
    """The socket that others write to; made before joining, so that its name can be announced."""
    box = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
    box.setsockopt(socket.SOL_SOCKET, socket.SO_PASSCRED, 1)
    box.bind(mailbox_name(socket_name))
    box.setblocking(False)
    return box


class Mailbox:
    """One per rank. Mail is fetched by the dump thread; the housekeeping thread only asks whether there is any."""

    def __init__(self, box: socket.socket, roster: Roster, seal: Seal) -> None:
        self._box, self._roster, self._seal = box, roster, seal
        self._sender = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self._sender.setblocking(False)
        self._writers = {
            f"{member.role}/{member.role_rank}": (member.process.pid, member.process.uid) for member in roster.all
        }
        self._pids = {pid for pid, _ in self._writers.values()}
        self._spin_seconds = roster.spin_seconds
        self._places: deque[socket.socket] = deque()
        self._unwanted: deque[str] = deque(maxlen=64)
        self._unread: dict[str, Sealed] = {}
        self._lock = threading.Lock()

    def send(self, graft_rank: int, key: str, kind: str, payload: str, watch: Watch) -> None:
        """Put a letter into another rank's mailbox. Waits only while that is full. Raises PeerGone if it is closed."""
        place = mailbox_name(self._roster.all[graft_rank].socket_name)
        letter = self._seal.seal(key, kind, payload).encode()
        while True:
            try:
                self._sender.sendto(letter, place)
                return
            except BlockingIOError:
                watch.check()
                # A full mailbox of another process cannot be selected on.
                select.select([], [], [], 0.001)
            except OSError as error:
                raise PeerGone(graft_rank, f"its mailbox is closed ({error.strerror})") from error

    def wait(self, keys: Sequence[str], watch: Watch, patience: float | None = None) -> list[Sealed] | None:
        """The letters for these keys, once all have come; None if they have not within `patience` seconds."""
        start = time.monotonic()
        deadline = None if patience is None else start + patience
        spin_until = start + self._spin_seconds
        while True:
            with self._lock:
                if all(key in self._unread for key in keys):
                    return [self._unread.pop(key) for key in keys]
            if self._fetch() or time.monotonic() < spin_until:
                continue
            watch.check()
            if deadline is None:
                select.select([self._box], [], [], _POLL_SECONDS)
            elif not select.select([self._box], [], [], max(0.0, deadline - time.monotonic()))[0]:
                return None

    def look(self, key: str) -> Sealed | None:
        """The letter for a key if it is there. What was sent has arrived, so this never waits."""
        while self._fetch():
            pass
        with self._lock:
            return self._unread.pop(key, None)

    def discard(self, key: str) -> None:
        """Throw away a letter that came twice, by two ways."""
        with self._lock:
            if self._unread.pop(key, None) is None:
                self._unwanted.append(key)

    def has_news(self, keys: Sequence[str]) -> bool:
        """Whether a letter lies there that could end a wait for these keys. May be asked from any thread."""
        with self._lock:
            if all(key in self._unread for key in keys):
                return True
        return bool(select.select([self._box], [], [], 0)[0])

    def _fetch(self) -> bool:
        """Take one letter from the socket; False if there is none."""
        try:
            letter, ancillary, flags, _ = self._box.recvmsg(4 * LONGEST_MAIL_BYTES, _CREDENTIALS_SPACE)
        except BlockingIOError:
            return False
        pid = uid = -1
        for level, kind, data in ancillary:
            if level == socket.SOL_SOCKET and kind == socket.SCM_CREDENTIALS:
                pid, uid, _ = _CREDENTIALS.unpack(data[: _CREDENTIALS.size])
        if uid != os.getuid() or flags & _TRUNCATED or pid not in self._pids:
            # Some other process of this machine found the socket. It is no part of the run.
            return True
        key, sealed = self._seal.open_letter(letter)
        if self._writers.get(sealed.writer, (None, None))[0] != pid:
            raise ProtocolError(f"pid {pid} signs as {sealed.writer}, which is another process of this run.")
        with self._lock:
            if sealed.kind == RECALL:
                # Written to the wrong rank; letters of one writer come in order, so it is here.
                self._unread.pop(key, None)
                return True
            if key in self._unwanted:
                self._unwanted.remove(key)
                return True
            if len(self._unread) >= _MOST_UNREAD:
                raise ProtocolError(
                    f"{_MOST_UNREAD} letters wait for points that nobody comes to, the last from {sealed.writer}."
                )
            self._unread[key] = sealed
        return True

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
        self._box.close()
        self._sender.close()


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
        credentials = question.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size)
    return int(_CREDENTIALS.unpack(credentials)[0])
