"""Snapshots: a tensor's values as they are at the call, in host memory of their own, whatever the program does next."""

from __future__ import annotations

import ctypes
import mmap
import threading
from dataclasses import dataclass, field
from typing import Any

import torch

from grafter.core.copying import copy
from grafter.core.processes import is_from_signal_handler
from grafter.core.tensor_access import local_tensor
from grafter.store.dumps.writer import SAFETENSORS_NAMES, StoredTensor

_REAL_OF = {torch.complex32: torch.float16, torch.complex64: torch.float32, torch.complex128: torch.float64}


class NothingToSave(Exception):
    """This tensor has no plain values; the text says why."""


@dataclass(slots=True)
class Snapshot:
    """A contiguous copy on the host. `dtype` and `shape` are the tensor's own; `stored` is what the file holds: the
    same, or, where safetensors lacks the dtype, the same memory in another one (`stored_as`)."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    stored: StoredTensor
    stored_as: str | None
    # What is to be given back.
    buffer: torch.Tensor | SharedBuffer | None
    # Where an accelerator copies: complete once these events have come.
    _copied: list[Any] = field(default_factory=list)

    @property
    def nbytes(self) -> int:
        return self.stored.nbytes

    @property
    def values(self) -> torch.Tensor:
        data = self.stored.data
        if not isinstance(data, torch.Tensor):
            data = torch.frombuffer(bytearray(data), dtype=torch.uint8) if data else torch.empty(0, dtype=torch.uint8)
        return data.view(self.dtype).view(self.shape)

    def wait(self) -> None:
        """Until an accelerator's copy is complete. Called by the thread that writes."""
        for event in self._copied:
            event.synchronize()
        self._copied.clear()


def saveable(tensor: torch.Tensor) -> torch.Tensor:
    """The local tensor whose values can be copied; a pending collective is waited for.

    Raises NothingToSave, with the reason, for a tensor that has no plain values in memory.
    """
    if torch._C._functorch.is_functorch_wrapped_tensor(tensor):
        raise NothingToSave("it is inside of a torch.func transform (vmap, grad, ...), where it has no one value")
    if torch.nn.parameter.is_lazy(tensor):
        raise NothingToSave("it is a parameter that is not initialised yet")
    local = local_tensor(tensor)
    if local.is_meta:
        raise NothingToSave("it is on the meta device and has no values")
    if local.is_nested or local.layout is not torch.strided:
        raise NothingToSave(f"it is {'nested' if local.is_nested else f'of layout {local.layout}'}, not dense")
    if local.is_quantized:
        raise NothingToSave(f"it is quantised ({local.dtype}); dump its int_repr() or its dequantised values")
    if type(local).__torch_dispatch__ is not torch.Tensor.__torch_dispatch__:
        raise NothingToSave(f"it is a {type(local).__name__}, which is made of other tensors; dump those")
    if local.numel() and not local._is_zerotensor() and not local.untyped_storage().nbytes():
        raise NothingToSave("its storage was freed (FSDP does this to resharded parameters)")
    return local


def snapshot_bytes(tensor: torch.Tensor) -> int:
    """What a snapshot takes: the elements that the tensor shows, not the storage that it shares."""
    return tensor.numel() * tensor.element_size()


def held_bytes(tensor: torch.Tensor) -> int:
    """The host memory that a snapshot holds: pinned memory comes in whole granules."""
    nbytes = snapshot_bytes(tensor)
    return capacity_of(nbytes, pinned=True) if tensor.is_cuda else nbytes


def take_snapshot(local: torch.Tensor, buffers: Buffers) -> Snapshot:
    """Copy now, or, from an accelerator, in the order of its current stream: what the program queues next cannot
    change it. local: as `saveable` gave it. Called without grad."""
    dtype, shape, nbytes = local.dtype, tuple(local.shape), snapshot_bytes(local)
    is_native = dtype in SAFETENSORS_NAMES
    if nbytes <= SMALL_BYTES and _is_plain_memory(local):
        # Without torch's operations: each lets go of the interpreter's lock, and the thread that writes would come and
        # go between them.
        data: bytes | memoryview | torch.Tensor
        buffer: torch.Tensor | SharedBuffer | None
        data, buffer = buffers.copy_small(local.data_ptr(), nbytes) if nbytes else (b"", None)
        copied = []
    else:
        buffer = buffers.take(nbytes, pinned=local.is_cuda)
        flat = data = buffer[:nbytes]
        # A dtype of which torch can do no more than hold it is copied as its bytes.
        source = local if is_native or dtype in _REAL_OF else local.view(torch.uint8)
        copied = _copy(source, flat.view(source.dtype).view(source.shape))
    if is_native:
        return Snapshot(dtype, shape, StoredTensor(dtype, shape, data), None, buffer, copied)
    if dtype in _REAL_OF:
        stored = StoredTensor(_REAL_OF[dtype], (*shape, 2), data)
    else:
        stored = StoredTensor(torch.uint8, tuple(local.view(torch.uint8).shape), data)
    return Snapshot(dtype, shape, stored, str(stored.dtype).removeprefix("torch."), buffer, copied)


