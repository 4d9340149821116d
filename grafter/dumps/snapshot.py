"""Snapshots: a tensor's values as they are at the call, in host memory of their own, whatever the program does next."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch

from grafter.dumps.buffers import Buffers
from grafter.dumps.writer import SAFETENSORS_NAMES
from grafter.writing.tensor_access import local_tensor

_REAL_OF = {torch.complex32: torch.float16, torch.complex64: torch.float32, torch.complex128: torch.float64}


class NothingToSave(Exception):
    """This tensor has no plain values; the text says why."""


@dataclass
class Snapshot:
    """A contiguous copy on the host. `values` has the tensor's own dtype and shape; `stored` is what the file holds:
    the same, or, where safetensors lacks the dtype, the same memory in another one (`stored_as`)."""

    values: torch.Tensor
    stored: torch.Tensor
    stored_as: str | None
    buffer: torch.Tensor
    # Where an accelerator copies: complete once these events have come.
    _copied: list[Any] = field(default_factory=list)

    @property
    def nbytes(self) -> int:
        return self.values.numel() * self.values.element_size()

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


def take_snapshot(local: torch.Tensor, buffers: Buffers) -> Snapshot:
    """Copy now, or, from an accelerator, in the order of its current stream: what the program queues next cannot
    change it. local: as `saveable` gave it. Called without grad."""
    nbytes = snapshot_bytes(local)
    buffer = buffers.take(nbytes, pinned=local.is_cuda)
    # A dtype of which torch can do no more than hold it is copied as its bytes.
    is_opaque = local.dtype not in SAFETENSORS_NAMES and local.dtype not in _REAL_OF
    source = local.view(torch.uint8) if is_opaque else local
    copy = buffer[:nbytes].view(source.dtype).view(source.shape)
    copied = []
    if local.is_cuda:
        copy.copy_(source, non_blocking=True)
        event = torch.cuda.Event()  # type: ignore[no-untyped-call]
        event.record(torch.cuda.current_stream(local.device))
        copied.append(event)
    else:
        copy.copy_(source)
    if local.dtype in _REAL_OF:
        real = _REAL_OF[local.dtype]
        stored = buffer[:nbytes].view(real).view(*local.shape, 2)
        return Snapshot(copy, stored, _name(real), buffer, copied)
    if is_opaque:
        return Snapshot(copy, copy, "uint8", buffer, copied)
    return Snapshot(copy, copy, None, buffer, copied)


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
