"""ULPs: how many representable numbers lie between two values of one dtype.

Numbers of one sign are in the order of their bits, so their distance is the difference of their bits as integers. It is
defined only if both have the same sign and are normal: across zero, and among subnormal numbers, it would be large for
values that hardly differ. Of two dtypes, the one with fewer bits of precision counts, to which the other value is
rounded to nearest even.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from grafter.core.measures.flat_chunks import PACKED_FLOAT4, bits

_UNSIGNED = {1: np.uint8, 2: np.uint16, 4: np.uint32, 8: np.uint64}
# If one in this many numbers is suspect, or fewer, the suspects are checked one by one.
_FEW = 32
# How many numbers are summed at once in their own dtype.
_WIDTHS = (256, 64)
# The scales of MX formats. Older versions of torch do not have the dtype.
_SCALES = getattr(torch, "float8_e8m0fnu", None)
# The dtypes of the parts of complex numbers.
_PARTS = {torch.complex32: torch.float16, torch.complex64: torch.float32, torch.complex128: torch.float64}


class UlpSums(NamedTuple):
    """The ULPs of one chunk: how many pairs have a distance, the largest one, and the sum of all."""

    counted: int
    largest: int
    total: int


NO_ULPS = UlpSums(0, 0, 0)


def part_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of the parts of a number: that of the real part of a complex number, float32 for packed float4."""
    return torch.float32 if dtype is PACKED_FLOAT4 else _PARTS.get(dtype, dtype)


def narrower(x: torch.dtype, y: torch.dtype) -> torch.dtype | None:
    """The one of two floating dtypes (or those of complex parts) with fewer bits of precision; None for integers.

    bfloat16 is narrower than float16 (8 bits against 11), and float8_e5m2 than float8_e4m3fn. Of two with the same
    precision, it is the one with the smaller range. Also None for scales (float8_e8m0fnu), which have neither sign nor
    zero, and for packed float4, which has only 15 values.
    """
    if PACKED_FLOAT4 is not None and PACKED_FLOAT4 in (x, y):
        return None
    x, y = part_dtype(x), part_dtype(y)
    if not (x.is_floating_point and y.is_floating_point) or _SCALES in (x, y):
        return None

    def precision(dtype: torch.dtype) -> tuple[float, float]:
        found = torch.finfo(dtype)
        return -found.eps, found.max

    return min(x, y, key=precision)


