"""Shared memory, for ranks of one host and one user: the sender writes straight to the piece's place in the
receiver's staging memory.

The memory is a memfd, passed over an abstract Unix socket with SCM_RIGHTS. The socket also orders the memory accesses,
and a closed socket is a dead peer. Nothing has a name in a file system, so nothing stays after SIGKILL.

    receiver -> sender   B generation bytes (+ descriptor)   once per block; a sender that has it writes at once
    receiver -> sender   R digest reason                     it has no memory for this point
    sender -> receiver   H graft rank                        first message on a connection
    sender -> receiver   D digest                            all my pieces of this point are in place
    sender -> receiver   F digest reason                     I will not: you or another receiver refused, or I cannot
"""

from __future__ import annotations

import array
import contextlib
import mmap
import os
import select
import socket
import struct
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import ClassVar

import torch

from grafter.copying import copy
from grafter.errors import GrafterError, ProtocolError
from grafter.exchange import Exchange, Incoming, Outgoing
from grafter.exchange.staging import Staging, as_tensor, is_sealed_block, view_bytes
from grafter.exchange.transfer_plan import Piece, TransferPlan
from grafter.leaves import TensorSpec
from grafter.rendezvous.roster import Roster
from grafter.rendezvous.spinning import Spinning
from grafter.watching.watch import Abandoned, PeerGone, Watch

_POLL_SECONDS = 0.25
_LONGEST_MESSAGE = 4096
_LONGEST_REASON = 2000
_CLOSE_ON_EXEC = int(getattr(socket, "MSG_CMSG_CLOEXEC", 0))
_AT_ONCE = int(getattr(socket, "MSG_DONTWAIT", 0))
_NO_SIGNAL = int(getattr(socket, "MSG_NOSIGNAL", 0))
_TIMEVAL = struct.Struct("ll")
_LONGEST_SEND_SECONDS = 30
_MOST_PLACES = 1024
_DIGEST_BYTES = 12
_CREDENTIALS = struct.Struct("3i")
_BLOCK = struct.Struct("<QQ")


def open_listener() -> tuple[socket.socket, str] | None:
    """(socket, name) of a listening abstract socket of a random name; None where the platform has none."""
    if not hasattr(os, "memfd_create"):
        return None
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    name = f"grafter-{os.urandom(12).hex()}"
    listener.bind(f"\0{name}")
    listener.listen(1024)
    listener.setblocking(False)
    return listener, name


@dataclass
class _Sending:
    """A connection to a receiver, and its block as mapped here."""

    connection: socket.socket
    generation: int = 0
    block: mmap.mmap | None = None
    # Tensors that lie in the block, by offset, dtype and shape: the same pieces come again at every point.
    places: dict[tuple[int, str, tuple[int, ...]], torch.Tensor] = field(default_factory=dict)

    def place_of(self, offset: int, spec: TensorSpec) -> torch.Tensor:
        """A tensor in the block: contiguous, not empty."""
        known = (offset, spec.dtype, spec.shape)
        place = self.places.get(known)
        if place is None:
            assert self.block is not None
            place = as_tensor(view_bytes(self.block, offset, spec.nbytes), spec.torch_dtype, spec.shape)
            if len(self.places) >= _MOST_PLACES:
                self.places.clear()
            self.places[known] = place
        return place


@dataclass
class _Receiving:
    """A connection from a sender, and the generation of our block that it was given."""

    connection: socket.socket
    generation_told: int = 0


