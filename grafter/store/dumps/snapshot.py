"""Snapshots: a tensor's values as they are at the call, in host memory of their own, whatever the program does next."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch

from grafter.core.copying import copy
from grafter.core.tensor_access import local_tensor
from grafter.store.dumps.buffers import SMALL_BYTES, Buffers, SharedBuffer, capacity_of
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