class UlpCounter:
    """Counts the ULPs of chunks of one floating dtype: 1-D contiguous CPU tensors of at most `size` numbers."""

    def __init__(self, dtype: torch.dtype, size: int) -> None:
        width = torch.finfo(dtype).bits // 8
        kind: Any = np.dtype(f"i{width}").type
        sign = 8 * width - 1
        self._magnitude = kind(2**sign - 1)
        self._first_normal = kind(_magnitude_bits(torch.finfo(dtype).tiny, dtype))
        self._last_normal = kind(_magnitude_bits(torch.finfo(dtype).max, dtype))
        self._unsigned = _UNSIGNED[width]
        self._span = self._unsigned(int(self._last_normal) - int(self._first_normal))
        # For normal numbers of two signs, the difference of the bits overflows to this or more.
        self._suspect = self._unsigned(2**sign - int(self._span))
        self._space = np.empty((2, size), dtype=kind)
        self._mask = np.empty((2, size), dtype=np.bool_)
        # The sum over a chunk of float64 may leave int64; single distances do not.
        self._wide = width == 8

    def equal(self, x: torch.Tensor, *, all_normal: bool = False) -> UlpSums:
        """The ULPs of a chunk that equals the other side's."""
        if all_normal:
            return UlpSums(len(x), 0, 0)
        normal = self._normal(bits(x).numpy(), 0)
        return UlpSums(int(np.count_nonzero(normal)), 0, 0)

    def subtract(self, x: torch.Tensor, y: torch.Tensor) -> NDArray[Any]:
        """x - y as integers, 0 where the bits are equal: the first step of a comparison, kept for the second."""
        a, b = bits(x).numpy(), bits(y).numpy()
        found: NDArray[Any] = np.subtract(a, b, out=self._space[0, : len(a)])
        return found

    def compare(self, x: torch.Tensor, y: torch.Tensor) -> UlpSums:
        """The ULPs of a pair of chunks."""
        self.subtract(x, y)
        return self.compare_subtracted(x, y)

    def compare_subtracted(self, x: torch.Tensor, y: torch.Tensor, *, all_normal: bool = False) -> UlpSums:
        """The ULPs of the chunks that `subtract` was given. all_normal: all numbers are known to be normal."""
        a, b = bits(x).numpy(), bits(y).numpy()
        count = len(a)
        if not count:
            return NO_ULPS
        distance = self._space[0, :count]
        # Differences between numbers of one sign do not overflow. The others are left out.
        np.abs(distance, out=distance)
        sizes = distance.view(self._unsigned)
        largest = int(np.maximum.reduce(sizes))
        without = 0
        if not all_normal or largest >= self._suspect:
            without = self._leave_out(a, b, distance, all_normal)
        if without:
            largest = int(np.maximum.reduce(distance))
        return UlpSums(count - without, largest, self._total(distance, largest))

    def _leave_out(self, a: NDArray[Any], b: NDArray[Any], distance: NDArray[Any], all_normal: bool) -> int:
        """Set undefined distances to 0, and return how many there are."""
        count = len(a)
        if all_normal:
            mask = self._mask[0, :count]
            np.greater_equal(distance.view(self._unsigned), self._suspect, out=mask)
            suspects = np.flatnonzero(mask)
            if len(suspects) < count // _FEW:
                left_out = suspects[(a[suspects] ^ b[suspects]) < 0]
                distance[left_out] = 0
                return len(left_out)
        mask = np.less(np.bitwise_xor(a, b, out=self._space[1, :count]), 0, out=self._mask[1, :count])
        for values in () if all_normal else (a, b):
            # Most often all are normal, and no mask is needed.
            magnitude = np.bitwise_and(values, self._magnitude, out=self._space[1, :count])
            low, high = np.minimum.reduce(magnitude), np.maximum.reduce(magnitude)
            if low < self._first_normal or high > self._last_normal:
                np.logical_or(mask, ~self._normal(values, 0), out=mask)
        without = int(np.count_nonzero(mask))
        if without:
            distance[mask] = 0
        return without

    def _total(self, distance: NDArray[Any], largest: int) -> int:
        # A sum in the own dtype takes a quarter of the time, so numbers are summed in rows that cannot overflow.
        room = int(self._magnitude) // max(largest, 1)
        for width in () if self._wide else _WIDTHS:
            if width <= room and not len(distance) % width:
                return int(np.add.reduce(distance.reshape(-1, width), axis=1, dtype=distance.dtype).sum(dtype=np.int64))
        if largest * len(distance) < 2**63:
            # numpy's sum takes three times as long if it widens.
            return int(torch.from_numpy(distance).sum(dtype=torch.int64))
        # In two halves, since the sum may leave int64.
        low = int((distance & 0xFFFFFFFF).sum(dtype=np.int64))
        return (int((distance >> 32).sum(dtype=np.int64)) << 32) + low

    def _normal(self, values: NDArray[Any], row: int) -> NDArray[np.bool_]:
        """Which values are normal: neither 0, subnormal, infinite nor NaN."""
        count = len(values)
        magnitude, mask = self._space[1, :count], self._mask[row, :count]
        np.bitwise_and(values, self._magnitude, out=magnitude)
        # For numbers below the first normal one, the difference wraps to the upper end.
        np.subtract(magnitude, self._first_normal, out=magnitude)
        np.less_equal(magnitude.view(self._unsigned), self._span, out=mask)
        return mask


def _magnitude_bits(value: float, dtype: torch.dtype) -> int:
    return int(bits(torch.tensor([value], dtype=torch.float64).to(dtype)).item())
