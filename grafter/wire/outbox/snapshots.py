"""Snapshots and their memory: sealed memfds, bounded in bytes, and reused.

A large snapshot has a block of its own. Small ones share a block, in slots of one size, since a process has few file
descriptors. Touching new memory takes eight times as long as a reuse, so blocks are kept until others need their room.

    block   | slot 0 | slot 1 | slot 2 | ...      a power of two each, or the whole block
"""

from __future__ import annotations

import math
import mmap
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

import torch

from grafter.core.copying import copy
from grafter.core.leaves import TensorSpec
from grafter.core.messages.local_value import LocalValue
from grafter.core.messages.states import OutboxPlace
from grafter.core.plan.transfer_plan import ALIGNMENT_BYTES
from grafter.core.processes import is_from_signal_handler
from grafter.wire.exchange.staging import new_block

_PAGE_BYTES = 4096
_SMALLEST_SLOT_BYTES = 512
# A snapshot that is larger has a block of its own.
_LARGE_BYTES = 1 << 18
_SHARED_BLOCK_BYTES = 1 << 22
# A free block may be at most this many times as large as a snapshot: a new block costs time, unused memory costs room.
_MOST_SLACK = 2


@dataclass(eq=False)
class MemoryBlock:
    """One memfd, in slots of one size. free: the numbers of the free slots."""

    mapped: mmap.mmap
    fd: int
    inode: int
    device: int
    slot_bytes: int
    free: list[int] = field(default_factory=list)
    slots: int = 1

    @property
    def capacity(self) -> int:
        """In bytes."""
        return self.slot_bytes * self.slots

    @property
    def is_idle(self) -> bool:
        """Whether all slots are free."""
        return len(self.free) == self.slots


@dataclass(frozen=True, eq=False)
class Slot:
    """The memory of one snapshot: a slot of a block."""

    block: MemoryBlock
    number: int
    nbytes: int

    @property
    def place(self) -> OutboxPlace:
        """Where receivers find it."""
        block = self.block
        return OutboxPlace(
            fd=block.fd, inode=block.inode, device=block.device, offset=self.number * block.slot_bytes,
            nbytes=self.nbytes,
        )  # fmt: skip


