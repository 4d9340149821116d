"""Snapshots: copies of a tensor's values at the call, in separate host memory, and the buffers for these copies.

Buffers are reused, because touching new memory costs up to six times as much as a copy into it. Large buffers ask the
system for huge pages, if it gives them on request (`madvise`, the default of most systems): new memory then costs as
much again as the copy instead of five times as much. Small tensors share one buffer after another (`SharedBuffer`), so
that they lie in huge pages too.
"""

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

# The largest tensor that shares a buffer with others.
SMALL_TENSOR_BYTES = 1 << 16
_GRANULE_BYTES = 1 << 20
_HUGE_PAGE_BYTES = 1 << 21
# The size of a cache line; parts of a shared buffer begin at multiples of it.
_ALIGNMENT = 64
_REAL_OF = {torch.complex32: torch.float16, torch.complex64: torch.float32, torch.complex128: torch.float64}


class NothingToSave(Exception):
    """The tensor has no plain values; the message says why."""


@dataclass(slots=True)
class Snapshot:
    """A contiguous copy of one tensor on the host.

    dtype, shape: those of the tensor. stored: the content of the file. If safetensors lacks the dtype, it is the same
    memory in another dtype, which `stored_as` names.
    """

    dtype: torch.dtype
    shape: tuple[int, ...]
    stored: StoredTensor
    stored_as: str | None
    # To be given back to `Buffers`.
    buffer: torch.Tensor | SharedBuffer | None
    # An accelerator's copy is complete once these events have occurred.
    _copied: list[Any] = field(default_factory=list)

    @property
    def nbytes(self) -> int:
        """The number of bytes of the copy."""
        return self.stored.nbytes

    @property
    def values(self) -> torch.Tensor:
        """The copy as a tensor with the original dtype and shape."""
        data = self.stored.data
        if not isinstance(data, torch.Tensor):
            data = torch.frombuffer(bytearray(data), dtype=torch.uint8) if data else torch.empty(0, dtype=torch.uint8)
        return data.view(self.dtype).view(self.shape)

    def wait(self) -> None:
        """Wait until an accelerator's copy is complete. Called by the writing thread."""
        for event in self._copied:
            event.synchronize()
        self._copied.clear()


def saveable(tensor: torch.Tensor) -> torch.Tensor:
    """The local tensor whose values can be copied. Waits for a pending collective.

    Raises NothingToSave for a tensor that has no plain values in memory.
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
    """The bytes of a snapshot: those of the tensor's elements, not of its storage."""
    return tensor.numel() * tensor.element_size()


def held_bytes(tensor: torch.Tensor) -> int:
    """The host memory that a snapshot occupies: pinned memory is allocated in whole granules."""
    nbytes = snapshot_bytes(tensor)
    return capacity_of(nbytes, pinned=True) if tensor.is_cuda else nbytes


def take_snapshot(local: torch.Tensor, buffers: Buffers) -> Snapshot:
    """Copy a tensor that `saveable` returned. Called without grad.

    A copy from an accelerator is queued on its current stream, so later work of the program cannot change it.
    """
    dtype, shape, nbytes = local.dtype, tuple(local.shape), snapshot_bytes(local)
    is_native = dtype in SAFETENSORS_NAMES
    if nbytes <= SMALL_TENSOR_BYTES and _is_plain_memory(local):
        # Without torch's operations: each releases the interpreter's lock, and the writing thread would run in between.
        data: bytes | memoryview | torch.Tensor
        buffer: torch.Tensor | SharedBuffer | None
        data, buffer = buffers.copy_small(local.data_ptr(), nbytes) if nbytes else (b"", None)
        copied = []
    else:
        buffer = buffers.take(nbytes, pinned=local.is_cuda)
        flat = data = buffer[:nbytes]
        # A dtype on which torch has no operations is copied as bytes.
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
    """Whether the values are the row-major bytes at the tensor's address."""
    return (
        local.is_cpu
        and local.is_contiguous()
        and not local.is_conj()
        and not local.is_neg()
        and not local._is_zerotensor()
    )


def _copy(source: torch.Tensor, target: torch.Tensor) -> list[Any]:
    """Copy, and return the events that mark the copy as complete."""
    if not source.is_cuda:
        copy(target, source)
        return []
    target.copy_(source, non_blocking=True)
    event = torch.cuda.Event()  # type: ignore[no-untyped-call]
    event.record(torch.cuda.current_stream(source.device))
    return [event]


# Unlike `ctypes.memmove`, this keeps the interpreter's lock: otherwise each of these short copies would wake a thread
# that waits for the lock, mostly in vain.
_copy_bytes = ctypes.PYFUNCTYPE(ctypes.c_void_p, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t)(
    ctypes.cast(ctypes.memmove, ctypes.c_void_p).value or 0
)


