"""Pictures of one pair of tensors: where they differ, and which values each holds.

    tensors of any size  ->  |a - b|, its largest value within each cell of a coarse grid, for every two dims
                         ->  counts of a's and of b's values in the same bins

Their size is bounded, and the tensors are read block by block. A cell shows the largest value instead of the average,
so that one bad row in a thousand stays visible.
"""

from __future__ import annotations

import base64
import math
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import combinations
from typing import TYPE_CHECKING

import numpy as np
import torch

if TYPE_CHECKING:
    from grafter.analysis.compare.alignment import AlignedBlock, Alignment, WholeTensor

MOST_ROWS, MOST_COLUMNS = 96, 160
BINS = 64
_BLOCK_NUMEL = 1 << 21
# The number of dims from which every two are drawn: 6 pictures.
_MOST_DIMS = 4
# Codes of cells; the two ends of the scale give them their values.
_ZERO, _NOT_FINITE, _HIGHEST = 0, 65535, 65534


@dataclass(frozen=True)
class Heatmap:
    """The largest |a - b| of each cell.

    rows, columns: of the grid; row_size, column_size: of the tensor's dims.
    codes: base64 of rows * columns little-endian uint16. 0: all values are equal. 65535: a value is not finite on one
    side. Otherwise 1 for 10**low up to 65534 for 10**high, in equal steps of the logarithm.
    """

    row_dim: str
    column_dim: str
    row_size: int
    column_size: int
    rows: int
    columns: int
    low: float
    high: float
    codes: str


@dataclass(frozen=True)
class Histogram:
    """The values of both jobs in BINS equal bins from low to high. Non-finite values are counted separately."""

    low: float
    high: float
    a: tuple[int, ...]
    b: tuple[int, ...]
    nonfinite_a: int = 0
    nonfinite_b: int = 0


@dataclass(frozen=True)
class Picture:
    """All pictures of one point's tensor.

    order: the point's. why_none: why there are no pictures. magnitudes: (e, number of |a - b| from 2**e up to
    2**(e+1)); None instead of e: the number of zeros.
    """

    order: int
    leaf: str = ""
    shape: tuple[int, ...] = ()
    heatmaps: tuple[Heatmap, ...] = ()
    histogram: Histogram | None = None
    magnitudes: tuple[tuple[int | None, int], ...] = ()
    why_none: str = ""

    @property
    def size_bytes(self) -> int:
        """The approximate size on the page."""
        return 1024 + sum(len(heatmap.codes) for heatmap in self.heatmaps)


def draw_pair(order: int, leaf: str, a: WholeTensor, b: WholeTensor) -> Picture:
    """The pictures of two whole tensors, aligned to one order of dims.

    Reads each tensor twice and holds one block of each. Raises LayoutError if the two do not fit together, and
    DumpError if a file is damaged.
    """
    from grafter.analysis.compare.alignment import Alignment

    alignment = Alignment(a, b)
    shape = alignment.shape
    if not all(shape):
        return Picture(order, leaf, tuple(a.shape), why_none="The tensor holds no values.")
    wide = [dim for dim, size in enumerate(shape) if size > 1][-_MOST_DIMS:]
    grids = [_Grid(alignment, row, column) for row, column in combinations(wide, 2)]
    if len(wide) == 1:
        grids = [_Grid(alignment, None, wide[0])]
    span = _Span()
    for block, left, right in _blocks(alignment):
        span.add(left, right)
        gap = _gap(left, right)
        for grid in grids:
            grid.add(block, gap)
    # Prefer tokens against hidden: the last two dims.
    heatmaps = tuple(grid.heatmap() for grid in reversed(grids))
    return Picture(order, leaf, tuple(a.shape), heatmaps, _count(alignment, span))


def _blocks(alignment: Alignment) -> Iterator[tuple[AlignedBlock, torch.Tensor, torch.Tensor]]:
    """The values of both jobs in float64, one block at a time; complex values as their magnitude."""
    for block in alignment.blocks(_BLOCK_NUMEL):
        yield block, _as_real(alignment.a.read(block)), _as_real(alignment.b.read(block))


