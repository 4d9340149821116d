"""The memory that a rank receives into: one block, reused from point to point, shareable with senders of this host.

It is the staged value itself, so that nothing is copied before the write. Touching new memory costs eight times a
reuse, so a block is kept until a larger one is needed. It is never resized, and sealed against shrinking: a sender
that has mapped it can rely on it.
"""

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
    """There is no memory for what is announced; the text says how much was asked for and how much there is."""


class Staging:
    """One rank's receiving memory. `generation` counts the blocks; 0 means that there is none yet."""

    def __init__(self) -> None:
        self.generation = 0
        self.capacity = 0
        self.fd = -1
        self._block: mmap.mmap | None = None
        self._idle_references = 0

    def prepare(self) -> tuple[int, int]:
        """(generation, bytes) to announce for the next point.

        A block that somebody still holds a view of (a transform that kept a tensor it received) is left to them, so
        that their values never change under their hands.
        """
        if self._is_held():
            self.release()
        return self.generation, self.capacity

    def _is_held(self) -> bool:
        return self._block is not None and sys.getrefcount(self._block) > self._idle_references

    def reserve(self, nbytes: int) -> bool:
        """Make room; True if that took a new block. Raises StagingRefused rather than being killed for it."""
        if nbytes <= self.capacity:
            return False
        available = _available_bytes()
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
        """Bytes of the block, as a uint8 tensor that keeps the block alive."""
        if nbytes == 0:
            return torch.empty(0, dtype=torch.uint8)
        assert self._block is not None
        return view_bytes(self._block, offset, nbytes)

    def tensor(self, offset: int, dtype: torch.dtype, shape: tuple[int, ...]) -> torch.Tensor:
        """A value in the block, contiguous, that keeps the block alive. By as few calls of torch as that takes."""
        numel = math.prod(shape)
        if numel == 0:
            return torch.empty(shape, dtype=dtype)
        assert self._block is not None
        flat = torch.frombuffer(self._block, dtype=dtype, count=numel, offset=offset)
        return flat if len(shape) == 1 else flat.view(shape)

    def release(self) -> None:
        """Forget the block. Its memory goes at once, or, if somebody holds a view of it, with the last of those."""
        if self.fd >= 0:
            if not self._is_held() and self._block is not None:
                # Senders may have it mapped until they are given a larger one, which can be never.
                self._block.madvise(mmap.MADV_REMOVE)
            os.close(self.fd)
        self.fd, self._block, self.capacity = -1, None, 0


def view_bytes(block: mmap.mmap, offset: int, nbytes: int) -> torch.Tensor:
    return torch.frombuffer(block, dtype=torch.uint8, count=nbytes, offset=offset)


def as_tensor(block_bytes: torch.Tensor, dtype: torch.dtype, shape: tuple[int, ...]) -> torch.Tensor:
    """The same bytes as a contiguous tensor of a dtype and shape."""
    if block_bytes.numel() == 0:
        return torch.empty(shape, dtype=dtype)
    return block_bytes.view(dtype).view(shape)


def new_block(capacity: int) -> tuple[mmap.mmap, int]:
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
    """Whether a peer's block has the size that it says and cannot shrink: else a write into it could kill us."""
    seals = fcntl.fcntl(fd, fcntl.F_GET_SEALS)
    return bool(seals & fcntl.F_SEAL_SHRINK) and os.fstat(fd).st_size >= nbytes


def _available_bytes() -> int | None:
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
