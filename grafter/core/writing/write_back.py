"""Write-back: the incoming value goes to the target's memory (or to a new tensor), and gradients stay defined.

There are two steps, because the receivers agree between them. `check_write` runs on every receiver and says whether the
write is possible. Once all of them have agreed, `apply_write` does it and has no reason left to fail.
`docs/write-modes.md` says what each mode means for values and gradients.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch.autograd.grad_mode import _unsafe_preserve_version_counter as preserve_version_counter
from torch.autograd.graph import increment_version

from grafter.core.copying import copy
from grafter.core.tensor_access import is_async_collective, is_dtensor, local_tensor, wrap_like
from grafter.core.writing.conversion import count_saturated, why_not_convertible
from grafter.errors import WriteRefused

if TYPE_CHECKING:
    from grafter.core.layout.row_view import RowView


@dataclass(frozen=True)
class WriteMode:
    """Where the value goes (`write`), and what happens to the gradient there (`gradient`)."""

    write: Literal["in_place", "return"] = "in_place"
    gradient: Literal["straight_through", "cut", "strict"] = "straight_through"


_PLAINEST = WriteMode()


# Not frozen: an instance is made at every point, and freezing would triple its cost.
@dataclass
class Written:
    """The result of a write. `value` is what `dump` returns: the target itself for `in_place`, a new tensor for
    `return`.

    saturated: the number of values outside the range of the target's dtype; None if the dtype did not change.
    """

    value: torch.Tensor
    saturated: int | None


def check_write(target: torch.Tensor, incoming: torch.Tensor, mode: WriteMode) -> None:
    """Raise WriteRefused, with the reason and the remedy, unless `apply_write` with these arguments can succeed.

    target: any dense tensor; for a DTensor, its local shard is meant. incoming: a dense tensor with the same shape (as
    the local shard), on any device, whose dtype converts without loss beyond rounding. Nothing is changed, and a
    pending collective is not waited for. The only failure that cannot be foreseen here is running out of memory.
    """
    into, value = _dense(target, "the tensor to write into"), _dense(incoming, "the incoming value")
    if into.shape != value.shape:
        raise _refused(
            f"a value of shape {list(value.shape)} cannot be written into a tensor of shape {list(into.shape)}. Shapes "
            "must be equal; nothing is broadcast. A transform can convert one shape to the other."
        )
    why = why_not_convertible(value.dtype, into.dtype)
    if why is not None:
        raise _refused(
            f"{value.dtype} cannot be written into {into.dtype}: {why}. A transform that casts makes the conversion "
            "explicit."
        )
    if mode.write == "in_place":
        _check_memory(into)
        if _records_graph(target):
            _check_gradient(target, mode)


def _refused(text: str) -> WriteRefused:
    return WriteRefused(f"{text} Nothing was written.")


def _dense(tensor: torch.Tensor, what: str) -> torch.Tensor:
    """The local tensor. Raises WriteRefused for every kind of tensor that is not a plain block of values in memory."""
    if torch._C._functorch.is_functorch_wrapped_tensor(tensor):
        raise _refused(
            f"{what} is inside a torch.func transform (vmap, grad, ...), where it does not have a single value."
        )
    inner = tensor if type(tensor) is torch.Tensor else _unwrapped(tensor, what)
    if inner.is_nested or inner.layout != torch.strided:
        kind = "nested" if inner.is_nested else f"of layout {inner.layout}"
        raise _refused(f"{what} is {kind}; only dense (strided) tensors can be grafted. Dump its dense parts.")
    if inner.is_quantized:
        raise _refused(f"{what} is quantised ({inner.dtype}); graft its `int_repr()` or its dequantised values.")
    if inner.is_meta:
        raise _refused(f"{what} is on the meta device and has no values.")
    return inner


def _unwrapped(tensor: torch.Tensor, what: str) -> torch.Tensor:
    if torch.nn.parameter.is_lazy(tensor):
        raise _refused(f"{what} is an uninitialised parameter. Run the module once before this point.")
    inner = local_tensor(tensor, wait=False)
    if type(inner).__torch_dispatch__ is not torch.Tensor.__torch_dispatch__:
        raise _refused(
            f"{what} is a {type(inner).__name__}, which is made of other tensors; only DTensor and "
            "AsyncCollectiveTensor can be looked through. Dump the tensors inside it."
        )
    return inner


def _check_memory(into: torch.Tensor) -> None:
    if into._is_zerotensor():
        raise _refused("the tensor to write into is autograd's shared all-zero tensor. Dump a `.clone()`, or `return`.")
    if _may_overlap_itself(into):
        raise _refused(
            f"the tensor to write into (shape {list(into.shape)}, strides {list(into.stride())}) has elements that "
            "may share memory (expand, as_strided), so no write gives each its own value. Dump it `.contiguous()`, or "
            "use write=return."
        )
    if not _has_memory(into):
        raise _refused("the storage of the tensor to write into was freed (FSDP does this to resharded parameters).")


def _has_memory(tensor: torch.Tensor) -> bool:
    """False if the storage was freed, and for autograd's shared zero tensor."""
    if tensor._is_zerotensor():
        return False
    return not tensor.numel() or tensor.untyped_storage().nbytes() >= _span_bytes(tensor)