class Memory:
    """The memory of one rank's outbox. Used under the lock of the outbox. Raises OSError if the system has no
    memory."""

    def __init__(self, limit_bytes: int) -> None:
        self.limit_bytes = limit_bytes
        self.held_bytes = 0
        self._blocks: dict[int, list[MemoryBlock]] = {}

    def take(self, nbytes: int) -> Slot | None:
        """Memory for one snapshot; None if the limit leaves no room beside what is in use."""
        slot_bytes = _slot_size(nbytes)
        block = self._find_free(slot_bytes)
        if block is None:
            slots = self._slots_of_new_block(slot_bytes)
            if not self._make_room(slot_bytes * slots):
                slots = 1
                if not self._make_room(slot_bytes):
                    return None
            block = self._add_block(slot_bytes, slots)
        return Slot(block, block.free.pop(), nbytes)

    def give_back(self, slot: Slot) -> None:
        """Its bytes may be overwritten from here on."""
        slot.block.free.append(slot.number)

    def release(self, *, keep_content: bool = False) -> None:
        """Free everything, at the end of the run. keep_content: receivers that read it may continue to."""
        for block in [block for blocks in self._blocks.values() for block in blocks]:
            self._remove(block, keep_content=keep_content or not block.is_idle)

    def _find_free(self, slot_bytes: int) -> MemoryBlock | None:
        wanted = [slot_bytes]
        if slot_bytes > _LARGE_BYTES:
            wanted += sorted(size for size in self._blocks if slot_bytes < size <= _MOST_SLACK * slot_bytes)
        return next((block for size in wanted for block in self._blocks.get(size, ()) if block.free), None)

    def _slots_of_new_block(self, slot_bytes: int) -> int:
        if slot_bytes > _LARGE_BYTES:
            return 1
        # One size of slots must not use up a small limit.
        return max(1, min(_SHARED_BLOCK_BYTES, self.limit_bytes // 8) // slot_bytes)

    def _make_room(self, nbytes: int) -> bool:
        idle = [block for blocks in self._blocks.values() for block in blocks if block.is_idle]
        while self.held_bytes + nbytes > self.limit_bytes and idle:
            self._remove(idle.pop(0))
        return self.held_bytes + nbytes <= self.limit_bytes

    def _add_block(self, slot_bytes: int, slots: int) -> MemoryBlock:
        mapped, fd = new_block(slot_bytes * slots)
        status = os.fstat(fd) if fd >= 0 else None
        inode, device = (status.st_ino, status.st_dev) if status is not None else (0, 0)
        block = MemoryBlock(mapped, fd, inode, device, slot_bytes, list(range(slots)), slots)
        self._blocks.setdefault(slot_bytes, []).append(block)
        self.held_bytes += block.capacity
        return block

    def _remove(self, block: MemoryBlock, *, keep_content: bool = False) -> None:
        """keep_content: a receiver that has the block mapped may be reading it."""
        blocks = self._blocks[block.slot_bytes]
        blocks.remove(block)
        if not blocks:
            del self._blocks[block.slot_bytes]
        self.held_bytes -= block.capacity
        if block.fd >= 0:
            if not keep_content:
                # Receivers keep it mapped, which must not keep its memory.
                block.mapped.madvise(mmap.MADV_REMOVE)
            os.close(block.fd)


def _slot_size(nbytes: int) -> int:
    if nbytes > _LARGE_BYTES:
        return -(-nbytes // _PAGE_BYTES) * _PAGE_BYTES
    return max(_SMALLEST_SLOT_BYTES, 1 << (nbytes - 1).bit_length())


def offsets_of(specs: Sequence[TensorSpec]) -> tuple[tuple[int, ...], int]:
    """(the offset of each tensor, all bytes) of a snapshot: the tensors lie one after the other, aligned."""
    offsets, offset = [], 0
    for spec in specs:
        offsets.append(offset)
        offset += -(-spec.nbytes // ALIGNMENT_BYTES) * ALIGNMENT_BYTES
    return tuple(offsets), offset


def tensor_at(mapped: mmap.mmap, offset: int, spec: TensorSpec) -> torch.Tensor:
    """A contiguous tensor in mapped memory, which it keeps alive."""
    numel = math.prod(spec.shape)
    if numel == 0:
        return torch.empty(spec.shape, dtype=spec.torch_dtype)
    return torch.frombuffer(mapped, dtype=spec.torch_dtype, count=numel, offset=offset).view(spec.shape)


def snapshot(slot: Slot, specs: Sequence[TensorSpec], tensors: Sequence[torch.Tensor]) -> None:
    """Copy tensors of any strides and device; they may be changed once this returns."""
    first = slot.number * slot.block.slot_bytes
    for offset, spec, tensor in zip(offsets_of(specs)[0], specs, tensors, strict=True):
        if spec.numel:
            copy(tensor_at(slot.block.mapped, first + offset, spec), tensor.detach())


class OutboxFull(Exception):
    """There is no memory for a snapshot; the text says how much is needed and how much there is."""


@dataclass(frozen=True)
class OfferSnapshot:
    """An offer and its snapshot. slot: None if the offer has no bytes, or no snapshot could be taken, as it then
    says."""

    offer: LocalValue
    slot: Slot | None = None
    nbytes: int = 0


def take_snapshot(
    offer: LocalValue,
    make_room: Callable[[int], tuple[Slot | None, str | None]],
    give_back: Callable[[Slot | None], None],
) -> OfferSnapshot:
    """Copy all tensors of an offer, of any strides and device; they may be changed once this returns.

    make_room: returns memory for a number of bytes, or why there is none. give_back: frees it again.
    """
    if offer.leaves is None:
        return OfferSnapshot(offer)
    tensors, specs = offer.leaves.tensors + offer.extras, offer.specs
    slot, why_not = make_room(offsets_of(specs)[1])
    if why_not is not None:
        return OfferSnapshot(_failed(offer, OutboxFull(why_not)))
    try:
        if slot is not None:
            with torch.no_grad():
                snapshot(slot, specs, tensors)
    except BaseException as error:
        give_back(slot)
        if not isinstance(error, Exception) or is_from_signal_handler(error):
            raise
        # An error of the device, say: the point fails, and all ranks must know why.
        return OfferSnapshot(_failed(offer, error))
    return OfferSnapshot(offer, slot, sum(spec.nbytes for spec in specs))


def _failed(offer: LocalValue, error: Exception) -> LocalValue:
    return replace(offer, leaves=None, extras_text=None, extras=[], failure=error)