class SharedMemoryExchange(Exchange):
    """One per rank. `listener` is the socket that the roster names for this rank."""

    name: ClassVar[str] = "shared memory"

    def __init__(self, graft_rank: int, roster: Roster, listener: socket.socket) -> None:
        self._graft_rank, self._roster, self._listener = graft_rank, roster, listener
        self._spinning = Spinning(roster.has_core_each)
        self._to: dict[int, _Sending] = {}
        self._from: dict[int, _Receiving] = {}
        # (generation, bytes) that each receiver announced for the coming point.
        self.announced: dict[int, tuple[int, int]] = {}
        # (sender, digest) of the last words that are still to come, also of points that were given up here.
        self._owed_words: set[tuple[int, str]] = set()

    # The sender's side.

    def send(self, plan: TransferPlan, outgoing: Sequence[Outgoing], watch: Watch) -> None:
        """Place the pieces for each receiver. If one cannot get its pieces, the point fails, and the others are
        notified.
        """
        failure: Abandoned | None = None
        digest = bytes.fromhex(plan.digest)
        for receiver in dict.fromkeys(item.piece.receiver for item in outgoing):
            sending = self._connected_to(receiver)
            pieces = [item for item in outgoing if item.piece.receiver == receiver]
            failure = self._place_pieces(plan, receiver, pieces, sending, failure, watch)
            word = b"D" + digest if failure is None else b"F" + digest + str(failure).encode()[:_LONGEST_REASON]
            self._tell(receiver, sending.connection, word)
        if failure is not None:
            raise failure

    def _place_pieces(
        self,
        plan: TransferPlan,
        receiver: int,
        pieces: Sequence[Outgoing],
        sending: _Sending,
        failure: Abandoned | None,
        watch: Watch,
    ) -> Abandoned | None:
        """Write, unless the point is lost already. Either way the receiver's answer is read, if it owes one."""
        try:
            self._map_block(plan, receiver, sending, watch)
            for item in pieces if failure is None else ():
                _write_piece(sending, item)
        except Abandoned as abandoned:
            return failure or abandoned
        except (RuntimeError, ValueError, MemoryError) as error:
            if isinstance(error, GrafterError):
                raise
            return Abandoned(f"{self._roster.who(self._graft_rank)} cannot write its tensor: {error}")
        return failure

    def _connected_to(self, receiver: int) -> _Sending:
        sending = self._to.get(receiver)
        if sending is None:
            connection = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
            try:
                connection.connect(f"\0{self._roster.all[receiver].socket_name}")
            except OSError as error:
                connection.close()
                raise PeerGone(receiver, f"its socket is closed ({error.strerror})") from error
            self._check_peer(connection, receiver)
            _set_timeouts(connection)
            sending = self._to[receiver] = _Sending(connection)
            self._tell(receiver, connection, b"H" + struct.pack("<I", self._graft_rank))
        return sending

    def _map_block(self, plan: TransferPlan, receiver: int, sending: _Sending, watch: Watch) -> None:
        """Have the receiver's block of this point, which may have to come first."""
        needed = plan.staging_bytes[receiver]
        if needed == 0:
            return
        generation, capacity = self.announced.get(receiver, (0, 0))
        if needed > capacity:
            # The receiver, which announced this, makes its next block now.
            generation += 1
        while sending.generation != generation or sending.block is None:
            message, descriptors = self._receive(receiver, sending.connection, watch, with_descriptor=True)
            try:
                self._read_answer(plan, receiver, sending, message, descriptors)
            finally:
                _close_all(descriptors)
        if needed > len(sending.block):
            raise ProtocolError(f"{self._roster.who(receiver)} offers a block that is too small.")

    def _read_answer(
        self, plan: TransferPlan, receiver: int, sending: _Sending, message: bytes, descriptors: Sequence[int]
    ) -> None:
        """Take a block, or hear a refusal. What belongs to a point that was given up before is passed over."""
        kind, body = message[:1], message[1:]
        if kind == b"R":
            if body[:_DIGEST_BYTES] == bytes.fromhex(plan.digest):
                raise Abandoned(body[_DIGEST_BYTES:].decode(errors="replace"))
            return
        if kind != b"B" or len(descriptors) != 1 or len(body) != _BLOCK.size:
            raise ProtocolError(f"{self._roster.who(receiver)} answered out of turn over shared memory.")
        generation, nbytes = _BLOCK.unpack(body)
        if not is_sealed_block(descriptors[0], nbytes):
            raise ProtocolError(f"{self._roster.who(receiver)} offers a block that is too small or could shrink.")
        sending.places.clear()
        sending.block, sending.generation = mmap.mmap(descriptors[0], nbytes), generation

    # The receiver's side.

    def receive(self, plan: TransferPlan, incoming: Sequence[Incoming], staging: Staging, watch: Watch) -> None:
        senders: list[int] = []
        for item in incoming:
            if item.piece.sender not in senders:
                senders.append(item.piece.sender)
        try:
            for sender in senders:
                if sender not in self._from:
                    self._accepted_from(sender, watch)
            if plan.staging_bytes[self._graft_rank]:
                self._hand_out_block(senders, staging)
            failure = self._last_words(plan, senders, watch)
        except BaseException:
            # Who has not had the last word may still write: it keeps this block.
            staging.release()
            raise
        if failure is not None:
            raise failure

    def _last_words(self, plan: TransferPlan, senders: Sequence[int], watch: Watch) -> Abandoned | None:
        """Wait until each sender has put all its pieces in place, or has said why it will not."""
        for sender in senders:
            self._owed_words.add((sender, plan.digest))
        failure: Abandoned | None = None
        for sender in senders:
            while (sender, plan.digest) in self._owed_words:
                message, _ = self._receive(sender, self._from[sender].connection, watch)
                kind, digest = message[:1], message[1 : 1 + _DIGEST_BYTES].hex()
                if kind not in (b"D", b"F") or (sender, digest) not in self._owed_words:
                    raise ProtocolError(
                        f"{self._roster.who(sender)} sent another point than the one that was agreed on."
                    )
                # That of a point which was given up here before its sender had finished is passed over.
                self._owed_words.remove((sender, digest))
                if kind == b"F" and digest == plan.digest:
                    failure = Abandoned(message[1 + _DIGEST_BYTES :].decode(errors="replace"))
        return failure

    def refuse(self, plan: TransferPlan, incoming: Sequence[Piece], reason: str, watch: Watch) -> None:
        senders = list(dict.fromkeys(piece.sender for piece in incoming))
        message = b"R" + bytes.fromhex(plan.digest) + reason.encode()[:_LONGEST_REASON]
        for sender in senders:
            self._accepted_from(sender, watch)
            self._tell(sender, self._from[sender].connection, message)
        self._last_words(plan, senders, watch)

    def _hand_out_block(self, senders: Sequence[int], staging: Staging) -> None:
        """Give the block to the senders that have not got it: exactly those that wait for it."""
        for sender in senders:
            receiving = self._from[sender]
            if receiving.generation_told != staging.generation:
                message = b"B" + _BLOCK.pack(staging.generation, staging.capacity)
                descriptor = array.array("i", [staging.fd])
                self._tell(sender, receiving.connection, message, descriptor)
                receiving.generation_told = staging.generation

    def _accepted_from(self, sender: int, watch: Watch) -> None:
        """Take connections until this sender's is among them; a stranger's is closed."""
        while sender not in self._from:
            watch.check()
            readable, _, _ = select.select([self._listener], [], [], _POLL_SECONDS)
            if not readable:
                continue
            connection, _ = self._listener.accept()
            try:
                # Before it may say anything: a stranger that stays silent must not hold up the run.
                self._check_member(connection)
                connection.settimeout(5)
                message = connection.recv(_LONGEST_MESSAGE)
                claimed = struct.unpack("<I", message[1:])[0] if message[:1] == b"H" and len(message) == 5 else -1
                if not 0 <= claimed < len(self._roster.all):
                    raise ProtocolError("a stranger")
                self._check_peer(connection, claimed)
            except (OSError, ProtocolError):
                # Some other process of this machine found the socket. It is no part of the run.
                connection.close()
                continue
            _set_timeouts(connection)
            self._from[claimed] = _Receiving(connection)

    # Both sides.

    def _check_peer(self, connection: socket.socket, graft_rank: int) -> None:
        """The kernel's word for who is at the other end: the process that the roster names, of the same user."""
        pid, uid = _process_at(connection)
        process = self._roster.all[graft_rank].process
        if uid != os.getuid() or pid != process.pid:
            raise ProtocolError(
                f"the socket of {self._roster.who(graft_rank)} belongs to pid {pid} of user {uid}, and the roster "
                "names "
                f"pid {process.pid}."
            )

    def _check_member(self, connection: socket.socket) -> None:
        pid, uid = _process_at(connection)
        if uid != os.getuid() or not any(pid == member.process.pid for member in self._roster.all):
            raise ProtocolError("a stranger")

    def _tell(
        self, peer: int, connection: socket.socket, message: bytes, descriptor: array.array[int] | None = None
    ) -> None:
        try:
            if descriptor is None:
                connection.send(message, _NO_SIGNAL)
            else:
                ancillary = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, descriptor)]
                connection.sendmsg([message], ancillary, _NO_SIGNAL)
        except OSError as error:
            raise PeerGone(peer, f"its connection is closed ({error.strerror or error})") from error

    def _receive(
        self, peer: int, connection: socket.socket, watch: Watch, *, with_descriptor: bool = False
    ) -> tuple[bytes, list[int]]:
        spin_until = self._spinning.until() if self._spinning.is_worthwhile else 0.0
        flags = _AT_ONCE if spin_until else 0
        while True:
            try:
                if with_descriptor:
                    message, descriptors, _, _ = socket.recv_fds(
                        connection, _LONGEST_MESSAGE, 4, flags | _CLOSE_ON_EXEC
                    )
                else:
                    message, descriptors = connection.recv(_LONGEST_MESSAGE, flags), []
            except BlockingIOError:
                if not flags:
                    watch.check()
                elif time.monotonic() > spin_until:
                    # From here on the kernel waits, as long as a look may take.
                    flags = 0
                    self._spinning.tell(paid=False)
                continue
            except OSError as error:
                raise PeerGone(peer, f"its connection broke ({error.strerror})") from error
            if not message:
                raise PeerGone(peer, "it closed the connection")
            if flags:
                self._spinning.tell(paid=True)
            return message, descriptors

    def close(self) -> None:
        for sending in self._to.values():
            _empty(sending.connection)
        for connection in [s.connection for s in self._to.values()] + [r.connection for r in self._from.values()]:
            connection.close()
        self._listener.close()
        self._to.clear()
        self._from.clear()


