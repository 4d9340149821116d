"""Where a tensor's values really lie: a DTensor or AsyncCollectiveTensor holds another tensor, which has the memory.

Neither class is imported here. An object of a class whose module nobody has imported cannot exist, so `sys.modules`
answers, and a job without distributed code pays nothing.
"""

from __future__ import annotations

import sys
from typing import Any

import torch

# Most tensors are just that, and every point asks several times.
_PLAIN = (torch.Tensor, torch.nn.Parameter)


def is_dtensor(tensor: torch.Tensor) -> bool:
    """True for a `torch.distributed.tensor.DTensor`, also one that is a Parameter."""
    return _is_instance(tensor, "torch.distributed.tensor", "DTensor")


def is_async_collective(tensor: torch.Tensor) -> bool:
    """True for an `AsyncCollectiveTensor`: the result, possibly still under way, of a functional collective."""
    return _is_instance(tensor, "torch.distributed._functional_collectives", "AsyncCollectiveTensor")


def _is_instance(tensor: torch.Tensor, module_name: str, class_name: str) -> bool:
    cls = getattr(sys.modules.get(module_name), class_name, None)
    return cls is not None and isinstance(tensor, cls)


def local_tensor(tensor: torch.Tensor, *, wait: bool = True) -> torch.Tensor:
    """The plain tensor in whose memory this rank's values lie; `tensor` itself where it is one.

    Of a DTensor that is the local shard (shape and strides are the shard's). A pending collective is waited for, so
    that the values may be read and written; `wait=False` is for questions about shape, dtype and memory only.
    No autograd graph is recorded. Every rank may call this alone: nothing is communicated.
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
    """`torch.no_grad()` around work of our own, at a tenth of its cost: it stands in every point, several times."""

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

    Where `target` is no DTensor, `local` is returned as it is. Nothing is communicated and nothing is recorded.
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