def _may_overlap_itself(tensor: torch.Tensor) -> bool:
    """True unless the strides prove that no two elements share memory.

    Dims are checked in order of stride: each step must lead beyond everything that the dims before it reach.
    """
    if tensor.is_contiguous() or tensor.numel() == 0:
        return False
    reach = 0
    for stride, size in sorted(zip(tensor.stride(), tensor.shape, strict=True)):
        if size == 1:
            continue
        if stride <= reach:
            return True
        reach += (size - 1) * stride
    return False


def _span_bytes(tensor: torch.Tensor) -> int:
    """The number of bytes from the start of the storage to the end of the last element. tensor: not empty."""
    if tensor.is_contiguous():
        return int(tensor.storage_offset() + tensor.numel()) * tensor.element_size()
    reach = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return int(tensor.storage_offset() + reach + 1) * tensor.element_size()


def _records_graph(target: torch.Tensor) -> bool:
    return target.requires_grad and torch.is_grad_enabled()


def _check_gradient(target: torch.Tensor, mode: WriteMode) -> None:
    """Refuse what autograd would refuse later: at the write (cut), or in the next consumer (strict)."""
    if mode.gradient == "straight_through":
        return
    if target._is_view():
        made = _forbidden_view(target)
        if made is not None:
            raise _refused(
                f"gradient={mode.gradient} cannot be done in place on {made}: autograd does not let such a view be "
                "modified. Use write=return."
            )
    if mode.gradient == "strict":
        return
    base = target._base if target._is_view() else target
    if base is not None and base.is_leaf and base.requires_grad:
        raise _refused(
            "gradient=cut cannot be done in place on a leaf that requires grad (a parameter), or on a view of one: it "
            "has no producer to cut off, and would stop being trained. Use write=return."
        )
    # torch offers no way to do this: `detach_` refuses views, and acts only on the inner tensor of a pending
    # collective.
    if is_async_collective(target):
        raise _refused(
            "gradient=cut cannot be done in place on the result of a functional collective. Use write=return."
        )
    if is_dtensor(target) and target._is_view():
        raise _refused("gradient=cut cannot be done in place on a view of a DTensor. Use write=return.")


def _forbidden_view(view: torch.Tensor) -> str | None:
    """How a view was made, if autograd forbids modifying it; None for an ordinary view."""
    autograd: Any = torch._C._autograd
    how = autograd._get_creation_meta(view)
    named: dict[Any, str] = {
        autograd.CreationMeta.MULTI_OUTPUT_NODE: "an output of chunk, split or unbind",
        autograd.CreationMeta.IN_CUSTOM_FUNCTION: "a view made inside a torch.autograd.Function",
        autograd.CreationMeta.NO_GRAD_MODE: "a view made under no_grad",
        autograd.CreationMeta.INFERENCE_MODE: "a view made under inference_mode",
    }
    return named.get(how)


def apply_write(target: torch.Tensor, incoming: torch.Tensor, mode: WriteMode) -> Written:
    """Write what `check_write` has accepted.

    `incoming` may be overwritten as soon as this returns (on a GPU: by work queued on the current stream).

    in_place: writes to the target's memory and returns `target`; shape, strides and dtype stay.
    return: leaves the target's memory unchanged. The result has its shape, dtype and device (and mesh and placements),
    and its own memory. If the values equal those of the target bit for bit, the result is the target.
    """
    if mode == _PLAINEST and _is_plain_copy(target, incoming):
        copy(target.data, incoming)
        return Written(target, None)
    into = local_tensor(target)
    with torch.no_grad():
        value = local_tensor(incoming).detach()
        saturated = None if value.dtype == into.dtype else count_saturated(value, into.dtype)
    if mode.write == "return":
        # Another node in the graph would change the order in which autograd adds gradients, although no value changed.
        if mode.gradient != "cut" and _same_bits(into, value):
            return Written(target, saturated)
        return Written(_return_value(target, into, value, mode), saturated)
    with torch.no_grad():
        # A transform may return the target itself, or a view of it; torch refuses to copy between overlapping tensors.
        if same_storage(into, value):
            value = value.clone()
    _write_in_place(target, into, value, mode)
    return Written(target, saturated)