def _is_plain_memory(local: torch.Tensor) -> bool:
    """Whether the values are the bytes from its address on, row-major."""
    return (
        local.is_cpu
        and local.is_contiguous()
        and not local.is_conj()
        and not local.is_neg()
        and not local._is_zerotensor()
    )


def _copy(source: torch.Tensor, target: torch.Tensor) -> list[Any]:
    """What is to be waited for before the copy is complete."""
    if not source.is_cuda:
        copy(target, source)
        return []
    target.copy_(source, non_blocking=True)
    event = torch.cuda.Event()  # type: ignore[no-untyped-call]
    event.record(torch.cuda.current_stream(source.device))
    return [event]


# Host memory for snapshots, used again and again: touching new memory costs up to six times what a copy into it does.
#
# Large buffers ask the system for huge pages, where that has them on request (`madvise`, the default of most): memory
# that is new then costs as much again as the copy, and not five times as much. Small tensors share one buffer after
# another (`SharedBuffer`), so that those are at home in huge pages, too.

# Of what shares a buffer with others.
SMALL_BYTES = 1 << 16
_GRANULE_BYTES = 1 << 20
_HUGE_PAGE_BYTES = 1 << 21
# Parts begin at multiples of it: the size of a cache line.
_ALIGNMENT = 64

# Keeps the interpreter's lock, other than `ctypes.memmove`, for so short a while: else a thread that waits for it is
# woken at each copy, and mostly comes too late.
_copy_bytes = ctypes.PYFUNCTYPE(ctypes.c_void_p, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t)(
    ctypes.cast(ctypes.memmove, ctypes.c_void_p).value or 0
)