def _as_real(values: torch.Tensor) -> torch.Tensor:
    return (values.abs() if values.is_complex() else values).to(torch.float64)


def _gap(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """|a - b|; infinite where a value is not finite in one tensor only, or where two such values differ."""
    gap = (a - b).abs_()
    # A sum is finite only if all of its values are: one pass instead of five.
    if math.isfinite(float(gap.sum())):
        return gap
    gap[(a == b) | (a.isnan() & b.isnan())] = 0.0
    return gap.nan_to_num_(nan=math.inf, posinf=math.inf)


def _finite(values: torch.Tensor) -> torch.Tensor:
    return values if math.isfinite(float(values.sum())) else values[values.isfinite()]


class _Grid:
    """One heatmap while it is being filled: the largest |a - b| so far in each cell."""

    def __init__(self, alignment: Alignment, row: int | None, column: int) -> None:
        self._dims = (row, column)
        self._names = ("" if row is None else alignment.dims[row].name, alignment.dims[column].name)
        self._sizes = (1 if row is None else alignment.shape[row], alignment.shape[column])
        self._cells = (min(self._sizes[0], MOST_ROWS), min(self._sizes[1], MOST_COLUMNS))
        self._largest = np.zeros(self._cells)

    def add(self, block: AlignedBlock, gap: torch.Tensor) -> None:
        row = self._dims[0]
        others = tuple(dim for dim in range(gap.ndim) if dim not in self._dims)
        flat = gap.amax(dim=others).numpy() if others else gap.numpy()
        if row is None:
            flat = flat.reshape(1, -1)
        into = []
        for dim, own in enumerate(self._dims):
            if own is None:
                into.append(np.zeros(1, dtype=np.int64))
                continue
            places = np.arange(block.starts[own], block.starts[own] + block.sizes[own])
            cells, firsts = np.unique(places * self._cells[dim] // self._sizes[dim], return_index=True)
            flat = np.maximum.reduceat(flat, firsts, axis=dim)
            into.append(cells)
        box = np.ix_(*into)
        self._largest[box] = np.maximum(self._largest[box], flat)

    def heatmap(self) -> Heatmap:
        with np.errstate(divide="ignore"):
            powers = np.log10(self._largest)
        finite = powers[np.isfinite(powers)]
        low, high = (float(finite.min()), float(finite.max())) if finite.size else (0.0, 0.0)
        share = np.clip((powers - low) / ((high - low) or 1.0), 0.0, 1.0)
        codes = 1 + np.rint(share * (_HIGHEST - 1))
        codes[self._largest == 0] = _ZERO
        codes[np.isinf(self._largest)] = _NOT_FINITE
        packed = base64.b64encode(codes.astype("<u2").tobytes()).decode()
        return Heatmap(*self._names, *self._sizes, *self._cells, low, high, packed)


class _Span:
    """The range from the smallest to the largest finite value of both jobs."""

    def __init__(self) -> None:
        self.low, self.high = math.inf, -math.inf
        self.nonfinite = [0, 0]

    def add(self, *sides: torch.Tensor) -> None:
        for side, values in enumerate(sides):
            finite = _finite(values)
            self.nonfinite[side] += values.numel() - finite.numel()
            if finite.numel():
                low, high = map(float, torch.aminmax(finite))
                self.low, self.high = min(self.low, low), max(self.high, high)


def _count(alignment: Alignment, span: _Span) -> Histogram | None:
    if span.low > span.high:
        return None
    # histc treats two equal ends as if none were given.
    low, high = (span.low, span.high) if span.low < span.high else (span.low - 0.5, span.high + 0.5)
    if not math.isfinite(high - low):
        return None
    counts = [torch.zeros(BINS, dtype=torch.float64) for _ in (0, 1)]
    for _, *sides in _blocks(alignment):
        for count, values in zip(counts, sides, strict=True):
            count += torch.histc(_finite(values), BINS, low, high)
    a, b = (tuple(int(number) for number in count.tolist()) for count in counts)
    return Histogram(low, high, a, b, *span.nonfinite)
