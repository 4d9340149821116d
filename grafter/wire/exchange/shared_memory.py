"""Shared memory, for ranks of one host and one user: the sender writes straight to the piece's place in the
receiver's staging memory.

The memory is a memfd, whose descriptor goes over the channel between the two ranks. The channel also orders the memory
accesses, and a closed channel is a dead peer. Nothing has a name in a file system, so nothing stays after SIGKILL.

    receiver -> sender   block    generation bytes (+ descriptor)   once per block; a sender that has it writes at once
    receiver -> sender   refusal  digest reason                     it has no memory for this point
    sender -> receiver   done                                       all my pieces of this point are in place
    sender -> receiver   failed   reason                            I will not: you or another receiver refused, or I
                                                                    cannot
"""

from __future__ import annotations

import contextlib
import mmap
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import ClassVar

import torch

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
    """Under which a receiver gives its block. The newest counts, and takes the place of one that was not read."""
    return f"block/{receiver}"


def _refusal_key(receiver: int) -> str:
    return f"refusal/{receiver}"


def _word_key(digest: str, sender: int) -> str:
    """Under which a sender has its last word on a point."""
    return f"word/{digest}/{sender}"


@dataclass
class _Sending:
    """A receiver's block, as this sender has it: its descriptor, until it is mapped, and then the mapped block."""

    generation: int = 0
    nbytes: int = 0
    descriptor: int | None = None
    block: mmap.mmap | None = None
    # Tensors that lie in the block, by offset, dtype and shape: the same pieces come again at every point.
    places: dict[tuple[int, str, tuple[int, ...]], torch.Tensor] = field(default_factory=dict)

    def take(self, generation: int, nbytes: int, descriptor: int) -> None:
        self.close()
        self.generation, self.nbytes, self.descriptor = generation, nbytes, descriptor

    def map(self) -> None:
        """Raises OSError, ValueError or MemoryError where this process may not; then the next point tries again."""
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
            if len(self.places) >= _MOST_PLACES:
                self.places.clear()
            self.places[known] = place
        return place

    def close(self) -> None:
        self.places.clear()
        self.block = None
        if self.descriptor is not None:
            os.close(self.descriptor)
            self.descriptor = None


