"""How the ranks of one host connect: one socket for each pair, made while both jobs join.

Each rank listens on an abstract Unix socket of a random name, which the roster tells. Once the roster is known, the
rank of the higher graft rank connects to the lower one:

    connector   connect, check who listens, send a hello that names its graft rank
    acceptor    accept, check who connects, read the hello

Each checks the other's pid and uid, as the kernel gives them, against the roster. Any user of the machine can connect
to an abstract socket; a process that is no rank of the run, or a rank that is connected already, is dropped before a
byte of it is read. When all are connected the listening socket is closed, so nothing of a run can be reached by others.
"""

from __future__ import annotations

import contextlib
import logging
import os
import select
import socket
import struct
import time
from collections.abc import Callable
from dataclasses import dataclass

from grafter.core.messages.roster import Roster
from grafter.core.messages.wire import Seal
from grafter.core.process_identity import how_gone, is_stopped
from grafter.errors import PointTimeoutError, ProtocolError

logger = logging.getLogger("grafter")

_CREDENTIALS = struct.Struct("3i")
_BACKLOG = 1024
_CHECK_SECONDS = 0.25
_SHORTEST_RETRY_SECONDS, _LONGEST_RETRY_SECONDS = 0.001, 0.05
_LONGEST_HELLO_BYTES = 4096
# Three of the longest letters.
_SEND_BUFFER_BYTES = 256 << 10
_HELLO = "hello"


@dataclass(frozen=True)
class Listener:
    """Where the other ranks of this host connect. Closed once all have."""

    socket: socket.socket
    name: str

    def close(self) -> None:
        self.socket.close()


def open_listener() -> Listener | None:
    """An abstract socket of a random name; None where the platform has none, or forbids it. The store serves then."""
    if not hasattr(os, "memfd_create") or not hasattr(select, "epoll"):
        return None
    name = f"grafter-{os.urandom(12).hex()}"
    try:
        return Listener(_listen(name), name)
    except OSError as error:
        logger.warning(
            "grafter: this rank cannot open a Unix socket (%s), so it talks to the ranks of its host through the store "
            "and gloo, which is slower.", error,
        )  # fmt: skip
        return None


def _listen(name: str) -> socket.socket:
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    try:
        listener.bind(f"\0{name}")
        listener.listen(_BACKLOG)
        listener.setblocking(False)
    except BaseException:
        listener.close()
        raise
    return listener


def process_at(connection: socket.socket) -> tuple[int, int]:
    """(pid, uid) of the process at the other end, which the kernel recorded when it connected or listened."""
    raw = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size)
    pid, uid, _ = _CREDENTIALS.unpack(raw)
    return pid, uid


def peers_of(graft_rank: int, roster: Roster) -> list[int]:
    """The graft ranks with which this one has a channel: of its host and its user, where both have a socket."""
    everyone = roster.all
    return [
        other
        for other, member in enumerate(everyone)
        if other != graft_rank
        and member.socket_name
        and everyone[graft_rank].socket_name
        and roster.share_memory(graft_rank, other)
    ]


def connect_ranks(
    listener: Listener, roster: Roster, graft_rank: int, seal: Seal, timeout: float, check: Callable[[], None]
) -> dict[int, socket.socket]:
    """A connected socket for each peer that lives, by graft rank. Called once by every rank, which closes its listener.

    check: raises what ended the run; asked four times a second. A peer whose process has ended gets no socket.
    Raises PointTimeoutError, which names the ranks that are missing, after `timeout` seconds.
    """
    connecting = _Connecting(listener, roster, graft_rank, seal)
    try:
        connecting.run(timeout, check)
    except BaseException:
        connecting.close_all()
        raise
    finally:
        connecting.drop_unconfirmed()
        listener.close()
    return connecting.connected


