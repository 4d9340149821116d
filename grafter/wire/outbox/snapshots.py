"""The memory of an outbox: snapshots in sealed memfds, bounded in bytes, used again and again.

Large snapshots have a block of their own. Small ones share one, in slots of one size, since a process has few
descriptors. Touching new memory costs eight times a reuse, so blocks are kept until others need their room.

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
from grafter.core.messages.offer import Offer
from grafter.core.messages.states import OutboxPlace
from grafter.core.plan.transfer_plan import ALIGNMENT_BYTES
from grafter.core.signal_handlers import is_from_signal_handler
from grafter.wire.exchange.staging import new_block

_PAGE_BYTES = 4096
_SMALLEST_SLOT_BYTES = 512
# From here on a snapshot has a block of its own.
_LARGE_BYTES = 1 << 18
_SHARED_BLOCK_BYTES = 1 << 22
# Of a free block that is larger than asked for, so much may lie idle: a fresh one costs more time, less memory.
_MOST_SLACK = 2


@dataclass(eq=False)
class MemoryBlock:
    """One memfd. `free` are the slots that hold nothing."""

    mapped: mmap.mmap
    fd: int
    inode: int
    device: int
    slot_bytes: int
    free: list[int] = field(default_factory=list)
    slots: int = 1

    @property
    def capacity(self) -> int:
        return self.slot_bytes * self.slots

    @property
    def is_idle(self) -> bool:
        return len(self.free) == self.slots


@dataclass(frozen=True, eq=False)
class Slot:
    """The memory of one snapshot."""

    block: MemoryBlock
    number: int
    nbytes: int

    @property
    def place(self) -> OutboxPlace:
        block = self.block
        return OutboxPlace(
            fd=block.fd, inode=block.inode, device=block.device, offset=self.number * block.slot_bytes,
            nbytes=self.nbytes,
        )  # fmt: skip


class Memory:
    """One per rank; used under the lock of its outbox. Raises OSError where the system has no memory."""

    def __init__(self, limit_bytes: int) -> None:
        self.limit_bytes = limit_bytes
        self.held_bytes = 0
        self._blocks: dict[int, list[MemoryBlock]] = {}

    def take(self, nbytes: int) -> Slot | None:
        """Memory for one snapshot; None where it would go beyond the limit as long as all that is in use is kept."""
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
        """All of it, at the end of the run. keep_content: receivers that read it may go on, and hold it until then."""
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
        # A small limit is not to be eaten up by the first size that comes.
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
        """keep_content: a receiver may be reading it, and has it mapped."""
        blocks = self._blocks[block.slot_bytes]
        blocks.remove(block)
        if not blocks:
            del self._blocks[block.slot_bytes]
        self.held_bytes -= block.capacity
        if block.fd >= 0:
            if not keep_content:
                # Receivers keep it mapped, and must not keep its memory.
                block.mapped.madvise(mmap.MADV_REMOVE)
            os.close(block.fd)


def _slot_size(nbytes: int) -> int:
    if nbytes > _LARGE_BYTES:
        return -(-nbytes // _PAGE_BYTES) * _PAGE_BYTES
    return max(_SMALLEST_SLOT_BYTES, 1 << (nbytes - 1).bit_length())


def offsets_of(specs: Sequence[TensorSpec]) -> tuple[tuple[int, ...], int]:
    """(where each tensor begins, bytes in all) of a snapshot: one after the other, aligned."""
    offsets, offset = [], 0
    for spec in specs:
        offsets.append(offset)
        offset += -(-spec.nbytes // ALIGNMENT_BYTES) * ALIGNMENT_BYTES
    return tuple(offsets), offset


def tensor_at(mapped: mmap.mmap, offset: int, spec: TensorSpec) -> torch.Tensor:
    """A tensor in mapped memory: contiguous, alive as long as it is held."""
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
    """There is no memory for a snapshot; the text says how much was asked for and how much there is."""


@dataclass(frozen=True)
class OfferSnapshot:
    """An offer, and where its snapshot lies: nowhere, if it has no bytes, or could not be kept, as it then says."""

    offer: Offer
    slot: Slot | None = None
    nbytes: int = 0


def take_snapshot(
    offer: Offer, make_room: Callable[[int], tuple[Slot | None, str | None]], give_back: Callable[[Slot | None], None]
) -> OfferSnapshot:
    """Copy all tensors of an offer, which may be changed once this returns. make_room: memory for so many bytes, or why
    there is none."""
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
        # The device's, say: it costs the point, and all ranks must hear of it.
        return OfferSnapshot(_failed(offer, error))
    return OfferSnapshot(offer, slot, sum(spec.nbytes for spec in specs))


def _failed(offer: Offer, error: Exception) -> Offer:
    return replace(offer, leaves=None, extras_text=None, extras=[], failure=error)
