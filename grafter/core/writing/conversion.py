"""Which dtype may be written to which, and how many values a conversion loses.

Allowed: the same dtype; any floating dtype to any other; complex to complex; real to complex; bool and integers to any
integer dtype that holds all of their values, and to any floating dtype. A conversion that could change a value beyond
rounding is either refused by dtype or counted as saturated.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch

# Values per block when counting. This limits the temporaries to a few MiB, whatever the tensor's size.
_BLOCK_NUMEL = 1 << 18

_FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
_FLOATS8 = (torch.float8_e4m3fn, torch.float8_e5m2, torch.float8_e4m3fnuz, torch.float8_e5m2fnuz)
_COMPLEX = (torch.complex32, torch.complex64, torch.complex128)
_INTEGERS = (
    *(torch.int8, torch.int16, torch.int32, torch.int64),
    *(torch.uint8, torch.uint16, torch.uint32, torch.uint64),
)
_ORDINARY = frozenset((torch.bool, *_FLOATS, *_FLOATS8, *_COMPLEX, *_INTEGERS))
# Packed or scale dtypes, if torch has them: their bits can be copied, but a conversion of values has no meaning.
_BITS_ONLY = frozenset(getattr(torch, name) for name in ("float8_e8m0fnu", "float4_e2m1fn_x2") if hasattr(torch, name))
_WITH_AMINMAX = frozenset((*_FLOATS, torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64))
_WITHOUT_INFINITY = frozenset((torch.float8_e4m3fn, torch.float8_e4m3fnuz, torch.float8_e5m2fnuz))


def why_not_convertible(source: torch.dtype, destination: torch.dtype) -> str | None:
    """The reason why values of dtype `source` may not be written to a tensor of dtype `destination`;
    None if they may.
    """
    if source == destination and source in _ORDINARY | _BITS_ONLY:
        return None
    if source not in _ORDINARY or destination not in _ORDINARY:
        return "grafter does not convert between these dtypes; use the same dtype in both jobs"
    if destination == torch.bool:
        return "only bool may be written into bool"
    if source.is_complex and not destination.is_complex:
        return "the imaginary part would be lost"
    if destination in _INTEGERS and source in (*_FLOATS, *_FLOATS8):
        return "the fractions would be lost"
    if destination in _INTEGERS and source in _INTEGERS and not _holds_all(source, destination):
        return f"{destination} does not hold all values of {source}"
    return None


def _holds_all(source: torch.dtype, destination: torch.dtype) -> bool:
    narrow, wide = torch.iinfo(source), torch.iinfo(destination)
    return wide.min <= narrow.min and narrow.max <= wide.max


def count_saturated(incoming: torch.Tensor, destination: torch.dtype) -> int:
    """The number of values of `incoming` outside the range of `destination`: they become infinite, NaN, or its largest
    value.

    An infinity that stays infinite and a NaN that stays NaN are not counted, nor is a value that only rounds to the
    largest one. The parts of a complex value are counted separately. The result is 0 immediately if the dtypes rule it
    out, or after one quick pass if no value is large; otherwise values are counted in blocks. On a GPU, each of the two
    passes synchronises the host once.

    The dtypes must be ones that `why_not_convertible` allows.
    """
    to = _real(destination)
    if not to.is_floating_point or not _may_saturate(_real(incoming.dtype), to):
        return 0
    if incoming.numel() == 0 or _all_within(incoming, torch.finfo(to).max):
        return 0
    counts = [_saturated_in(block, to) for block in _blocks(incoming)]
    return int(torch.stack(counts).sum().item())


def _real(dtype: torch.dtype) -> torch.dtype:
    return dtype.to_real() if dtype.is_complex else dtype


def _may_saturate(source: torch.dtype, to: torch.dtype) -> bool:
    if source == to or source == torch.bool:
        return False
    if source.is_floating_point:
        return to in _WITHOUT_INFINITY or torch.finfo(source).max > torch.finfo(to).max
    return torch.iinfo(source).max > torch.finfo(to).max


def _all_within(tensor: torch.Tensor, bound: float) -> bool:
    """True if one quick pass shows that every value is in [-bound, bound]. False also for NaN or an unusual dtype."""
    if tensor.is_complex() and not tensor.is_conj():
        tensor = torch.view_as_real(tensor)
    if tensor.dtype not in _WITH_AMINMAX:
        return False
    low, high = torch.stack(torch.aminmax(tensor)).tolist()
    return bool(-bound <= low and high <= bound)


def _saturated_in(block: torch.Tensor, to: torch.dtype) -> torch.Tensor:
    """The number of saturated values of one block, as a 0-dim int64 tensor on the block's device."""
    if block.is_complex():
        block = torch.view_as_real(block.resolve_conj())
    # Compare in a dtype that has comparisons (8-bit floats don't) and that holds the threshold exactly.
    wide = torch.float64 if block.dtype in (torch.float64, *_INTEGERS) else torch.float32
    value, written = block.to(wide), block.to(to).to(wide)
    finite = value.isfinite()
    # A value above this does not round to the largest value; it is clipped to it, if the dtype (or device) clips.
    clipped = finite & (value.abs() > _rounds_to_largest_below(to))
    lost = clipped | (finite != written.isfinite()) | written.isnan()
    return (lost & ~value.isnan()).sum()


def _rounds_to_largest_below(dtype: torch.dtype) -> float:
    """The largest value of `dtype` plus half a unit in its last place: 65520 for float16, 464 for float8_e4m3fn."""
    info = torch.finfo(dtype)
    exponent = torch.frexp(torch.tensor(info.max, dtype=torch.float64)).exponent.item() - 1
    return float(info.max + info.eps * 2.0**exponent / 2)


def _blocks(tensor: torch.Tensor) -> Iterator[torch.Tensor]:
    """Views that together hold each value once, none larger than a block. They never copy, whatever the strides."""
    if tensor.numel() == 0:
        return
    if tensor.numel() <= _BLOCK_NUMEL:
        yield tensor
    elif tensor.is_contiguous():
        yield from torch.split(tensor.view(-1), _BLOCK_NUMEL)
    else:
        longest = max(range(tensor.dim()), key=tensor.size)
        for half in tensor.chunk(2, dim=longest):
            yield from _blocks(half)
