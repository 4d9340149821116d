"""ULPs: how many representable numbers lie between two values of one dtype.

Numbers of one sign are in the order of their bits, so their distance is the difference of these as integers. It is
defined only where both have the same sign and are normal: across zero, and among subnormal numbers, it would be large
for values that hardly differ. Of two dtypes the one with fewer bits of precision counts, and the other value is
rounded to it, to nearest even.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from grafter.core.measures.flat_chunks import PACKED_FLOAT4, bits

_UNSIGNED = {1: np.uint8, 2: np.uint16, 4: np.uint32, 8: np.uint64}
# Of so many numbers one may be looked at by itself.
_FEW = 32
# Numbers that are summed in their own dtype.
_WIDTHS = (256, 64)
# Of MX formats; older versions of torch do not have it.
_SCALES = getattr(torch, "float8_e8m0fnu", None)
# Real parts: a complex number is two numbers.
_PARTS = {torch.complex32: torch.float16, torch.complex64: torch.float32, torch.complex128: torch.float64}


class UlpSums(NamedTuple):
    """Of one chunk: how many pairs have a distance, the largest, and the sum of all."""

    counted: int
    largest: int
    total: int


NO_ULPS = UlpSums(0, 0, 0)


def part_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype in which a number's parts are read.

    That of the real part of a complex number, float32 for packed float4 values, else its own.
    """
    return torch.float32 if dtype is PACKED_FLOAT4 else _PARTS.get(dtype, dtype)


def narrower(x: torch.dtype, y: torch.dtype) -> torch.dtype | None:
    """Of two floating dtypes (or those of complex parts) the one with fewer bits of precision; None for integers.

    bfloat16 is narrower than float16 (8 bits against 11), and float8_e5m2 than float8_e4m3fn. Of two with the same
    precision, the one with the smaller range. None, too, for scales (float8_e8m0fnu): powers of two without a sign or
    a zero are no numbers to round to. None for packed float4 values, too: there are 15 of them.
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
    """Counts chunks of one floating dtype, given as 1-D contiguous CPU tensors of at most `size` numbers."""

    def __init__(self, dtype: torch.dtype, size: int) -> None:
        # float8 dtypes "fn" have no infinity, and "fnuz" no negative zero; their NaNs are found by value, not by bits.
        self._dtype = dtype
        width = torch.finfo(dtype).bits // 8
        kind: Any = np.dtype(f"i{width}").type
        sign = 8 * width - 1
        self._magnitude = kind(2**sign - 1)
        self._first_normal = kind(_magnitude_bits(torch.finfo(dtype).tiny, dtype))
        self._last_normal = kind(_magnitude_bits(torch.finfo(dtype).max, dtype))
        self._unsigned = _UNSIGNED[width]
        self._span = self._unsigned(int(self._last_normal) - int(self._first_normal))
        # Of normal numbers of two signs the difference of bits overflows to this or more.
        self._suspect = self._unsigned(2**sign - int(self._span))
        self._space = np.empty((2, size), dtype=kind)
        self._mask = np.empty((2, size), dtype=np.bool_)
        # The sums of a chunk of the wider ones may leave int64; their distances do not.
        self._wide = width == 8

    def equal(self, x: torch.Tensor, *, all_normal: bool = False) -> UlpSums:
        """Of a chunk that equals the other."""
        if all_normal:
            return UlpSums(len(x), 0, 0)
        normal = self._normal(bits(x).numpy(), 0)
        return UlpSums(int(np.count_nonzero(normal)), 0, 0)

    def subtract(self, x: torch.Tensor, y: torch.Tensor) -> NDArray[Any]:
        """The first step of comparing: x less y as integers, which is 0 where they are the same bits. Kept here."""
        a, b = bits(x).numpy(), bits(y).numpy()
        found: NDArray[Any] = np.subtract(a, b, out=self._space[0, : len(a)])
        return found

    def compare(self, x: torch.Tensor, y: torch.Tensor) -> UlpSums:
        """Of a pair of chunks."""
        self.subtract(x, y)
        return self.compare_subtracted(x, y)

    def compare_subtracted(self, x: torch.Tensor, y: torch.Tensor, *, all_normal: bool = False) -> UlpSums:
        """Of the chunks that `subtract` was given. all_normal: every number is known to be a normal one."""
        a, b = bits(x).numpy(), bits(y).numpy()
        count = len(a)
        if not count:
            return NO_ULPS
        distance = self._space[0, :count]
        # Bits of one sign: no difference of these overflows. What does is left out.
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
        """Set the distances to 0 that are none; how many are."""
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
            # Mostly all are normal: then their masks need not be made.
            magnitude = np.bitwise_and(values, self._magnitude, out=self._space[1, :count])
            low, high = np.minimum.reduce(magnitude), np.maximum.reduce(magnitude)
            if low < self._first_normal or high > self._last_normal:
                np.logical_or(mask, ~self._normal(values, 0), out=mask)
        without = int(np.count_nonzero(mask))
        if without:
            distance[mask] = 0
        return without

    def _total(self, distance: NDArray[Any], largest: int) -> int:
        # In its own dtype a sum takes a quarter of the time, so rows are summed as long as none can overflow.
        room = int(self._magnitude) // max(largest, 1)
        for width in () if self._wide else _WIDTHS:
            if width <= room and not len(distance) % width:
                return int(np.add.reduce(distance.reshape(-1, width), axis=1, dtype=distance.dtype).sum(dtype=np.int64))
        if largest * len(distance) < 2**63:
            # torch's: numpy's takes three times as long where it widens.
            return int(torch.from_numpy(distance).sum(dtype=torch.int64))
        # Too large for int64 together: in two halves.
        low = int((distance & 0xFFFFFFFF).sum(dtype=np.int64))
        return (int((distance >> 32).sum(dtype=np.int64)) << 32) + low

    def _normal(self, values: NDArray[Any], row: int) -> NDArray[np.bool_]:
        """Which are normal numbers: neither 0, subnormal, infinite nor NaN."""
        count = len(values)
        magnitude, mask = self._space[1, :count], self._mask[row, :count]
        np.bitwise_and(values, self._magnitude, out=magnitude)
        # Below the first, the difference wraps to the upper end.
        np.subtract(magnitude, self._first_normal, out=magnitude)
        np.less_equal(magnitude.view(self._unsigned), self._span, out=mask)
        return mask


def _magnitude_bits(value: float, dtype: torch.dtype) -> int:
    return int(bits(torch.tensor([value], dtype=torch.float64).to(dtype)).item())
