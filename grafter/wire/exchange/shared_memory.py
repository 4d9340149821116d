"""Shared memory, for ranks of one host and one user: the sender writes each piece into the receiver's staging memory.

The memory is a memfd, whose descriptor is sent over the channel between the two ranks. The channel also orders the
memory accesses, and a closed channel means a dead peer. Nothing has a name in a file system, so nothing is left after
SIGKILL.

    receiver -> sender   block    generation bytes (+ descriptor)   once per block; a sender that has it writes at once
    receiver -> sender   refusal  digest reason                     the receiver has no memory for this point
    sender -> receiver   done                                       all pieces of this sender are in place
    sender -> receiver   failed   reason                            they will not be: a receiver has refused, or the
                                                                    sender cannot write
"""

from __future__ import annotations

import contextlib
import mmap
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import ClassVar

import torch

from grafter.core.bounded_memory import BoundedMemory
from grafter.core.copying import copy
from grafter.core.leaves import TensorSpec
from grafter.core.messages.roster import Roster
from grafter.core.messages.wire import Sealed
from grafter.core.plan.transfer_plan import Piece, TransferPlan
from grafter.core.processes import Abandoned, PeerGone, Watch, is_from_signal_handler
from grafter.errors import GrafterError, ProtocolError, RunError
from grafter.wire.exchange import Exchange, Incoming, Outgoing
from grafter.wire.exchange.staging import Staging, as_tensor, is_sealed_block, view_bytes
from grafter.wire.rendezvous.channels import Channels
from grafter.wire.rendezvous.spinning import Spinning

_BLOCK, _REFUSAL, _DONE, _FAILED = "block", "refusal", "done", "failed"
_LONGEST_REASON = 2000
_MOST_PLACES = 1024


def _block_key(receiver: int) -> str:
    """The key of a receiver's block. A newer block replaces one that was not read."""
    return f"block/{receiver}"


def _refusal_key(receiver: int) -> str:
    return f"refusal/{receiver}"


def _result_key(digest: str, sender: int) -> str:
    """The key of a sender's result of a point: `done` or `failed`."""
    return f"word/{digest}/{sender}"


@dataclass
class _ReceiverBlock:
    """A receiver's block, as this sender has it: its descriptor, until it is mapped, and then the mapped block."""

    generation: int = 0
    nbytes: int = 0
    descriptor: int | None = None
    block: mmap.mmap | None = None
    # Tensors in the block, by offset, dtype and shape: most points have the same pieces.
    places: BoundedMemory[tuple[int, str, tuple[int, ...]], torch.Tensor] = field(
        default_factory=lambda: BoundedMemory(_MOST_PLACES, 0)
    )

    def take(self, generation: int, nbytes: int, descriptor: int) -> None:
        self.close()
        self.generation, self.nbytes, self.descriptor = generation, nbytes, descriptor

    def map(self) -> None:
        """Map the block. Raises OSError, ValueError or MemoryError if that fails; then the next point tries again."""
        assert self.descriptor is not None
        self.block = mmap.mmap(self.descriptor, self.nbytes)
        descriptor, self.descriptor = self.descriptor, None
        os.close(descriptor)

    def place_of(self, offset: int, spec: TensorSpec) -> torch.Tensor:
        """A tensor in the block: contiguous, not empty."""
        known = (offset, spec.dtype, spec.shape)
        place = self.places.get(known)
        if place is None:
            assert self.block is not None
            place = as_tensor(view_bytes(self.block, offset, spec.nbytes), spec.torch_dtype, spec.shape)
            self.places.remember(known, place, 0)
        return place

    def close(self) -> None:
        self.places.clear()
        self.block = None
        if self.descriptor is not None:
            os.close(self.descriptor)
            self.descriptor = None