class SharedBuffer:
    """A buffer that is filled from its beginning to its end, and is free again once all of its parts are."""

    __slots__ = ("_address", "_end", "_memory", "buffer", "parts")

    def __init__(self, buffer: torch.Tensor) -> None:
        self.buffer = buffer
        self._address, self._memory = buffer.data_ptr(), buffer.numpy().data
        self._end = self.parts = 0

    def has_room(self, nbytes: int) -> bool:
        """Whether another part of `nbytes` fits."""
        return self._end + nbytes <= len(self._memory)

    def add(self, address: int, nbytes: int) -> memoryview:
        """Copy `nbytes` from `address` into the buffer; returns the copy."""
        start = self._end
        _copy_bytes(self._address + start, address, nbytes)
        self.parts += 1
        self._end = start + -(-nbytes // _ALIGNMENT) * _ALIGNMENT
        return self._memory[start : start + nbytes]

    def free_part(self) -> bool:
        """Free one part. Returns whether it was the last one, so that the whole buffer is free."""
        self.parts -= 1
        if not self.parts:
            self._end = 0
        return not self.parts


class Buffers:
    """The snapshot buffers of one rank, used by the threads that dump and the thread that writes.

    Free buffers are kept only as long as they and the buffers in use stay within `limit_bytes`.
    """

    def __init__(self, limit_bytes: int, *, in_order: bool = False) -> None:
        """in_order: buffers are given back in about the order in which they were taken. Otherwise small tensors share
        no buffers, because one late part would keep a whole buffer in use.
        """
        self._limit = limit_bytes
        self._free: list[torch.Tensor] = []
        self._kept_bytes = self._used_bytes = 0
        self._in_order = in_order
        self._shared: SharedBuffer | None = None
        self._lock = threading.Lock()
        self._is_abandoned = False

    def take(self, nbytes: int, *, pinned: bool = False) -> torch.Tensor:
        """A uint8 tensor in host memory with at least `nbytes`. pinned: an accelerator copies into it."""
        if nbytes <= SMALL_TENSOR_BYTES and not pinned:
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
        """A copy of at most SMALL_TENSOR_BYTES of this process's memory, and the buffer to give back for it."""
        if not self._in_order:
            return ctypes.string_at(address, nbytes), None
        with self._lock:
            if self._shared is not None and self._shared.has_room(nbytes):
                return self._shared.add(address, nbytes), self._shared
        following = SharedBuffer(self.take(_HUGE_PAGE_BYTES))
        with self._lock:
            before, self._shared = self._shared, following
            # The previous buffer is freed with its last part, unless that was given back while it was still in use.
            if before is not None and not before.parts:
                self._keep(before.buffer)
            return following.add(address, nbytes), following

    def give_back(self, buffer: torch.Tensor | SharedBuffer | None) -> None:
        """Give back a buffer that `take` or `copy_small` returned."""
        if buffer is None:
            return
        if isinstance(buffer, torch.Tensor) and buffer.numel() <= SMALL_TENSOR_BYTES and not buffer.is_pinned():
            return
        # A signal may end the program while its thread holds the lock, and the signal's handler waits for this thread.
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
            # The one that has been unused for the longest time.
            self._kept_bytes -= self._free.pop(0).numel()

    def _fitting(self, capacity: int, pinned: bool) -> torch.Tensor | None:
        best = None
        for index, buffer in enumerate(self._free):
            fits = capacity <= buffer.numel() <= 2 * capacity and buffer.is_pinned() == pinned
            # Of equal ones, the last that was given back: its memory is most likely in a cache.
            if fits and (best is None or buffer.numel() <= self._free[best].numel()):
                best = index
        if best is None:
            return None
        buffer = self._free.pop(best)
        self._kept_bytes -= buffer.numel()
        return buffer


def capacity_of(nbytes: int, *, pinned: bool) -> int:
    """The size of a new buffer for `nbytes`, which are pinned or more than SMALL_TENSOR_BYTES.

    The system sets aside all of a pinned buffer at once, and other memory page by page as it is written. A small pinned
    buffer is therefore not much larger than requested.
    """
    granule = SMALL_TENSOR_BYTES if pinned else _GRANULE_BYTES
    if nbytes >= _HUGE_PAGE_BYTES:
        granule = _HUGE_PAGE_BYTES
    return max(1, -(-nbytes // granule)) * granule


def _new(nbytes: int, *, pinned: bool) -> torch.Tensor:
    if torch.is_inference_mode_enabled():
        # A tensor made in inference mode could not be written to outside of it.
        with torch.inference_mode(False):
            return _new(nbytes, pinned=pinned)
    if pinned or nbytes <= SMALL_TENSOR_BYTES:
        return torch.empty(nbytes, dtype=torch.uint8, device="cpu", pin_memory=pinned)
    return torch.frombuffer(_huge_pages(nbytes), dtype=torch.uint8)


def _huge_pages(nbytes: int) -> mmap.mmap:
    """New memory, in huge pages if the system gives them. Raises MemoryError."""
    try:
        pages = mmap.mmap(-1, nbytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    except OSError as error:
        if is_from_signal_handler(error):
            raise
        raise MemoryError(f"{nbytes} bytes for a snapshot: {error}") from error
    # A kernel may be built without huge pages, and other systems than Linux lack the constant.
    try:
        pages.madvise(mmap.MADV_HUGEPAGE)
    except (OSError, AttributeError) as error:
        if is_from_signal_handler(error):
            raise
    return pages
