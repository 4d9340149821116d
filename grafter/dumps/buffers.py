"""Host memory for snapshots, used again and again: touching new memory costs a copy four to eight times over.

A dump that finds no buffer first waits for one, at most as long as a new one would take; what was missed is made in the
background, once the writer has nothing else to do, so that the next burst finds it.
"""

from __future__ import annotations

import threading

import torch

# Below it the allocator of the process reuses memory by itself.
SMALL_BYTES = 1 << 16
_GRANULE_BYTES = 1 << 20
# About the pace at which new memory is touched: whoever has waited so long in vain has paid twice, and no more.
_WAIT_SECONDS_PER_BYTE = 1 / (1 << 30)


class Buffers:
    """Buffers of one rank, used by the threads that dump and the one that writes. `limit_bytes` bounds what is kept."""

    def __init__(self, limit_bytes: int) -> None:
        self._limit = limit_bytes
        self._free: list[torch.Tensor] = []
        self._kept_bytes = self._in_use = 0
        self._wanted: list[int] = []
        self._returned = threading.Condition()
        self._is_abandoned = False

    def take(self, nbytes: int, *, pinned: bool = False) -> torch.Tensor:
        """A uint8 tensor in host memory of at least `nbytes`; pinned where an accelerator copies into it."""
        if nbytes <= SMALL_BYTES and not pinned:
            return _new(nbytes, pinned=False)
        capacity = -(-nbytes // _GRANULE_BYTES) * _GRANULE_BYTES
        with self._returned:
            found = self._fitting(capacity, pinned)
            if found is None and self._in_use and not pinned:
                self._wanted.append(capacity)
                self._returned.wait_for(
                    lambda: self._has_fitting(capacity, pinned), timeout=capacity * _WAIT_SECONDS_PER_BYTE
                )
                found = self._fitting(capacity, pinned)
            self._in_use += 1
        return found if found is not None else _new(capacity, pinned=pinned)

    def give_back(self, buffer: torch.Tensor) -> None:
        if buffer.numel() <= SMALL_BYTES and not buffer.is_pinned():
            return
        # A signal may end the program while its thread holds the lock, and that then waits for this one.
        if self._is_abandoned or not self._returned.acquire(timeout=1.0):
            self._is_abandoned = True
            return
        try:
            self._in_use -= 1
            self._keep(buffer)
            self._returned.notify_all()
        finally:
            self._returned.release()

    def make_wanted(self) -> bool:
        """Make one buffer that was missed; False if there is none to make. Takes as long as touching it does."""
        with self._returned:
            room = self._limit - self._kept_bytes - sum(self._wanted[:1])
            if not self._wanted or room < 0:
                self._wanted.clear()
                return False
            capacity = self._wanted.pop()
        buffer = _new(capacity, pinned=False).zero_()
        with self._returned:
            self._keep(buffer)
            self._returned.notify_all()
        return True

    def _keep(self, buffer: torch.Tensor) -> None:
        self._free.append(buffer)
        self._kept_bytes += buffer.numel()
        while self._kept_bytes > self._limit and self._free:
            # The one that has not been of use for the longest time.
            self._kept_bytes -= self._free.pop(0).numel()

    def _index_of_fitting(self, capacity: int, pinned: bool) -> int | None:
        best = None
        for index, buffer in enumerate(self._free):
            fits = capacity <= buffer.numel() <= 2 * capacity and buffer.is_pinned() == pinned
            # Of equal ones the last that came back: its memory is the likeliest to be in a cache.
            if fits and (best is None or buffer.numel() <= self._free[best].numel()):
                best = index
        return best

    def _has_fitting(self, capacity: int, pinned: bool) -> bool:
        return self._index_of_fitting(capacity, pinned) is not None

    def _fitting(self, capacity: int, pinned: bool) -> torch.Tensor | None:
        index = self._index_of_fitting(capacity, pinned)
        if index is None:
            return None
        buffer = self._free.pop(index)
        self._kept_bytes -= buffer.numel()
        return buffer


def _new(nbytes: int, *, pinned: bool) -> torch.Tensor:
    if torch.is_inference_mode_enabled():
        # A tensor made there could not be written to outside of it.
        with torch.inference_mode(False):
            return _new(nbytes, pinned=pinned)
    return torch.empty(nbytes, dtype=torch.uint8, device="cpu", pin_memory=pinned)
