"""Host memory for snapshots, used again and again: touching new memory costs up to six times what a copy into it does.

Large buffers ask the system for huge pages, where that has them on request (`madvise`, the default of most): memory
that is new then costs as much again as the copy, and not five times as much. Small tensors share one buffer after
another (`SharedBuffer`), so that those are at home in huge pages, too.
"""

from __future__ import annotations

import ctypes
import mmap
import threading

import torch

from grafter.core.signal_handlers import is_from_signal_handler

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