class SharedMemoryExchange(Exchange):
    """The exchange of one rank with ranks of its host."""

    name: ClassVar[str] = "shared memory"

    def __init__(self, graft_rank: int, roster: Roster, channels: Channels) -> None:
        self._graft_rank, self._roster, self._channels = graft_rank, roster, channels
        self._spinning = Spinning(roster.has_core_each)
        # By receiver: its block. By sender: the generation of this rank's block that it has.
        self._to: dict[int, _ReceiverBlock] = {}
        self._given: dict[int, int] = {}
        # (generation, bytes) that each receiver announced for the coming point.
        self.announced: dict[int, tuple[int, int]] = {}

    # The sender's side.

    def send(self, plan: TransferPlan, outgoing: Sequence[Outgoing], watch: Watch) -> None:
        """Place the pieces for each receiver. If one cannot get its pieces, the point fails, and the others are
        notified: each gets one last message, even if an exception of the program, such as Ctrl-C, ends this call.
        """
        failure: Abandoned | None = None
        receivers = list({item.piece.receiver: None for item in outgoing})
        key = _result_key(plan.digest, self._graft_rank)
        try:
            while receivers:
                receiver = receivers[0]
                pieces = [item for item in outgoing if item.piece.receiver == receiver]
                failure = self._place_pieces(plan, receiver, pieces, failure, watch)
                kind, reason = (_DONE, "") if failure is None else (_FAILED, str(failure)[:_LONGEST_REASON])
                self._channels.send(receiver, key, kind, reason, watch)
                del receivers[0]
        except (RunError, PeerGone):
            # The run is over for the receivers, too.
            raise
        except BaseException as error:
            reason = f"{self._roster.who(self._graft_rank)} left the point with {type(error).__name__}"
            for receiver in receivers:
                with contextlib.suppress(PeerGone):
                    self._channels.try_to_send(receiver, key, _FAILED, reason)
            raise
        if failure is not None:
            raise failure

    def _place_pieces(
        self,
        plan: TransferPlan,
        receiver: int,
        pieces: Sequence[Outgoing],
        failure: Abandoned | None,
        watch: Watch,
    ) -> Abandoned | None:
        """Write, unless the point has failed already. In both cases an awaited answer of the receiver is read."""
        try:
            theirs = self._to.get(receiver)
            if theirs is None:
                theirs = self._to[receiver] = _ReceiverBlock()
            self._have_block(plan, receiver, theirs, watch)
            if failure is None:
                self._write_pieces(receiver, theirs, pieces, watch)
        except Abandoned as abandoned:
            return failure or abandoned
        return failure

    def _write_pieces(self, receiver: int, theirs: _ReceiverBlock, pieces: Sequence[Outgoing], watch: Watch) -> None:
        def between_chunks() -> None:
            watch.check()
            self._channels.look_at(receiver)

        try:
            for item in pieces:
                _write_piece(theirs, item, between_chunks)
        except (RuntimeError, ValueError, MemoryError) as error:
            # torch raises these if a tensor cannot be read.
            if isinstance(error, GrafterError) or is_from_signal_handler(error):
                raise
            raise Abandoned(f"{self._roster.who(self._graft_rank)} cannot write its tensor: {error}") from error

    def _have_block(self, plan: TransferPlan, receiver: int, theirs: _ReceiverBlock, watch: Watch) -> None:
        """Wait until this sender has the receiver's block for this point."""
        needed = plan.staging_bytes[receiver]
        if needed == 0:
            return
        generation, capacity = self.announced.get(receiver, (0, 0))
        if needed > capacity:
            # The receiver has announced this block, and makes its next one now.
            generation += 1
        while theirs.generation != generation:
            self._read_answer(plan, receiver, theirs, watch)
        if theirs.descriptor is not None:
            self._map(receiver, theirs)
        if needed > theirs.nbytes:
            raise ProtocolError(f"{self._roster.who(receiver)} offers a block that is too small.")

    def _map(self, receiver: int, theirs: _ReceiverBlock) -> None:
        try:
            theirs.map()
        except (OSError, ValueError, MemoryError) as error:
            if is_from_signal_handler(error):
                raise
            raise Abandoned(
                f"{self._roster.who(self._graft_rank)} cannot map the {theirs.nbytes / 2**20:.0f} MiB into which "
                f"{self._roster.who(receiver)} receives: {error}. Raise this process's limit of address space "
                f"(ulimit -v)"
            ) from error

    def _read_answer(self, plan: TransferPlan, receiver: int, theirs: _ReceiverBlock, watch: Watch) -> None:
        """Read a block, or a refusal. A refusal of an earlier point is ignored."""
        keys = (_refusal_key(receiver), _block_key(receiver))
        key, message = self._channels.wait_for_any(keys, watch, receiver)
        if key == _refusal_key(receiver):
            digest, _, reason = message.payload.partition(" ")
            if digest == plan.digest:
                raise Abandoned(reason)
            return
        self._take_block(receiver, theirs, message)

    def _take_block(self, receiver: int, theirs: _ReceiverBlock, message: Sealed) -> None:
        descriptor, numbers = message.descriptor, message.payload.split(" ")
        if descriptor is None or len(numbers) != 2 or not all(number.isdecimal() for number in numbers):
            raise ProtocolError(f"{self._roster.who(receiver)} offers a block by a message that is not valid.")
        generation, nbytes = map(int, numbers)
        if not is_sealed_block(descriptor, nbytes):
            os.close(descriptor)
            raise ProtocolError(f"{self._roster.who(receiver)} offers a block that is too small or could shrink.")
        theirs.take(generation, nbytes, descriptor)

    # The receiver's side.

    def receive(self, plan: TransferPlan, incoming: Sequence[Incoming], staging: Staging, watch: Watch) -> None:
        senders: list[int] = []
        for item in incoming:
            if item.piece.sender not in senders:
                senders.append(item.piece.sender)
        try:
            if plan.staging_bytes[self._graft_rank]:
                self._send_block(senders, staging, watch)
            failure = self._await_results(plan, senders, watch)
        except BaseException:
            # A sender that has not sent its result may still write: this block is not used again.
            staging.release()
            raise
        if failure is not None:
            raise failure

    def _await_results(self, plan: TransferPlan, senders: Sequence[int], watch: Watch) -> Abandoned | None:
        """Wait for the result of each sender; why one has failed, or None."""
        keys = [_result_key(plan.digest, sender) for sender in senders]
        try:
            if self._spinning.is_worthwhile:
                self._channels.spin(self._spinning, keys)
            results = self._channels.wait(keys, watch, senders)
        except BaseException:
            # They may still arrive, and will not be read.
            for key in keys:
                self._channels.discard(key)
            raise
        for result in results:
            if result.kind != _DONE:
                return Abandoned(result.payload)
        return None

    def refuse(self, plan: TransferPlan, incoming: Sequence[Piece], reason: str, watch: Watch) -> None:
        senders = list(dict.fromkeys(piece.sender for piece in incoming))
        text = f"{plan.digest} {reason[:_LONGEST_REASON]}"
        for sender in senders:
            self._channels.send(sender, _refusal_key(self._graft_rank), _REFUSAL, text, watch)
        self._await_results(plan, senders, watch)

    def _send_block(self, senders: Sequence[int], staging: Staging, watch: Watch) -> None:
        """Send the block to the senders that do not have it, which are exactly those that wait for it."""
        for sender in senders:
            if self._given.get(sender) != staging.generation:
                text = f"{staging.generation} {staging.capacity}"
                self._channels.send(sender, _block_key(self._graft_rank), _BLOCK, text, watch, staging.fd)
                self._given[sender] = staging.generation

    def close(self) -> None:
        for theirs in self._to.values():
            theirs.close()
        self._to.clear()


def _write_piece(theirs: _ReceiverBlock, item: Outgoing, between_chunks: Callable[[], None]) -> None:
    if item.tensor.numel():
        value = item.piece.value
        copy(item.piece.landing(theirs.place_of(value.offset, value.spec)), item.tensor, between_chunks)