def apply_row_write(target: torch.Tensor, incoming: torch.Tensor, rows: RowView, mode: WriteMode) -> Written:
    """`apply_write` for some rows only: `incoming` holds those rows, [rows.count, ...], and all others stay unchanged.

    In place, only the rows' memory is written. `return`, and a gradient that is cut, copy the whole tensor.
    """
    into = local_tensor(target)
    with torch.no_grad():
        value = local_tensor(incoming).detach()
        saturated = None if value.dtype == into.dtype else count_saturated(value, into.dtype)
        if mode.write == "in_place" and mode.gradient != "cut":
            if same_storage(into, value):
                value = value.clone()
            rows.put(into.data, value)
            _raise_version(target, into, mode)
            return Written(target, saturated)
        whole = into.detach().clone()
        rows.put(whole, value)
    return Written(apply_write(target, whole, mode).value, saturated)


def _is_plain_copy(target: torch.Tensor, incoming: torch.Tensor) -> bool:
    """Whether a plain copy is enough: no graph, no wrapper, no conversion.

    Most writes are of this kind, and for small ones the other checks would cost more than the copy.
    """
    return (
        type(target) is torch.Tensor
        and type(incoming) is torch.Tensor
        and not target.requires_grad
        and not incoming.requires_grad
        and target.dtype == incoming.dtype
        and not target.is_inference()
        and not target._is_view()
        and not same_storage(target, incoming)
    )


def same_storage(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Whether two dense tensors lie in one piece of memory, overlapping or not."""
    return a.device == b.device and a.untyped_storage().data_ptr() == b.untyped_storage().data_ptr()


_INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def _same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Whether two tensors are equal bit for bit: true if both are NaN, false if one is 0 and the other -0."""
    if a.dtype != b.dtype or a.device != b.device or not (_has_memory(a) and _has_memory(b)):
        return False
    with torch.no_grad():
        if a.is_complex():
            a, b = torch.view_as_real(a.resolve_conj()), torch.view_as_real(b.resolve_conj())
        integer = _INTEGERS[a.element_size()]
        return torch.equal(a.resolve_neg().detach().view(integer), b.resolve_neg().detach().view(integer))


def _write_in_place(target: torch.Tensor, into: torch.Tensor, value: torch.Tensor, mode: WriteMode) -> None:
    if mode.gradient == "cut" and _records_graph(target) and target._is_view():
        # A view can't be detached in place. After a copy under autograd, its base knows that this part has another
        # producer, which has no gradient. The values that the producer saved stay usable, because its version isn't
        # raised.
        with preserve_version_counter(target):
            target.copy_(value)
        return
    with torch.no_grad():
        # `.data` shares the memory but not the version counter, and works on leaves, views and inference tensors.
        copy(into.data, value)
    if mode.gradient == "cut" and _records_graph(target):
        target.detach_()
    _raise_version(target, into, mode)


def _raise_version(target: torch.Tensor, into: torch.Tensor, mode: WriteMode) -> None:
    if mode.gradient == "strict" and not target.is_inference():
        increment_version(target)
        if into is not target and not into.is_inference():
            increment_version(into)


def _return_value(target: torch.Tensor, into: torch.Tensor, value: torch.Tensor, mode: WriteMode) -> torch.Tensor:
    with torch.no_grad():
        # The staging memory is reused for the next point, so the result is a copy.
        grafted = wrap_like(target, torch.empty_like(into).copy_(value))
    if mode.gradient == "cut" or not _records_graph(target):
        return grafted
    through: torch.Tensor = _StraightThrough.apply(target, (grafted,))  # type: ignore[no-untyped-call]
    return through


class _StraightThrough(torch.autograd.Function):
    """Forward: the grafted value. Backward: its gradient, unchanged, becomes the gradient of the tensor that it
    replaces.
    """

    @staticmethod
    def forward(ctx: Any, target: torch.Tensor, grafted: tuple[torch.Tensor]) -> torch.Tensor:
        # It is passed in a tuple, so that it is not an input of the Function. An input that is returned becomes a view,
        # and a model that then adds its residual in place would be refused.
        return grafted[0]

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor, None]:
        return gradients[0], None

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> Any:
        return tangents[0].view_as(tangents[0])
