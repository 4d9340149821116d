"""Kept writes: what a point wrote in the forward pass, to be written again when its region is recomputed."""

from __future__ import annotations

import threading
from collections import deque
from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from grafter.core.leaves import Leaves, take_apart
from grafter.core.points import PointKey
from grafter.core.tensor_access import local_tensor
from grafter.core.untraced import unobserved
from grafter.core.writing.write_back import WriteMode, apply_write, check_write
from grafter.errors import UsageError, WriteRefused

# What is kept on accelerators in all; beyond it, on the CPU.
MAX_KEPT_ON_DEVICE_BYTES = 1 << 30

_PLAINEST = WriteMode()


class KeptTensor:
    """A copy of one written tensor (its local shard), on its own device or, above the limit, on the CPU."""

    _lock = threading.Lock()
    _on_device_bytes = 0
    # A tensor may be freed at any moment, also by the thread that holds the lock.
    _freed: ClassVar[deque[int]] = deque()

    def __init__(self, written: torch.Tensor) -> None:
        self._nbytes = 0
        nbytes = written.numel() * written.element_size()
        if written.device.type == "cpu":
            self.tensor = written.detach().clone()
        elif self._has_room_for(nbytes):
            self._nbytes = nbytes
            self.tensor = written.detach().clone()
        else:
            self.tensor = written.detach().to("cpu")

    def __del__(self) -> None:
        if self._nbytes:
            KeptTensor._freed.append(self._nbytes)

    @classmethod
    def _has_room_for(cls, nbytes: int) -> bool:
        with cls._lock:
            while cls._freed:
                cls._on_device_bytes -= cls._freed.popleft()
            if cls._on_device_bytes + nbytes > MAX_KEPT_ON_DEVICE_BYTES:
                return False
            cls._on_device_bytes += nbytes
            return True


@dataclass(frozen=True)
class Kept:
    """What one point did in the forward pass. `values`: one per tensor; None where nothing was written here.

    were_leaves: which of the tensors were autograd leaves that require grad.
    """

    key: PointKey
    mode: WriteMode = _PLAINEST
    values: tuple[KeptTensor, ...] | None = None
    were_leaves: tuple[bool, ...] = ()

    @classmethod
    def of(cls, key: PointKey, mode: WriteMode, leaves: Leaves, written: Any) -> Kept:
        """leaves: the value of a point that was written to; written: what `dump` returned for it."""
        with unobserved(), torch.no_grad():
            values = tuple(KeptTensor(tensor) for tensor in take_apart(written).tensors)
        return cls(key, mode, values, tuple(_is_leaf(original) for original in leaves.originals))

    @property
    def is_cut(self) -> bool:
        return self.values is not None and self.mode.gradient == "cut"

    def write_again(self, value: Any) -> Any:
        """What `dump` returns in the recomputation. Raises UsageError where the value cannot take the same write."""
        # Also where nothing is written: it waits for a pending collective, as the forward pass did.
        leaves = take_apart(value)
        if self.values is None:
            return value
        if len(self.values) != len(leaves.originals):
            raise UsageError(
                f"the point {self.key} has {len(leaves.originals)} tensors in the recomputation, and had "
                f"{len(self.values)} in the forward pass. A checkpointed region must do the same both times."
            )
        with unobserved():
            written = [
                self._write(original, kept.tensor, was_leaf)
                for original, kept, was_leaf in zip(leaves.originals, self.values, self.were_leaves, strict=True)
            ]
        return leaves.rebuilt(written)

    def _write(self, original: torch.Tensor, value: torch.Tensor, was_leaf: bool) -> torch.Tensor:
        if self.mode == WriteMode("in_place", "cut") and _is_leaf(original) and not was_leaf:
            # An input of a reentrant region stands in for a tensor that has a producer, which gets no gradient.
            local_tensor(original).data.copy_(value)
            return original.detach_()
        try:
            check_write(original, value, self.mode)
        except WriteRefused as error:
            raise UsageError(
                f"the point {self.key} was written in the forward pass, and cannot be written again in the "
                f"recomputation of its region: {error}"
            ) from error
        return apply_write(original, value, self.mode).value


def _is_leaf(tensor: torch.Tensor) -> bool:
    return tensor.requires_grad and tensor.is_leaf