def _write_piece(sending: _Sending, item: Outgoing) -> None:
    if item.tensor.numel():
        value = item.piece.value
        copy(item.piece.landing(sending.place_of(value.offset, value.spec)), item.tensor)


def _set_timeouts(connection: socket.socket) -> None:
    """Receive by one call that looks up four times a second. In the kernel: `settimeout` would be more calls."""
    connection.setblocking(True)
    look_up = _TIMEVAL.pack(0, int(_POLL_SECONDS * 1e6))
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, look_up)
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, _TIMEVAL.pack(_LONGEST_SEND_SECONDS, 0))


def _empty(connection: socket.socket) -> None:
    """Read what is left there: a socket that is closed with something unread takes its own last word back."""
    with contextlib.suppress(OSError):
        connection.setblocking(False)
        while True:
            message, descriptors, _, _ = socket.recv_fds(connection, _LONGEST_MESSAGE, 4, _CLOSE_ON_EXEC)
            _close_all(descriptors)
            if not message:
                return


def _process_at(connection: socket.socket) -> tuple[int, int]:
    """(pid, uid) of the other end."""
    raw = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size)
    pid, uid, _ = _CREDENTIALS.unpack(raw)
    return pid, uid


def _close_all(descriptors: Sequence[int]) -> None:
    for descriptor in descriptors:
        os.close(descriptor)
