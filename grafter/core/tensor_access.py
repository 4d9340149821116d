"""The tensor that holds the memory: a DTensor or AsyncCollectiveTensor contains another tensor.

Neither class is imported here. An object can only exist if its class's module is imported, so `sys.modules` is checked,
and a job without distributed code does not import that module.
"""

from __future__ import annotations

import sys
from typing import Any

import torch

# Most tensors are of these classes, and every point checks several times.
_PLAIN = (torch.Tensor, torch.nn.Parameter)


def is_dtensor(tensor: torch.Tensor) -> bool:
    """True for a `torch.distributed.tensor.DTensor`, including one that is a Parameter."""
    return _is_instance(tensor, "torch.distributed.tensor", "DTensor")


def is_async_collective(tensor: torch.Tensor) -> bool:
    """True for an `AsyncCollectiveTensor`: the result of a functional collective, which may still be pending."""
    return _is_instance(tensor, "torch.distributed._functional_collectives", "AsyncCollectiveTensor")


def _is_instance(tensor: torch.Tensor, module_name: str, class_name: str) -> bool:
    cls = getattr(sys.modules.get(module_name), class_name, None)
    return cls is not None and isinstance(tensor, cls)


def local_tensor(tensor: torch.Tensor, *, wait: bool = True) -> torch.Tensor:
    """The plain tensor whose memory holds this rank's values; `tensor` itself if it is plain.

    For a DTensor this is the local shard (shape and strides are the shard's). A pending collective is waited for, so
    that the values may be read and written; use `wait=False` for questions about shape, dtype and memory only. No
    autograd graph is recorded. Every rank may call this independently, because nothing is communicated.
    """
    if type(tensor) in _PLAIN:
        return tensor
    inner: Any = tensor
    if is_dtensor(inner):
        inner = inner._local_tensor
    if is_async_collective(inner):
        inner = inner.trigger_wait() if wait else inner.elem
    result: torch.Tensor = inner
    return result


class without_gradient:
    """`torch.no_grad()` for grafter's own work, at a tenth of its cost. Every point enters it several times."""

    __slots__ = ("_was_enabled",)

    def __enter__(self) -> None:
        self._was_enabled = torch.is_grad_enabled()
        if self._was_enabled:
            torch._C._set_grad_enabled(False)

    def __exit__(self, *_: object) -> None:
        if self._was_enabled:
            torch._C._set_grad_enabled(True)


def wrap_like(target: torch.Tensor, local: torch.Tensor) -> torch.Tensor:
    """`local` (this rank's shard) as a DTensor with the mesh, placements, shape and strides of `target`.

    If `target` is not a DTensor, `local` is returned unchanged. Nothing is communicated, and autograd records nothing.
    """
    if not is_dtensor(target):
        return local
    from torch.distributed.tensor import DTensor

    dtensor: Any = target
    with torch.no_grad():
        wrapped: torch.Tensor = DTensor.from_local(
            local,
            dtensor.device_mesh,
            dtensor.placements,
            run_check=False,
            shape=dtensor.shape,
            stride=dtensor.stride(),
        )
    return wrapped