class SharedBuffer:
    """A buffer that is filled from its beginning to its end, and free again once all of its parts are."""

    __slots__ = ("_address", "_end", "_memory", "buffer", "parts")

    def __init__(self, buffer: torch.Tensor) -> None:
        self.buffer = buffer
        self._address, self._memory = buffer.data_ptr(), buffer.numpy().data
        self._end = self.parts = 0

    def has_room(self, nbytes: int) -> bool:
        return self._end + nbytes <= len(self._memory)

    def add(self, address: int, nbytes: int) -> memoryview:
        """A copy of the memory at `address`."""
        start = self._end
        _copy_bytes(self._address + start, address, nbytes)
        self.parts += 1
        self._end = start + -(-nbytes // _ALIGNMENT) * _ALIGNMENT
        return self._memory[start : start + nbytes]

    def free_part(self) -> bool:
        """Whether that was the last one, and all of it is free."""
        self.parts -= 1
        if not self.parts:
            self._end = 0
        return not self.parts


class Buffers:
    """Buffers of one rank, used by the threads that dump and the one that writes. `limit_bytes` bounds what is kept for
    later use; with what is in use, too, unless that alone is more."""

    def __init__(self, limit_bytes: int, *, in_order: bool = False) -> None:
        """in_order: what is taken comes back in about the same order. Else no small tensor shares a buffer, of which
        the last to come back would keep all."""
        self._limit = limit_bytes
        self._free: list[torch.Tensor] = []
        self._kept_bytes = self._used_bytes = 0
        self._in_order = in_order
        self._shared: SharedBuffer | None = None
        self._lock = threading.Lock()
        self._is_abandoned = False

    def take(self, nbytes: int, *, pinned: bool = False) -> torch.Tensor:
        """A uint8 tensor in host memory of at least `nbytes`; pinned where an accelerator copies into it."""
        if nbytes <= SMALL_BYTES and not pinned:
            return _new(nbytes, pinned=False)
        capacity = capacity_of(nbytes, pinned=pinned)
        with self._lock:
            buffer = self._fitting(capacity, pinned)
            self._used_bytes += capacity if buffer is None else buffer.numel()
            self._free_surplus()
        if buffer is not None:
            return buffer
        try:
            return _new(capacity, pinned=pinned)
        except BaseException:
            with self._lock:
                self._used_bytes -= capacity
            raise

    def copy_small(self, address: int, nbytes: int) -> tuple[bytes | memoryview, SharedBuffer | None]:
        """A copy of at most SMALL_BYTES of this process's memory, and what is to be given back for it."""
        if not self._in_order:
            return ctypes.string_at(address, nbytes), None
        with self._lock:
            if self._shared is not None and self._shared.has_room(nbytes):
                return self._shared.add(address, nbytes), self._shared
        following = SharedBuffer(self.take(_HUGE_PAGE_BYTES))
        with self._lock:
            before, self._shared = self._shared, following
            # The one before is not lost: who gives back its last part gives back all of it. That may have been just
            # now, when it was still the one in use.
            if before is not None and not before.parts:
                self._keep(before.buffer)
            return following.add(address, nbytes), following

    def give_back(self, buffer: torch.Tensor | SharedBuffer | None) -> None:
        """buffer: as it was taken."""
        if buffer is None:
            return
        if isinstance(buffer, torch.Tensor) and buffer.numel() <= SMALL_BYTES and not buffer.is_pinned():
            return
        # A signal may end the program while its thread holds the lock, and that then waits for this one.
        if self._is_abandoned or not self._lock.acquire(timeout=1.0):
            self._is_abandoned = True
            return
        try:
            if isinstance(buffer, SharedBuffer):
                if not buffer.free_part() or buffer is self._shared:
                    return
                buffer = buffer.buffer
            self._keep(buffer)
        finally:
            self._lock.release()

    def _keep(self, buffer: torch.Tensor) -> None:
        self._used_bytes -= buffer.numel()
        self._free.append(buffer)
        self._kept_bytes += buffer.numel()
        self._free_surplus()

    def _free_surplus(self) -> None:
        while self._free and self._kept_bytes + self._used_bytes > self._limit:
            # The one that has not been of use for the longest time.
            self._kept_bytes -= self._free.pop(0).numel()

    def _fitting(self, capacity: int, pinned: bool) -> torch.Tensor | None:
        best = None
        for index, buffer in enumerate(self._free):
            fits = capacity <= buffer.numel() <= 2 * capacity and buffer.is_pinned() == pinned
            # Of equal ones the last that came back: its memory is the likeliest to be in a cache.
            if fits and (best is None or buffer.numel() <= self._free[best].numel()):
                best = index
        if best is None:
            return None
        buffer = self._free.pop(best)
        self._kept_bytes -= buffer.numel()
        return buffer


def capacity_of(nbytes: int, *, pinned: bool) -> int:
    """How large a new buffer is made for so many bytes, more than SMALL_BYTES or pinned.

    Pinned memory is taken whole, the rest of it as it is written to: so a small pinned buffer is not much larger than
    what is asked for.
    """
    granule = SMALL_BYTES if pinned else _GRANULE_BYTES
    if nbytes >= _HUGE_PAGE_BYTES:
        granule = _HUGE_PAGE_BYTES
    return max(1, -(-nbytes // granule)) * granule


def _new(nbytes: int, *, pinned: bool) -> torch.Tensor:
    if torch.is_inference_mode_enabled():
        # A tensor made there could not be written to outside of it.
        with torch.inference_mode(False):
            return _new(nbytes, pinned=pinned)
    if pinned or nbytes <= SMALL_BYTES:
        return torch.empty(nbytes, dtype=torch.uint8, device="cpu", pin_memory=pinned)
    return torch.frombuffer(_huge_pages(nbytes), dtype=torch.uint8)


def _huge_pages(nbytes: int) -> mmap.mmap:
    """New memory, in huge pages where the system gives them. Raises MemoryError."""
    try:
        pages = mmap.mmap(-1, nbytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    except OSError as error:
        if is_from_signal_handler(error):
            raise
        raise MemoryError(f"{nbytes} bytes for a snapshot: {error}") from error
    # A kernel that was built without them refuses; a system that is no Linux does not know the word.
    try:
        pages.madvise(mmap.MADV_HUGEPAGE)
    except (OSError, AttributeError) as error:
        if is_from_signal_handler(error):
            raise
    return pages
