"""A tensor as chunks of its flattened index, read without a full-size copy, whatever its strides.

    index   0          CHUNK        2*CHUNK        numel
            |------------|------------|-------|
    a chunk of a strided tensor is at most a tail of a row, some whole rows, and a head of a row, in each dimension:

            . . . #  #        <- tail of the first row
            # # # #  #        <- whole rows, one copy
            # # . .  .        <- head of the last row

The chunks are the same for all strides and devices, so sums by chunk do not depend on the layout.
A complex tensor is read as its parts: real, imaginary, real, ..., as if its shape had a last dimension of 2. A tensor
of packed float4 values has two in each byte: the lower four bits are the first one, and both are read as float32.
"""

from __future__ import annotations

import hashlib
import math
from functools import lru_cache
from typing import Any

import torch
from numpy.typing import NDArray

# OpenBLAS splits a dot product of more than 10000 numbers over its threads, on whose number the digits then depend;
# torch splits anything of 32768 or more. 9984 is the largest multiple of 128 below the first limit, and three pieces
# stay below the second. The buffers of a chunk are 700 KiB, within a core's cache of 1 MiB; two pieces cost 5 % more.
PIECE = 9984
CHUNK = 3 * PIECE

_INTEGER_OF_SIZE = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
# Dtypes with values that float64 cannot represent.
LONG = (torch.int64, torch.uint64)
# Older versions of torch do not have it.
PACKED_FLOAT4 = getattr(torch, "float4_e2m1fn_x2", None)
_HALF = 1 << 32
_INTEGERS = frozenset(
    [torch.bool, torch.uint8, torch.int8, torch.uint16, torch.int16]
    + [torch.uint32, torch.int32, torch.uint64, torch.int64]
)


@lru_cache(maxsize=1)
def _float4_pairs() -> torch.Tensor:
    """[256, 2]: the two values of each byte (1 sign, 2 exponent and 1 mantissa bit), exactly, as float32."""
    positive = torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0])
    values = torch.cat([positive, -positive])
    byte = torch.arange(256)
    return torch.stack([values[byte & 15], values[byte >> 4]], dim=1)


@lru_cache(maxsize=64)
def are_paired(x: torch.dtype, y: torch.dtype) -> bool:
    """Whether each element is read as two parts: if either dtype is complex, or both are packed float4."""
    return x.is_complex or y.is_complex or (x == y == PACKED_FLOAT4)