class SharedMemoryExchange(Exchange):
    """One per rank."""

    name: ClassVar[str] = "shared memory"

    def __init__(self, graft_rank: int, roster: Roster, channels: Channels) -> None:
        self._graft_rank, self._roster, self._channels = graft_rank, roster, channels
        self._spinning = Spinning(roster.has_core_each)
        # By receiver: its block. By sender: the generation of the own block that it was given.
        self._to: dict[int, _Sending] = {}
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
        key = _word_key(plan.digest, self._graft_rank)
        try:
            while receivers:
                receiver = receivers[0]
                pieces = [item for item in outgoing if item.piece.receiver == receiver]
                failure = self._place_pieces(plan, receiver, pieces, failure, watch)
                kind, reason = (_DONE, "") if failure is None else (_FAILED, str(failure)[:_LONGEST_REASON])
                self._channels.send(receiver, key, kind, reason, watch)
                del receivers[0]
        except (RunError, PeerGone):
            # The run is over for the others, too.
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
        """Write, unless the point is lost already. Either way the receiver's answer is read, if it owes one."""
        try:
            sending = self._to.get(receiver)
            if sending is None:
                sending = self._to[receiver] = _Sending()
            self._have_block(plan, receiver, sending, watch)
            if failure is None:
                self._write_pieces(receiver, sending, pieces, watch)
        except Abandoned as abandoned:
            return failure or abandoned
        return failure

    def _write_pieces(self, receiver: int, sending: _Sending, pieces: Sequence[Outgoing], watch: Watch) -> None:
        def between_chunks() -> None:
            watch.check()
            self._channels.look_at(receiver)

        try:
            for item in pieces:
                _write_piece(sending, item, between_chunks)
        except (RuntimeError, ValueError, MemoryError) as error:
            # What torch raises where a tensor cannot be read.
            if isinstance(error, GrafterError) or is_from_signal_handler(error):
                raise
            raise Abandoned(f"{self._roster.who(self._graft_rank)} cannot write its tensor: {error}") from error

    def _have_block(self, plan: TransferPlan, receiver: int, sending: _Sending, watch: Watch) -> None:
        """Have the receiver's block of this point, which may have to come first."""
        needed = plan.staging_bytes[receiver]
        if needed == 0:
            return
        generation, capacity = self.announced.get(receiver, (0, 0))
        if needed > capacity:
            # The receiver, which announced this, makes its next block now.
            generation += 1
        while sending.generation != generation:
            self._read_answer(plan, receiver, sending, watch)
        if sending.descriptor is not None:
            self._map(receiver, sending)
        if needed > sending.nbytes:
            raise ProtocolError(f"{self._roster.who(receiver)} offers a block that is too small.")

    def _map(self, receiver: int, sending: _Sending) -> None:
        try:
            sending.map()
        except (OSError, ValueError, MemoryError) as error:
            if is_from_signal_handler(error):
                raise
            raise Abandoned(
                f"{self._roster.who(self._graft_rank)} cannot map the {sending.nbytes / 2**20:.0f} MiB into which "
                f"{self._roster.who(receiver)} receives: {error}. Raise this process's limit of address space "
                f"(ulimit -v)"
            ) from error

    def _read_answer(self, plan: TransferPlan, receiver: int, sending: _Sending, watch: Watch) -> None:
        """Take a block, or hear a refusal. One of a point that was given up before is passed over."""
        keys = (_refusal_key(receiver), _block_key(receiver))
        key, letter = self._channels.wait_for_any(keys, watch, receiver)
        if key == _refusal_key(receiver):
            digest, _, reason = letter.payload.partition(" ")
            if digest == plan.digest:
                raise Abandoned(reason)
            return
        self._take_block(receiver, sending, letter)

    def _take_block(self, receiver: int, sending: _Sending, letter: Sealed) -> None:
        descriptor, numbers = letter.descriptor, letter.payload.split(" ")
        if descriptor is None or len(numbers) != 2 or not all(number.isdecimal() for number in numbers):
            raise ProtocolError(
                f"{self._roster.who(receiver)} offers a block in a way that the protocol does not have."
            )
        generation, nbytes = map(int, numbers)
        if not is_sealed_block(descriptor, nbytes):
            os.close(descriptor)
            raise ProtocolError(f"{self._roster.who(receiver)} offers a block that is too small or could shrink.")
        sending.take(generation, nbytes, descriptor)

    # The receiver's side.

    def receive(self, plan: TransferPlan, incoming: Sequence[Incoming], staging: Staging, watch: Watch) -> None:
        senders: list[int] = []
        for item in incoming:
            if item.piece.sender not in senders:
                senders.append(item.piece.sender)
        try:
            if plan.staging_bytes[self._graft_rank]:
                self._hand_out_block(senders, staging, watch)
            failure = self._last_words(plan, senders, watch)
        except BaseException:
            # Who has not had the last word may still write: it keeps this block.
            staging.release()
            raise
        if failure is not None:
            raise failure

    def _last_words(self, plan: TransferPlan, senders: Sequence[int], watch: Watch) -> Abandoned | None:
        """Wait until each sender has put all its pieces in place, or has said why it will not."""
        keys = [_word_key(plan.digest, sender) for sender in senders]
        try:
            if self._spinning.is_worthwhile:
                self._channels.spin(self._spinning, keys)
            words = self._channels.wait(keys, watch, senders)
        except BaseException:
            # They may still come, and then nobody reads them.
            for key in keys:
                self._channels.discard(key)
            raise
        for word in words:
            if word.kind != _DONE:
                return Abandoned(word.payload)
        return None

    def refuse(self, plan: TransferPlan, incoming: Sequence[Piece], reason: str, watch: Watch) -> None:
        senders = list(dict.fromkeys(piece.sender for piece in incoming))
        text = f"{plan.digest} {reason[:_LONGEST_REASON]}"
        for sender in senders:
            self._channels.send(sender, _refusal_key(self._graft_rank), _REFUSAL, text, watch)
        self._last_words(plan, senders, watch)

    def _hand_out_block(self, senders: Sequence[int], staging: Staging, watch: Watch) -> None:
        """Give the block to the senders that do not have it: exactly those that wait for it."""
        for sender in senders:
            if self._given.get(sender) != staging.generation:
                text = f"{staging.generation} {staging.capacity}"
                self._channels.send(sender, _block_key(self._graft_rank), _BLOCK, text, watch, staging.fd)
                self._given[sender] = staging.generation

    def close(self) -> None:
        for sending in self._to.values():
            sending.close()
        self._to.clear()


def _write_piece(sending: _Sending, item: Outgoing, between_chunks: Callable[[], None]) -> None:
    if item.tensor.numel():
        value = item.piece.value
        copy(item.piece.landing(sending.place_of(value.offset, value.spec)), item.tensor, between_chunks)
