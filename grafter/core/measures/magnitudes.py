"""The distribution of values: a histogram with 8 bins per power of two, which merges exactly in any order.

    bin of v >= 0:  the exponent and the three upper bits of the mantissa of v as a float64

    1.0   1.125   1.25   1.375   1.5   1.625   1.75   1.875   2.0
     |------|------|------|------|------|------|------|------|

A percentile is known up to its bin, which is at most 12.5 % wide. Counts are integers, so no digit depends on how the
values were cut into pieces, or on the threads that counted them.
"""

from __future__ import annotations

import math
import struct
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

# Without its lower 49 bits, a non-negative float64 has 11 bits of exponent and 3 of mantissa.
_SHIFT = 49
_BINS = 1 << 14
# Fewer bins are collected first, since each count over the whole table has a fixed cost.
_BATCH = 1 << 14
_LEAST = 1 << 12


class Bounds(NamedTuple):
    """The bounds of a number: it lies in [low, high]."""

    low: float
    high: float


class Magnitudes:
    """A histogram of numbers >= 0 (float64; Inf is allowed, NaN is not)."""

    def __init__(self) -> None:
        self._counts: NDArray[np.int64] = np.zeros(_BINS, dtype=np.int64)
        self._zeros = 0
        self._keys: NDArray[np.int64] = np.empty(0, dtype=np.int64)
        self._filled = 0

    def add(self, values: NDArray[np.float64]) -> None:
        """Count values: 1-D, contiguous, none negative."""
        count = len(values)
        if count >= _BATCH:
            self._count(np.right_shift(values.view(np.int64), _SHIFT))
            return
        if self._filled + count > len(self._keys):
            self._count_keys()
            if count > len(self._keys):
                self._keys = np.empty(max(count, min(4 * count, _BATCH), _LEAST), dtype=np.int64)
        np.right_shift(values.view(np.int64), _SHIFT, out=self._keys[self._filled : self._filled + count])
        self._filled += count

    def count_over(self, values: NDArray[np.float64]) -> None:
        """As `add`, and overwrite `values`, which takes half the time if there are many."""
        if len(values) < _BATCH:
            self.add(values)
            return
        keys = values.view(np.int64)
        self._count(np.right_shift(keys, _SHIFT, out=keys))

    def add_zeros(self, count: int) -> None:
        """Count `count` values of exactly 0."""
        self._zeros += count

    def merge(self, other: Magnitudes) -> None:
        """Add the counts of `other`."""
        other._count_keys()
        self._counts += other._counts
        self._zeros += other._zeros

    def bins(self) -> list[tuple[float, float, int]]:
        """(low, high, count) of each bin that is not empty, in order. Its values v have low <= v < high.

        Zero is in the first bin, from 0 to 2**-1022 / 8, in which no dtype narrower than float64 has another value.
        """
        counts = self._all_counts()
        return [(_edge(number), _edge(number + 1), int(counts[number])) for number in np.flatnonzero(counts).tolist()]

    @property
    def count(self) -> int:
        """How many values were counted."""
        self._count_keys()
        return int(self._counts.sum()) + self._zeros

    def percentile(self, thousandths: int) -> Bounds | None:
        """The nearest-rank percentile, the ceil(count * thousandths / 1000)-th smallest value; None if there is none.

        Given as the bounds of its bin; both are 0 for the first bin.
        """
        counts = self._all_counts()
        total = int(counts.sum())
        if not total:
            return None
        rank = max(1, -(-total * thousandths // 1000))
        number = int(np.searchsorted(np.cumsum(counts), rank))
        return Bounds(0.0, 0.0) if number == 0 else Bounds(_edge(number), _edge(number + 1))

    def count_from(self, low: float) -> int:
        """How many values lie in bins that begin at `low` or above."""
        counts = self._all_counts()
        return int(counts[_bin_from(low) :].sum())

    def _all_counts(self) -> NDArray[np.int64]:
        self._count_keys()
        counts: NDArray[np.int64] = self._counts.copy()
        counts[0] += self._zeros
        return counts

    def _count_keys(self) -> None:
        if self._filled:
            self._count(self._keys[: self._filled])
            self._filled = 0

    def _count(self, keys: NDArray[np.int64]) -> None:
        # torch's bincount releases the GIL; numpy's does not.
        found = torch.bincount(torch.from_numpy(keys)).numpy()
        self._counts[: len(found)] += found


def _edge(number: int) -> float:
    """The least value of a bin."""
    bits = number << _SHIFT
    return math.inf if bits >= 0x7FF << 52 else float(struct.unpack("<d", struct.pack("<Q", bits))[0])


def _bin_from(low: float) -> int:
    """The first bin that begins at `low` or above."""
    (bits,) = struct.unpack("<Q", struct.pack("<d", low))
    return -(-int(bits) >> _SHIFT)
