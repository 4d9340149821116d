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
import time
from collections import deque
from collections.abc import Sequence

from grafter.errors import ProtocolError
from grafter.rendezvous.roster import Roster
from grafter.rendezvous.spinning import Spinning
from grafter.rendezvous.wire import Seal, Sealed
from grafter.watching.watch import PeerGone, Watch

_CREDENTIALS = struct.Struct("3i")
_CREDENTIALS_SPACE = socket.CMSG_SPACE(_CREDENTIALS.size)
# As plain numbers: arithmetic with the enum costs more than the system call.
_TRUNCATED = int(socket.MSG_TRUNC)
_AT_ONCE = int(socket.MSG_DONTWAIT)
_FROM_KERNEL = (int(socket.SOL_SOCKET), int(getattr(socket, "SCM_CREDENTIALS", -1)))
_TIMEVAL = struct.Struct("ll")
_POLL_SECONDS = 0.25
_SHORTLY_SECONDS = 0.01
# Well under the kernel's limit for a datagram; what is larger goes through the store.
LONGEST_MAIL_BYTES = 64 << 10
_LONGEST_LETTER_BYTES = LONGEST_MAIL_BYTES + (8 << 10)
_MOST_UNREAD = 100_000
# More than Linux lets wait in a datagram socket (net.unix.max_dgram_qlen is 512 where it is large).
_LONGEST_QUEUE = 1 << 16
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
    box.setblocking(True)
    return box