class FlatReader:
    """Reads ranges of the flattened parts of one plain strided tensor, and never writes to it.

    tensor: of any shape, strides and device; a conjugate or negative bit may be set. as_complex: read a real tensor as
    complex, with imaginary parts of zero, to compare it with a complex one.
    """

    def __init__(self, tensor: torch.Tensor, as_complex: bool = False) -> None:
        self._tensor = tensor.detach()
        self._is_packed = tensor.dtype is PACKED_FLOAT4
        self._as_complex = as_complex and not tensor.is_complex()
        self._parts_per_element = 2 if as_complex or tensor.is_complex() or self._is_packed else 1
        self.parts = tensor.numel() * self._parts_per_element
        self._flat = self._whole_if_contiguous()
        self.flat_bits: NDArray[Any] | None = None
        if self._flat is not None and self._flat.device.type == "cpu":
            # Slices of numpy arrays cost a tenth of torch's.
            self.flat_bits = bits(self._flat).numpy()

    def _whole_if_contiguous(self) -> torch.Tensor | None:
        tensor = self._tensor
        lazy_bits = tensor.is_conj() or tensor.is_neg()
        if lazy_bits or self._as_complex or self._is_packed or not tensor.is_contiguous():
            return None
        return torch.view_as_real(tensor).view(-1) if tensor.is_complex() else tensor.view(-1)

    @property
    def dtype(self) -> torch.dtype:
        return self._tensor.dtype

    @property
    def device(self) -> torch.device:
        return self._tensor.device

    def read(self, start: int, stop: int) -> torch.Tensor:
        """Parts start..stop, 1-D, contiguous, of the tensor's (real) dtype: a view, or a copy of this range only.

        start and stop must be even if the tensor is read as complex.
        """
        if self._flat is not None:
            return self._flat[start:stop]
        scale = self._parts_per_element
        tensor = copyable(self._tensor)
        chunk = torch.empty((stop - start) // scale, dtype=tensor.dtype, device=tensor.device)
        gather(tensor, start // scale, stop // scale, chunk)
        if self._is_packed:
            return _float4_pairs().to(chunk.device)[chunk.view(torch.uint8).long()].view(-1)
        if tensor is not self._tensor:
            return chunk.view(self._tensor.dtype)
        if self._as_complex:
            pairs = torch.zeros(len(chunk), 2, dtype=chunk.dtype, device=chunk.device)
            pairs[:, 0] = chunk
            return pairs.view(-1)
        return torch.view_as_real(chunk).view(-1) if tensor.is_complex() else chunk


def gather(tensor: torch.Tensor, start: int, stop: int, out: torch.Tensor) -> None:
    """Copy the elements start..stop of the flattened index of `tensor` into `out`, 1-D [stop - start]."""
    if tensor.ndim <= 1:
        out.copy_(tensor.reshape(1)[start:stop] if tensor.ndim == 0 else tensor[start:stop])
        return
    if start == stop:
        return
    row = math.prod(tensor.shape[1:])
    first, offset = divmod(start, row)
    last, rest = divmod(stop, row)
    if first == last:
        gather(tensor[first], offset, rest, out)
        return
    filled = 0
    if offset:
        filled = row - offset
        gather(tensor[first], offset, row, out[:filled])
        first += 1
    if last > first:
        whole = (last - first) * row
        out[filled : filled + whole].view(last - first, *tensor.shape[1:]).copy_(tensor[first:last])
        filled += whole
    if rest:
        gather(tensor[last], 0, rest, out[filled:])


def bits(parts: torch.Tensor) -> torch.Tensor:
    """The same memory as integers of the same width, whose equality is that of bits."""
    return parts.view(_INTEGER_OF_SIZE[parts.element_size()])


@lru_cache(maxsize=64)
def is_opaque(dtype: torch.dtype) -> bool:
    """Whether torch stores values of this dtype without reading them as numbers. Only equality is defined."""
    return not (dtype in _INTEGERS or dtype.is_complex or dtype.is_floating_point)


def copyable(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor; if torch cannot copy values of its dtype, its memory as integers of the same width."""
    return bits(tensor) if is_opaque(tensor.dtype) or tensor.dtype is PACKED_FLOAT4 else tensor


def _is_integer(dtype: torch.dtype) -> bool:
    return not (dtype.is_floating_point or dtype.is_complex)


def unequal(x: torch.Tensor, y: torch.Tensor, x_double: torch.Tensor, y_double: torch.Tensor) -> torch.Tensor:
    """Where two chunks differ in their bits after promotion: bool, 1-D. NaNs of different bits differ.

    x, y: 1-D parts. x_double, y_double: the same in float64, which represents every floating dtype exactly. Integers of
    different dtypes are compared exactly, in int64. An integer and a floating number are compared in float64, and
    differ if float64 cannot represent the integer.
    """
    if x.dtype == y.dtype:
        return bits(x) != bits(y)
    if not (_is_integer(x.dtype) and _is_integer(y.dtype)):
        result = bits(x_double) != bits(y_double)
        for parts, double in ((x, x_double), (y, y_double)):
            if parts.dtype in LONG:
                result |= rounded_off(parts, double) != 0
        return result
    x_wide, y_wide = x.to(torch.int64), y.to(torch.int64)
    result = x_wide != y_wide
    if torch.uint64 in (x.dtype, y.dtype):
        # A negative number: of the signed dtype, or wrapped from the unsigned one. The other dtype lacks this value.
        result |= (x_wide < 0) | (y_wide < 0)
    return result


def rounded_off(parts: torch.Tensor, double: torch.Tensor) -> torch.Tensor:
    """What float64 lost of each whole number: `parts - double`, exactly, in float64. Both have one shape.

    Zeros for dtypes other than LONG.
    """
    if parts.dtype not in LONG:
        return torch.zeros_like(double)
    whole = parts.view(torch.int64)
    low, high = whole & (_HALF - 1), whole >> 32
    if parts.dtype is torch.uint64:
        high = high & (_HALF - 1)
    # Each step is exact: the two operands of the subtraction differ by less than 2**33.
    return (high.double() * _HALF - double) + low.double()


# Parts that a checksum reads at once.
_STEP = 1 << 20


def checksum_of_values(tensor: torch.Tensor) -> str:
    """SHA-256 of dtype, shape and the values in the order of the flattened index, whatever the strides and the device.

    Ranks compare copies of a tensor by it. All NaNs are equal; -0.0 and 0.0 differ.
    """
    found = hashlib.sha256(f"{tensor.dtype} {list(tensor.shape)} ".encode())
    reader = FlatReader(tensor)
    for start in range(0, reader.parts, _STEP):
        parts = reader.read(start, min(start + _STEP, reader.parts)).cpu()
        nan = parts != parts if parts.dtype.is_floating_point else None
        if nan is not None and bool(nan.any()):
            parts = parts.masked_fill(nan, torch.nan)
        found.update(parts.view(torch.uint8).numpy().data)
    return found.hexdigest()
