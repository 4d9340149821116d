"""Channels: how ranks of one host exchange messages. Each pair of ranks has a connected Unix socket.

A message is sealed text under a key (`grafter.core.messages.wire`). The messages of one sender arrive in their order. A
message that was sent has arrived: the receiver's monitor thread can see it. It takes 20 us; the store takes 110. A
closed channel means that the rank at the other end has left or died.

A message may carry a file descriptor, as those of the blocks of shared memory do.
"""

from __future__ import annotations

import array
import contextlib
import errno
import os
import select
import socket
import struct
import time
from collections import deque
from collections.abc import Mapping, Sequence

from grafter.core.messages.roster import Roster
from grafter.core.messages.wire import Seal, Sealed
from grafter.core.processes import PeerGone, Watch, is_from_signal_handler
from grafter.errors import ProtocolError
from grafter.wire.rendezvous.connecting import signature_of
from grafter.wire.rendezvous.spinning import Spinning
from grafter.wire.rendezvous.unread_messages import UnreadMessages

# As plain numbers: arithmetic with the enum costs more than the system call.
_TRUNCATED = int(socket.MSG_TRUNC) | int(socket.MSG_CTRUNC)
_SEND_FLAGS = int(socket.MSG_DONTWAIT) | int(getattr(socket, "MSG_NOSIGNAL", 0))
_DESCRIPTOR_BYTES = array.array("i").itemsize
_POLL_SECONDS = 0.25
_SHORTLY_SECONDS = 0.01
# Well under the kernel's limit for a message; longer texts go through the store.
LONGEST_MESSAGE_BYTES = 64 << 10
_LONGEST_SEALED_BYTES = LONGEST_MESSAGE_BYTES + (8 << 10)
# Of recvmsg: the message, room for two descriptors (one is legal), flags.
_CLOSE_ON_EXEC = int(getattr(socket, "MSG_CMSG_CLOEXEC", 0))
_RECEIVE_SHORTLY = ((_LONGEST_SEALED_BYTES,), (socket.CMSG_SPACE(2 * _DESCRIPTOR_BYTES),), (_CLOSE_ON_EXEC,))
_RECEIVE = (*_RECEIVE_SHORTLY[:2], (int(socket.MSG_DONTWAIT) | _CLOSE_ON_EXEC,))
_TIMEVAL = struct.Struct("ll")
_READY_AT_ONCE = 16
_LONGEST_QUEUE = 1 << 16
# The kernel is short of memory, or too many descriptors are in flight: try again.
_SHORTAGES = (errno.ENOBUFS, errno.ENOMEM, errno.ETOOMANYREFS)

_Arrival = tuple[bytes, list[tuple[int, int, bytes]], int, object]


class _Channel:
    """The connection with one rank, and what was taken from it and is not read yet."""

    __slots__ = ("arrived", "connection", "descriptor", "graft_rank", "is_closed", "receive", "writer")

    def __init__(self, graft_rank: int, writer: str, connection: socket.socket) -> None:
        self.graft_rank, self.writer, self.connection = graft_rank, writer, connection
        self.descriptor, self.receive = connection.fileno(), connection.recvmsg
        # Taken from the socket, but not read yet.
        self.arrived: deque[_Arrival] = deque()
        self.is_closed = False