class Mailbox:
    """One per rank. Mail is fetched by the dump thread; the housekeeping thread only asks whether there is any."""

    def __init__(self, box: socket.socket, roster: Roster, seal: Seal) -> None:
        self._box, self._roster, self._seal = box, roster, seal
        # By graft rank: a socket that is connected to its mailbox.
        self._to: dict[int, socket.socket] = {}
        # By credentials as the kernel gives them: who signs with them.
        self._signatures: dict[bytes, frozenset[str]] = {}
        self._spinning = Spinning(roster.has_core_each)
        self._poll_seconds = 0.0
        self._places: deque[socket.socket] = deque()
        self._unwanted: deque[str] = deque(maxlen=64)
        # Changed by the dump thread alone; each change is one step, so that the other thread may look at any time.
        self._unread: dict[str, Sealed] = {}

    def send(self, graft_rank: int, key: str, kind: str, payload: str, watch: Watch) -> None:
        """Put a letter into another rank's mailbox. Waits only while that is full. Raises PeerGone if it is closed."""
        letter = self._seal.seal(key, kind, payload).encode()
        try:
            sender = self._to.get(graft_rank) or self._connected_to(graft_rank)
            while True:
                try:
                    sender.send(letter)
                    return
                except BlockingIOError:
                    watch.check()
                    select.select([], [sender], [], _POLL_SECONDS)
        except OSError as error:
            raise PeerGone(graft_rank, f"its mailbox is closed ({error.strerror})") from error

    def _connected_to(self, graft_rank: int) -> socket.socket:
        sender = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        try:
            sender.setblocking(False)
            sender.connect(mailbox_name(self._roster.all[graft_rank].socket_name))
        except OSError:
            sender.close()
            raise
        self._to[graft_rank] = sender
        return sender

    def await_shortly(self, keys: Sequence[str]) -> list[Sealed] | None:
        """The letters for these keys; None where one is still missing after some 10 ms."""
        unread = self._unread
        if self._spinning.is_worthwhile and (until := self._spinning.until()):
            self._spin(keys, until)
        deadline = time.monotonic() + _SHORTLY_SECONDS
        while not all(map(unread.__contains__, keys)):
            # By the clock, whatever has come: letters of a stranger must not keep this rank here.
            if time.monotonic() > deadline:
                return None
            if self._poll_seconds != _SHORTLY_SECONDS:
                self._look_for(_SHORTLY_SECONDS)
            self._fetch()
        return list(map(unread.pop, keys))

    def wait(self, keys: Sequence[str], watch: Watch) -> list[Sealed]:
        """The letters for these keys, once all have come."""
        unread = self._unread
        checked = time.monotonic()
        while not all(map(unread.__contains__, keys)):
            if self._poll_seconds != _POLL_SECONDS:
                self._look_for(_POLL_SECONDS)
            if not self._fetch() or time.monotonic() > checked + _POLL_SECONDS:
                watch.check()
                checked = time.monotonic()
        return [unread.pop(key) for key in keys]

    def _spin(self, keys: Sequence[str], until: float) -> None:
        """Look for these letters again and again."""
        while not all(map(self._unread.__contains__, keys)):
            self._fetch(_AT_ONCE)
            if time.monotonic() > until:
                self._spinning.tell(paid=False)
                return
        self._spinning.tell(paid=True)

    def _look_for(self, seconds: float) -> None:
        """How long one look for a letter waits at most. In the kernel, since `select` would be another call."""
        timeval = _TIMEVAL.pack(int(seconds), int(seconds % 1 * 1e6))
        self._box.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, timeval)
        self._poll_seconds = seconds

    def look(self, key: str) -> Sealed | None:
        """The letter for a key if it is there. What was sent has arrived, so this never waits."""
        self._fetch_all()
        return self._unread.pop(key, None)

    def has(self, key: str) -> bool:
        """Whether the letter for a key has come; it stays where it is."""
        self._fetch_all()
        return key in self._unread

    def _fetch_all(self) -> None:
        """Every letter that was there at the call. No more than a socket can hold: a stranger may go on writing."""
        for _ in range(_LONGEST_QUEUE):
            if not self._fetch(_AT_ONCE):
                return

    def discard(self, key: str) -> None:
        """Throw away a letter that came twice, by two ways."""
        if self._unread.pop(key, None) is None:
            self._unwanted.append(key)

    def has_news(self, keys: Sequence[str]) -> bool:
        """Whether a letter lies there that could end a wait for these keys. May be asked from any thread."""
        # In this order: a letter goes from the socket to the unread ones, and must not slip by in between.
        if select.select([self._box], [], [], 0)[0]:
            return True
        return all(key in self._unread for key in keys)

    def _fetch(self, flags: int = 0) -> bool:
        """Take one letter from the socket; False if there is none."""
        try:
            letter, ancillary, flags, _ = self._box.recvmsg(_LONGEST_LETTER_BYTES, _CREDENTIALS_SPACE, flags)
        except BlockingIOError:
            return False
        credentials = ancillary[0][2] if ancillary and ancillary[0][:2] == _FROM_KERNEL else b""
        signatures = self._signatures.get(credentials) or self._signatures_of(credentials)
        if not signatures or flags & _TRUNCATED:
            # Some other process of this machine found the socket. It is no part of the run.
            return True
        key, sealed = self._seal.open_letter(letter)
        if sealed.writer not in signatures:
            pid = _CREDENTIALS.unpack(credentials[: _CREDENTIALS.size])[0]
            raise ProtocolError(f"pid {pid} signs as {sealed.writer}, which is another process of this run.")
        if sealed.kind == RECALL:
            # Written to the wrong rank; letters of one writer come in order, so it is here.
            self._unread.pop(key, None)
            return True
        if self._unwanted and key in self._unwanted:
            self._unwanted.remove(key)
            return True
        if len(self._unread) >= _MOST_UNREAD:
            raise ProtocolError(
                f"{_MOST_UNREAD} letters wait for points that nobody comes to, the last from {sealed.writer}."
            )
        self._unread[key] = sealed
        return True

    def _signatures_of(self, credentials: bytes) -> frozenset[str]:
        """Whom the process with these credentials may sign as; remembered for the run's own processes."""
        if len(credentials) < _CREDENTIALS.size:
            return frozenset()
        pid, uid, _ = _CREDENTIALS.unpack(credentials[: _CREDENTIALS.size])
        members = self._roster.all if uid == os.getuid() else ()
        signatures = frozenset(f"{m.role}/{m.role_rank}" for m in members if m.process.pid == pid)
        if signatures:
            self._signatures[credentials] = signatures
        return signatures

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
        for sender in self._to.values():
            sender.close()
        self._box.close()


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
