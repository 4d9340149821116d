"""The memory that a rank receives into: one block, reused from point to point, which senders of this host can map.

The staged values lie in it, so that nothing is copied before the write. Touching new memory takes eight times as long
as a reuse, so a block is kept until a larger one is needed. It is never resized, and sealed against shrinking, so that
a sender can rely on its mapping."""

from __future__ import annotations

import math
import mmap
import os
import sys
from pathlib import Path

import torch

from grafter.core.processes import is_from_signal_handler

try:
    import fcntl
except ImportError:  # not a Unix: no shared blocks there
    fcntl = None  # type: ignore[assignment]

_GRANULE_BYTES = 1 << 20


class StagingRefused(Exception):
    """There is no memory for what is announced; the text says how much is needed and how much there is."""


class Staging:
    """The receiving memory of one rank. generation: counts the blocks; 0 before the first. capacity: in bytes."""

    def __init__(self) -> None:
        self.generation = 0
        self.capacity = 0
        self.fd = -1
        self._block: mmap.mmap | None = None
        self._idle_references = 0

    def prepare(self) -> tuple[int, int]:
        """(generation, bytes) to announce for the next point.

        If a view of the block is still held (by a transform that kept a tensor it received), a new block is made, so
        that the values of that view never change.
        """
        if self._is_held():
            self.release()
        return self.generation, self.capacity

    def _is_held(self) -> bool:
        return self._block is not None and sys.getrefcount(self._block) > self._idle_references

    def reserve(self, nbytes: int) -> bool:
        """Make room for a point; returns whether that took a new block. Raises StagingRefused if there is no memory."""
        if nbytes <= self.capacity:
            return False
        available = available_bytes()
        if available is not None and nbytes > available:
            raise StagingRefused(
                f"{nbytes / 2**20:.0f} MiB are announced for this rank and {available / 2**20:.0f} MiB of memory are "
                "free"
            )
        self.release()
        capacity = -(-nbytes // _GRANULE_BYTES) * _GRANULE_BYTES
        try:
            self._block, self.fd = new_block(capacity)
        except (OSError, OverflowError, ValueError) as error:
            if is_from_signal_handler(error):
                raise
            raise StagingRefused(f"{nbytes / 2**20:.0f} MiB cannot be reserved: {error}") from error
        self.capacity = capacity
        self.generation += 1
        self._idle_references = sys.getrefcount(self._block)
        return True

    def view(self, offset: int, nbytes: int) -> torch.Tensor:
        """Bytes of the block: a uint8 tensor of shape (nbytes,) that keeps the block alive."""
        if nbytes == 0:
            return torch.empty(0, dtype=torch.uint8)
        assert self._block is not None
        return view_bytes(self._block, offset, nbytes)

    def tensor(self, offset: int, dtype: torch.dtype, shape: tuple[int, ...]) -> torch.Tensor:
        """A contiguous tensor in the block, which it keeps alive. Made with as few calls of torch as possible."""
        numel = math.prod(shape)
        if numel == 0:
            return torch.empty(shape, dtype=dtype)
        assert self._block is not None
        flat = torch.frombuffer(self._block, dtype=dtype, count=numel, offset=offset)
        return flat if len(shape) == 1 else flat.view(shape)

    def release(self) -> None:
        """Drop the block. Its memory is freed at once, or with the last view of it."""
        if self.fd >= 0:
            if not self._is_held() and self._block is not None:
                # Senders keep it mapped until they have a larger one, which may never happen.
                self._block.madvise(mmap.MADV_REMOVE)
            os.close(self.fd)
        self.fd, self._block, self.capacity = -1, None, 0


def view_bytes(block: mmap.mmap, offset: int, nbytes: int) -> torch.Tensor:
    """Bytes of a block: a uint8 tensor of shape (nbytes,) that keeps the block alive."""
    return torch.frombuffer(block, dtype=torch.uint8, count=nbytes, offset=offset)


def as_tensor(block_bytes: torch.Tensor, dtype: torch.dtype, shape: tuple[int, ...]) -> torch.Tensor:
    """The same bytes as a contiguous tensor of a dtype and shape."""
    if block_bytes.numel() == 0:
        return torch.empty(shape, dtype=dtype)
    return block_bytes.view(dtype).view(shape)


def new_block(capacity: int) -> tuple[mmap.mmap, int]:
    """(memory of so many bytes, its descriptor, or -1 where blocks cannot be shared). Raises OSError."""
    if not hasattr(os, "memfd_create") or fcntl is None:
        return mmap.mmap(-1, capacity), -1
    fd = os.memfd_create("grafter-staging", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    try:
        os.ftruncate(fd, capacity)
        fcntl.fcntl(fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL)
        return mmap.mmap(fd, capacity), fd
    except BaseException:
        os.close(fd)
        raise


def is_sealed_block(fd: int, nbytes: int) -> bool:
    """Whether a peer's block has the announced size and cannot shrink: otherwise using it could kill this process."""
    seals = fcntl.fcntl(fd, fcntl.F_GET_SEALS)
    return bool(seals & fcntl.F_SEAL_SHRINK) and os.fstat(fd).st_size >= nbytes


def available_bytes() -> int | None:
    try:
        text = Path("/proc/meminfo").read_text()
    except OSError as error:
        if is_from_signal_handler(error):
            raise
        return None
    for line in text.splitlines():
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) * 1024
    return None