class Channels:
    """The channels of one rank. Its dump thread sends and receives; its monitor thread only calls `has_news`."""

    def __init__(self, graft_rank: int, roster: Roster, seal: Seal, connections: Mapping[int, socket.socket]) -> None:
        """connections: connected sockets by graft rank, which are closed with this object."""
        self._who, self._roster, self._seal = roster.who(graft_rank), roster, seal
        self._channels = {
            peer: _Channel(peer, signature_of(roster, peer), connection) for peer, connection in connections.items()
        }
        self._only = next(iter(self._channels.values())) if len(connections) == 1 else None
        self._by_descriptor = {channel.descriptor: channel for channel in self._channels.values()}
        self._ready = select.epoll()
        for descriptor, channel in self._by_descriptor.items():
            # All calls are non-blocking, except those with `_RECEIVE_SHORTLY`, which wait in the kernel.
            channel.connection.setblocking(True)
            timeval = _TIMEVAL.pack(0, int(_SHORTLY_SECONDS * 1e6))
            channel.connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, timeval)
            self._ready.register(descriptor, select.EPOLLIN)
        self._spinning = Spinning(roster.has_core_each)
        self._messages = UnreadMessages(self._who)
        self._unread = self._messages.by_key
        # Set while a message may be neither in its socket nor among the unread messages.
        self._is_reading = False
        self._process_id = os.getpid()

    # Sending.

    def send(
        self, graft_rank: int, key: str, kind: str, payload: str, watch: Watch, descriptor: int | None = None
    ) -> None:
        """Send a message, with a copy of a file descriptor if one is given.

        Waits only while the channel is full, and reads what arrives meanwhile. Raises PeerGone if the channel is
        closed, and what `watch` raises."""
        while not self.try_to_send(graft_rank, key, kind, payload, descriptor):
            self._await_room(self._channels[graft_rank], watch)

    def try_to_send(self, graft_rank: int, key: str, kind: str, payload: str, descriptor: int | None = None) -> bool:
        """Send a message if the channel has room; returns whether it had. Never waits. Raises PeerGone as `send`."""
        channel = self._channels.get(graft_rank)
        if channel is None or channel.is_closed:
            raise PeerGone(graft_rank, "its channel is closed")
        message = self._seal.seal(key, kind, payload).encode()
        try:
            if descriptor is None:
                channel.connection.send(message, _SEND_FLAGS)
            else:
                rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", [descriptor]))]
                channel.connection.sendmsg([message], rights, _SEND_FLAGS)
        except OSError as error:
            _raise_unless_full(error, graft_rank)
            return False
        return True

    def _await_room(self, channel: _Channel, watch: Watch) -> None:
        """Wait until the channel may have room, or a message has arrived: the peer may wait for room at this end."""
        watch.check()
        poller = select.poll()
        poller.register(channel.descriptor, select.POLLOUT)
        poller.register(self._ready.fileno(), select.POLLIN)
        if not poller.poll(_POLL_SECONDS * 1000):
            return
        self._fetch_all()
        if channel.is_closed:
            raise PeerGone(channel.graft_rank, "its channel is closed")

    # Receiving.

    def await_shortly(self, keys: Sequence[str], writers: Sequence[int] = ()) -> list[Sealed] | None:
        """The messages for these keys; None if one has not arrived within about 10 ms.

        writers: the graft rank that writes each, if that is known: those channels are read first.
        """
        unread = self._unread
        if self._spinning.is_worthwhile:
            self.spin(self._spinning, keys)
        deadline = 0.0
        while not all(map(unread.__contains__, keys)):
            # By the clock, even if something has arrived: messages for other points must not keep this rank here.
            now = time.monotonic()
            if not deadline:
                deadline = now + _SHORTLY_SECONDS
            elif now >= deadline:
                return None
            if self._only is not None and not self._only.is_closed:
                self._take(self._only, _RECEIVE_SHORTLY)
            elif not writers or not self._fetch_missing(keys, writers):
                self._fetch(deadline - now)
        return list(map(unread.pop, keys))

    def _fetch_missing(self, keys: Sequence[str], writers: Sequence[int]) -> bool:
        """Take a message from the first rank whose message is missing; False if it has none within about 10 ms."""
        for key, writer in zip(keys, writers, strict=True):
            if key not in self._unread:
                channel = self._channels.get(writer)
                if channel is None or channel.is_closed:
                    return False
                return self._take(channel, _RECEIVE_SHORTLY)
        return True

    def wait(self, keys: Sequence[str], watch: Watch, writers: Sequence[int] = ()) -> list[Sealed]:
        """Wait for the messages for these keys.

        writers: for each key, the graft rank that writes it. Raises PeerGone once one of them has closed its channel
        without having written, and what `watch` raises.
        """
        unread = self._unread
        if writers:
            # Most messages arrive at once.
            self._fetch_missing(keys, writers)
        checked = time.monotonic()
        while not all(map(unread.__contains__, keys)):
            for key, writer in zip(keys, writers, strict=False):
                if key not in unread:
                    self.check_open(writer)
            if not self._fetch(_POLL_SECONDS) or time.monotonic() > checked + _POLL_SECONDS:
                watch.check()
                checked = time.monotonic()
        return list(map(unread.pop, keys))

    def wait_for_any(self, keys: Sequence[str], watch: Watch, writer: int | None = None) -> tuple[str, Sealed]:
        """Wait for the first of these messages; returns (its key, the message). writer: of all, if it is one rank.

        Raises PeerGone once the writer has closed its channel, and what `watch` raises.
        """
        while True:
            for key in keys:
                if key in self._unread:
                    return key, self._unread.pop(key)
            if writer is not None:
                self.check_open(writer)
            if not self._fetch(_POLL_SECONDS):
                watch.check()

    def spin(self, spinning: Spinning, keys: Sequence[str]) -> None:
        """Poll for these messages without sleeping, for as long as `spinning` says."""
        if not (until := spinning.until()):
            return
        while not all(map(self._unread.__contains__, keys)):
            if not self._fetch(0) and time.monotonic() > until:
                spinning.record(paid=False)
                return
        spinning.record(paid=True)

    def look(self, key: str) -> Sealed | None:
        """The message for a key, or None. What was sent has arrived, so this never waits."""
        self._fetch_all()
        return self._unread.pop(key, None)

    def has(self, key: str) -> bool:
        """Whether the message for a key has arrived; it stays unread."""
        self._fetch_all()
        return key in self._unread

    def discard(self, key: str) -> None:
        """Drop the message for this key, now or when it arrives."""
        self._messages.discard(key)

    def has_news(self, keys: Sequence[str]) -> bool:
        """Whether a message has arrived that could end a wait for these keys. Called on any thread."""
        poller = select.poll()
        for channel in self._channels.values():
            if not channel.is_closed:
                poller.register(channel.descriptor, select.POLLIN)
        # In this order: a message moves from its socket to the unread ones, and must not be missed in between.
        if poller.poll(0) or self._is_reading:
            return True
        return all(key in self._unread for key in keys)

    def check_open(self, graft_rank: int) -> None:
        """Raises PeerGone if the channel with a rank is known to be closed."""
        channel = self._channels.get(graft_rank)
        if channel is None or channel.is_closed:
            raise PeerGone(graft_rank, "it closed its channel")

    def look_at(self, graft_rank: int) -> None:
        """Read all that has arrived; raises PeerGone if the channel with this rank is closed. Never waits."""
        self._fetch_all()
        self.check_open(graft_rank)

    def _fetch_all(self) -> None:
        """Read every message that has arrived."""
        for _ in range(_LONGEST_QUEUE):
            if not self._fetch(0):
                return

    def _fetch(self, seconds: float) -> bool:
        """Take a message from each channel that has one; False if none has one within this time."""
        if self._is_reading:
            self._complete_read()
        ready = self._ready.poll(seconds, _READY_AT_ONCE)
        for descriptor, _ in ready:
            self._take(self._by_descriptor[descriptor], _RECEIVE)
        return bool(ready)

    def _take(self, channel: _Channel, how: tuple[tuple[int], tuple[int], tuple[int]]) -> bool:
        """Take a message from this channel, whether there was one. By one call into `arrived`, so that no signal's
        handler can lose it in between."""
        if self._is_reading:
            self._complete_read()
        self._is_reading = True
        try:
            channel.arrived.extend(map(channel.receive, *how))
        except (BlockingIOError, ConnectionResetError) as error:
            # Reset: the peer has left without having read all messages. What it sent before can still be read.
            if is_from_signal_handler(error):
                raise
            self._is_reading = False
            return False
        self._read(channel)
        self._is_reading = False
        return True

    def _complete_read(self) -> None:
        """Complete a read that the exception of a signal handler has interrupted."""
        for channel in self._channels.values():
            self._read(channel)
        self._is_reading = False

    def _read(self, channel: _Channel) -> None:
        """Move what was taken from a channel to the unread messages."""
        arrived = channel.arrived
        while arrived:
            message, ancillary, flags, _ = arrived[0]
            if not message:
                channel.is_closed = True
                self._ready.unregister(channel.descriptor)
                arrived.clear()
                return
            if ancillary or flags & _TRUNCATED:
                self._read_with_descriptor(channel)
                continue
            try:
                key, sealed = self._seal.unseal(message)
                if sealed.writer != channel.writer:
                    self._refuse_signature(channel, sealed)
                self._messages.put(key, sealed, len(message))
            except ProtocolError:
                arrived.popleft()
                raise
            arrived.popleft()

    def _refuse_signature(self, channel: _Channel, sealed: Sealed) -> None:
        raise ProtocolError(
            f"{self._roster.who(channel.graft_rank)} signs a message to {self._who} as {sealed.writer}."
        )

    def _read_with_descriptor(self, channel: _Channel) -> None:
        """Read the next message, which carries a descriptor, or is not valid. Closes all other descriptors."""
        message, ancillary, flags, _ = channel.arrived.popleft()
        descriptors = array.array("i")
        for level, kind, content in ancillary:
            if (level, kind) == (socket.SOL_SOCKET, socket.SCM_RIGHTS):
                descriptors.frombytes(content[: len(content) // _DESCRIPTOR_BYTES * _DESCRIPTOR_BYTES])
        try:
            if flags & _TRUNCATED or len(descriptors) > 1:
                raise ProtocolError(
                    f"{self._roster.who(channel.graft_rank)} sent a message to {self._who} that is too long, or more "
                    f"file descriptors than this process can take (see ulimit -n)."
                )
            key, sealed = self._seal.unseal(message)
            if sealed.writer != channel.writer:
                self._refuse_signature(channel, sealed)
            descriptor = descriptors.pop() if descriptors else None
            self._messages.put(key, sealed._replace(descriptor=descriptor), len(message))
        finally:
            for descriptor in descriptors:
                os.close(descriptor)

    def close(self) -> None:
        """Close all channels: the peers read what was sent before, and then that the channel is closed."""
        for channel in self._channels.values():
            if os.getpid() == self._process_id:
                # A forked child has the same sockets, which would keep the channel open.
                with contextlib.suppress(OSError):
                    channel.connection.shutdown(socket.SHUT_RDWR)
            channel.connection.close()
            channel.is_closed = True
        self._messages.close()
        self._ready.close()


def _raise_unless_full(error: OSError, graft_rank: int) -> None:
    """Raise the error of a send, unless another try may succeed."""
    if is_from_signal_handler(error):
        raise error
    if error.errno in _SHORTAGES:
        time.sleep(0.001)
    elif not isinstance(error, BlockingIOError):
        raise PeerGone(graft_rank, f"its channel is closed ({error.strerror or error})") from error