class _Connecting:
    def __init__(self, listener: Listener, roster: Roster, graft_rank: int, seal: Seal) -> None:
        self._listener, self._roster, self._graft_rank, self._seal = listener.socket, roster, graft_rank, seal
        peers = peers_of(graft_rank, roster)
        self._to_connect = {peer for peer in peers if peer < graft_rank}
        self._to_accept = {peer for peer in peers if peer > graft_rank}
        # Accepted from a rank of the run, by descriptor, until its hello has been read.
        self._unconfirmed: dict[int, socket.socket] = {}
        self.connected: dict[int, socket.socket] = {}
        self._retry_seconds = _SHORTEST_RETRY_SECONDS

    def run(self, timeout: float, check: Callable[[], None]) -> None:
        deadline = time.monotonic() + timeout
        next_check = time.monotonic() + _CHECK_SECONDS
        while True:
            for peer in sorted(self._to_connect):
                self._try_to_connect(peer)
            self._accept_all()
            for descriptor in list(self._unconfirmed):
                self._read_hello(descriptor)
            if not self._to_connect and not self._to_accept:
                return
            if time.monotonic() >= next_check:
                check()
                self._pass_over_gone()
                next_check = time.monotonic() + _CHECK_SECONDS
            if time.monotonic() > deadline:
                raise self._too_late(timeout)
            self._sleep()

    def _sleep(self) -> None:
        """Until somebody connects or says hello; not for long while this rank must try again."""
        seconds = _CHECK_SECONDS
        if self._to_connect:
            seconds, self._retry_seconds = self._retry_seconds, min(2 * self._retry_seconds, _LONGEST_RETRY_SECONDS)
        poller = select.poll()
        for descriptor in (self._listener.fileno(), *self._unconfirmed):
            poller.register(descriptor, select.POLLIN)
        poller.poll(seconds * 1000)

    # The connector.

    def _try_to_connect(self, peer: int) -> None:
        """Leaves a peer for the next try where its queue is full, or it no longer listens."""
        connection = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        try:
            connection.setblocking(False)
            connection.connect(f"\0{self._roster.all[peer].socket_name}")
            if not self._is_at(connection, peer):
                # It has ended, and somebody else has taken the name.
                connection.close()
                return
            connection.send(self._seal.seal(_HELLO, _HELLO, str(self._graft_rank)).encode())
        except OSError:
            connection.close()
            return
        except BaseException:
            connection.close()
            raise
        self._to_connect.discard(peer)
        self._keep(peer, connection)

    def _is_at(self, connection: socket.socket, peer: int) -> bool:
        process = self._roster.all[peer].process
        return process_at(connection) == (process.pid, process.uid)

    # The acceptor.

    def _accept_all(self) -> None:
        """Take who has connected, no more at a time than may wait there: a stranger may go on connecting."""
        for _ in range(_BACKLOG):
            try:
                connection, _ = self._listener.accept()
            except BlockingIOError:
                return
            connection.setblocking(False)
            if self._to_accept and any(self._is_at(connection, peer) for peer in self._to_accept):
                self._unconfirmed[connection.fileno()] = connection
            else:
                connection.close()

    def _read_hello(self, descriptor: int) -> None:
        connection = self._unconfirmed[descriptor]
        try:
            hello = connection.recv(_LONGEST_HELLO_BYTES)
        except BlockingIOError:
            return
        except OSError:
            hello = b""
        del self._unconfirmed[descriptor]
        peer = self._rank_in(hello)
        if peer in self._to_accept and self._is_at(connection, peer):
            self._to_accept.discard(peer)
            self._keep(peer, connection)
        else:
            connection.close()

    def _rank_in(self, hello: bytes) -> int:
        """Which graft rank says hello; -1 where nobody does who may."""
        try:
            key, sealed = self._seal.open_letter(hello)
        except ProtocolError:
            return -1
        if key != _HELLO or sealed.kind != _HELLO or not sealed.payload.isdecimal():
            return -1
        peer = int(sealed.payload)
        signed_by_it = peer < len(self._roster.all) and sealed.writer == signature_of(self._roster, peer)
        return peer if signed_by_it else -1

    # The end.

    def _keep(self, peer: int, connection: socket.socket) -> None:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, _SEND_BUFFER_BYTES)
        self.connected[peer] = connection

    def _pass_over_gone(self) -> None:
        """A peer that has ended does not connect; whoever needs it at a point learns there that it is gone."""
        for peers in (self._to_connect, self._to_accept):
            peers -= {peer for peer in peers if how_gone(self._roster.all[peer].process) is not None}

    def _too_late(self, timeout: float) -> PointTimeoutError:
        missing = []
        for peer in sorted(self._to_connect | self._to_accept):
            process = self._roster.all[peer].process
            stopped = ", which is stopped" if is_stopped(process) else ""
            missing.append(f"{self._roster.who(peer)} (pid {process.pid}{stopped})")
        return PointTimeoutError(
            f"{self._roster.who(self._graft_rank)} has joined and waited {timeout:.0f} s for a connection with "
            f"{', '.join(missing)}, on this host, in vain. That rank has joined, too, and its process lives, so it is "
            f"probably stopped or its host overloaded (py-spy dump --pid tells). Raise GRAFTER_TIMEOUT if it only "
            f"needs longer."
        )

    def drop_unconfirmed(self) -> None:
        for connection in self._unconfirmed.values():
            connection.close()

    def close_all(self) -> None:
        for connection in self.connected.values():
            with contextlib.suppress(OSError):
                connection.close()


def signature_of(roster: Roster, graft_rank: int) -> str:
    """As which a rank signs what it writes."""
    member = roster.all[graft_rank]
    return f"{member.role}/{member.role_rank}"
