"""The measures of a pair's chunks: a meter has the buffers of one thread, and its sums can be merged.

    x, y       bits apart    as float64      statistics of each       d = x - y       |d|            by size
               ULPs, equal?  squares, rows   sums, extremes           squares, rows   sum, largest   histogram

A chunk stays in a core's cache during these steps. `PairSums` and `TensorSums` equal those of `chunk_pass` to the last
digit.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import numpy as np
import torch
from numpy.typing import NDArray

from grafter.core.measures.chunk_pass import EXACT, WIDE
from grafter.core.measures.chunk_sums import (
    TILE,
    ChunkBuffer,
    PairSums,
    TensorSums,
    Workspace,
    are_comparable,
    centred_from_sums,
    centred_squares,
    exact_rows,
    is_safe,
    products_from_squares,
    squares_of_rows,
)
from grafter.core.measures.flat_chunks import CHUNK, LONG, bits, rounded_off, unequal
from grafter.core.measures.magnitudes import Magnitudes
from grafter.core.measures.rows import Rows
from grafter.core.measures.ulps import NO_ULPS, UlpCounter, UlpSums, narrower, part_dtype

# Chunks that each call measures: a call costs as much as ten thousand values.
CHUNKS = 4


@dataclass
class RunSums:
    """The sums of a run of consecutive chunks.

    largest: (exponent, mantissa) of the largest |d| so far. narrow: the same sums in the narrower dtype, if wanted.
    """

    rows: Rows
    pair: list[PairSums] = field(default_factory=list)
    x: list[TensorSums] = field(default_factory=list)
    y: list[TensorSums] = field(default_factory=list)
    magnitudes: Magnitudes = field(default_factory=Magnitudes)
    ulps: UlpSums = NO_ULPS
    largest: tuple[float, float] = (-math.inf, 0.0)
    narrow: RunSums | None = None

    def merge(self, later: RunSums) -> None:
        """Append the sums of the run that follows."""
        self.rows.merge(later.rows)
        self.pair += later.pair
        self.x += later.x
        self.y += later.y
        self.magnitudes.merge(later.magnitudes)
        self.count_ulps(later.ulps)
        self.largest = max(self.largest, later.largest)
        if self.narrow is not None and later.narrow is not None:
            self.narrow.merge(later.narrow)

    def count_ulps(self, found: UlpSums) -> None:
        """Add the ULPs of a chunk, or of a run."""
        known = self.ulps
        self.ulps = UlpSums(known.counted + found.counted, max(known.largest, found.largest), known.total + found.total)


class PairMeter:
    """Measures chunks of x against y: whole ones, at most CHUNKS at a time, or a single shorter one.

    x, y: the dtypes. parts: how many parts each tensor has. statistics: whether those of x and of y are wanted, too.
    narrow: whether to measure again in the narrower dtype, if the dtypes differ.
    """

    def __init__(
        self, x: torch.dtype, y: torch.dtype, parts: int, *, statistics: bool = True, narrow: bool = True
    ) -> None:
        size = parts if parts < CHUNK else min(CHUNKS, parts // CHUNK) * CHUNK
        self._statistics = statistics
        self._wide = x in WIDE or y in WIDE
        self._buffer = torch.empty(3, size, dtype=torch.float64)
        self._panel = _Panel(self._buffer)
        narrowest = narrower(x, y)
        differ = part_dtype(x) != part_dtype(y)
        self._ulps = UlpCounter(narrowest, size) if narrowest is not None and not differ else None
        self._tiny = torch.finfo(narrowest).tiny if narrowest is not None else 0.0
        self.narrow_dtype = narrowest if differ and narrow else None
        self._narrow: PairMeter | None = None
        if self.narrow_dtype is not None:
            self._narrow = PairMeter(self.narrow_dtype, self.narrow_dtype, parts, statistics=False)

    def sums(self, width: int, start: int = 0) -> RunSums:
        """Empty sums. width: how many parts a row has. start: the flattened index of the run's first chunk."""
        narrow = self._narrow.sums(width, start) if self._narrow is not None else None
        return RunSums(Rows(width, start), narrow=narrow)

    def measure(self, sums: RunSums, start: int, x: torch.Tensor, y: torch.Tensor) -> None:
        """Add the chunks that begin at `start`: 1-D, contiguous parts on the CPU, which are not written to."""
        if self._narrow is not None and self.narrow_dtype is not None and sums.narrow is not None:
            self._narrow.measure(sums.narrow, start, x.to(self.narrow_dtype), y.to(self.narrow_dtype))
        self._measure(sums, start, x, y)

    def _measure(self, sums: RunSums, start: int, x: torch.Tensor, y: torch.Tensor) -> None:
        if len(x) != self._panel.count:
            self._panel = _Panel(self._buffer[:, : len(x)])
        panel = self._panel
        mismatched = self._mismatched(x, y)
        same_bits = x.dtype == y.dtype and not any(mismatched)
        # One tensor after the other, so that each is still in the core's cache when it is read again.
        of_x = self._of_one(panel.x, sums.rows, start, x)
        of_y = of_x if same_bits or of_x is None else self._of_one(panel.y, sums.rows, start, y)
        if of_x is not None and same_bits:
            self._equal_chunks(sums, start, x, of_x)
        elif of_x is not None and of_y is not None and self._unequal_chunks(sums, start, x, y, mismatched, of_x, of_y):
            pass
        elif panel.chunks > 1:
            for at in range(0, len(x), CHUNK):
                self._measure(sums, start + at, x[at : at + CHUNK], y[at : at + CHUNK])
        else:
            self._any_chunk(sums, start, x, y, same_bits)

    def _mismatched(self, x: torch.Tensor, y: torch.Tensor) -> list[int]:
        """How many parts of each chunk differ in their bits after promotion. NaNs of different bits differ."""
        if self._ulps is not None:
            apart = self._ulps.subtract(x, y)
        elif x.dtype == y.dtype:
            apart = np.not_equal(bits(x).numpy(), bits(y).numpy())
        else:
            apart = unequal(x, y, x.double(), y.double()).numpy()
        size = self._panel.size
        return [int(np.count_nonzero(apart[at : at + size])) for at in range(0, len(apart), size)]

    def _of_one(self, row: _Chunks, rows: Rows, start: int, source: torch.Tensor) -> _OneSideSums | None:
        """The sums of x or of y, left in its buffer. None if some values are not finite or not of ordinary size."""
        row.flat.copy_(source)
        tiles, squares = row.squares()
        if not all(value < math.inf for value in squares) or (self._wide and not all(map(is_safe, row.max_abs()))):
            return None
        row_squares = rows.squares(start, row.values, tiles)
        if not self._statistics:
            return _OneSideSums(squares, row_squares)
        totals = row.totals()
        # float32 has the same numbers in half the bytes.
        values = source.view(row.by_chunk.shape).numpy() if source.dtype is torch.float32 else row.by_chunk.numpy()
        lows, highs = (of(values, axis=1).tolist() for of in (np.minimum.reduce, np.maximum.reduce))
        if min(lows) >= 0.0 or max(highs) <= 0.0:
            absolutes, smallest = [abs(total) for total in totals], min(map(abs, (*lows, *highs)))
        else:
            scratch = self._panel.d
            np.abs(row.values, out=scratch.values)
            absolutes, smallest = scratch.totals(), float(np.minimum.reduce(scratch.values))
        sums = []
        for n, (total, low, high) in enumerate(zip(totals, lows, highs, strict=True)):
            centred = self._centred(row, n, squares[n], total) if low < high else 0.0
            sums.append(TensorSums(row.size, 0.0, total, absolutes[n], centred, low, high))
        return _OneSideSums(squares, row_squares, sums, smallest >= self._tiny)

    def _centred(self, row: _Chunks, chunk: int, squares: float, total: float) -> float:
        centred = centred_from_sums(row.size, squares, total)
        if centred is not None:
            return centred
        space = Workspace(row.size)
        space.x.tensor.copy_(row.by_chunk[chunk])
        return centred_squares(space, space.x, squares, total)

    def _equal_chunks(self, sums: RunSums, start: int, x: torch.Tensor, of_x: _OneSideSums) -> None:
        sums.rows.add(start, len(x), np.zeros_like(of_x.row_squares), of_x.row_squares, of_x.row_squares)
        sums.magnitudes.add_zeros(len(x))
        sums.pair += [PairSums(x_squares=own, y_squares=own, products=own) for own in of_x.squares]
        sums.x += of_x.sums
        sums.y += of_x.sums
        if self._ulps is not None:
            sums.count_ulps(self._ulps.equal(x, all_normal=of_x.all_normal))

    def _unequal_chunks(
        self,
        sums: RunSums,
        start: int,
        x: torch.Tensor,
        y: torch.Tensor,
        mismatched: list[int],
        of_x: _OneSideSums,
        of_y: _OneSideSums,
    ) -> bool:
        """False, and nothing is added, if some differences are not of ordinary size."""
        panel = self._panel
        squares = list(zip(of_x.squares, of_y.squares, strict=True))
        products = [None if are_comparable(*own) else panel.product(n) for n, own in enumerate(squares)]
        # From here on, x holds d.
        d = panel.x
        lost = self._lost(x, y)
        np.subtract(d.values, panel.y.values, out=d.values)
        if lost is not None:
            d.values += lost
        d_tiles, d_squares = d.squares()
        np.abs(d.values, out=d.values)
        largest = np.maximum.reduce(d.by_chunk.numpy(), axis=1).tolist()
        if self._wide and not all(map(is_safe, largest)):
            return False
        sums.rows.add(start, len(x), sums.rows.squares(start, d.values, d_tiles), of_x.row_squares, of_y.row_squares)
        for n, absolute in enumerate(d.totals()):
            product = products[n]
            if product is None:
                product = products_from_squares(*squares[n], d_squares[n])
            x_squares, y_squares = squares[n]
            pair = PairSums(
                0.0,
                x_squares,
                0.0,
                y_squares,
                product,
                0.0,
                d_squares[n],
                absolute,
                largest[n],
                mismatched=mismatched[n],
            )
            at = n * panel.size
            sums.pair.append(self._placed(sums, pair, d.values[at : at + panel.size], x[at:], y[at:]))
        sums.x += of_x.sums
        sums.y += of_y.sums
        sums.magnitudes.count_over(d.values)
        if self._ulps is not None:
            all_normal = of_x.all_normal and of_y.all_normal
            sums.count_ulps(self._ulps.compare_subtracted(x, y, all_normal=all_normal))
        return True

    def _lost(self, x: torch.Tensor, y: torch.Tensor) -> NDArray[np.float64] | None:
        """What float64 lost of the differences of the panel's x and y; None if it represents all numbers."""
        if x.dtype not in LONG and y.dtype not in LONG:
            return None
        sides = ((x, self._panel.x), (y, self._panel.y))
        if not any(parts.dtype in LONG and max(row.max_abs()) >= EXACT for parts, row in sides):
            return None
        found: NDArray[np.float64] = (rounded_off(x, sides[0][1].flat) - rounded_off(y, sides[1][1].flat)).numpy()
        return found

    @staticmethod
    def _placed(
        sums: RunSums, pair: PairSums, d: NDArray[np.float64] | None, x: torch.Tensor, y: torch.Tensor
    ) -> PairSums:
        """The sums with the index of the maximum, looked up if it is the largest so far: values are not kept."""
        if not pair.d_max:
            return pair
        mantissa, exponent = math.frexp(pair.d_max)
        size = (exponent + pair.d_exponent, mantissa)
        if size <= sums.largest:
            return pair
        sums.largest = size
        if d is None:
            return pair
        index = int(d.argmax())
        return pair._replace(d_index=float(index), x_at=_number(x[index]), y_at=_number(y[index]))

    def _any_chunk(self, sums: RunSums, start: int, x: torch.Tensor, y: torch.Tensor, same_bits: bool) -> None:
        """Add one chunk of any values: not finite, very large, or whole numbers that float64 cannot represent."""
        x_double, y_double = x.double(), y.double()
        mask = unequal(x, y, x_double, y_double)
        lost = None
        if x.dtype in LONG or y.dtype in LONG:
            lost = rounded_off(x, x_double) - rounded_off(y, y_double)
        lost_row = None if lost is None else lost[None]
        pair, x_sums, y_sums = exact_rows(
            x_double[None], y_double[None], mask[None], self._wide, self._statistics, lost_row
        )
        sums.rows.add_any(start, x_double, y_double, lost)
        d = x_double - y_double if lost is None else x_double - y_double + lost
        finite = x_double.isfinite() & y_double.isfinite()
        same = ~finite & ((x_double == y_double) | (x_double.isnan() & y_double.isnan()))
        sums.magnitudes.add(d.abs().where(~same, 0.0)[finite | same].numpy())
        entry = PairSums._make(pair[0].tolist())
        if lost is not None and entry.d_max:
            index = int(entry.d_index)
            entry = entry._replace(x_at=_number(x[index]), y_at=_number(y[index]))
        sums.pair.append(self._placed(sums, entry, None, x, y))
        if x_sums is not None and y_sums is not None:
            sums.x.append(TensorSums._make(x_sums[0].tolist()))
            sums.y.append(TensorSums._make(y_sums[0].tolist()))
        if self._ulps is not None:
            sums.count_ulps(self._ulps.equal(x) if same_bits else self._ulps.compare_subtracted(x, y))


def _number(part: torch.Tensor) -> float:
    """A part's value; a whole number if float64 may not represent it."""
    return part.item() if part.dtype in LONG else part.double().item()


@dataclass(frozen=True)
class _OneSideSums:
    """The sums of finite chunks of one tensor: the squares of each, those of its rows, and those for statistics."""

    squares: list[float]
    row_squares: NDArray[np.float64]
    sums: list[TensorSums] = field(default_factory=list)
    all_normal: bool = False


class _Chunks:
    """A buffer of several chunks of float64, as torch and as numpy, flat and chunk by chunk."""

    def __init__(self, flat: torch.Tensor) -> None:
        self.flat = flat
        self.values: NDArray[np.float64] = flat.numpy()
        self.size = min(CHUNK, len(flat))
        self.by_chunk = flat.view(-1, self.size) if len(flat) else flat.view(0, 0)
        self._tiles = self.values.reshape(-1, TILE) if self.size == CHUNK else None

    def squares(self) -> tuple[NDArray[np.float64] | None, list[float]]:
        """The squares of each tile of TILE values, if the chunks are whole; and those of each chunk."""
        if self._tiles is None:
            return None, [ChunkBuffer(chunk).squares() for chunk in self.by_chunk]
        tiles = squares_of_rows(self._tiles)
        return tiles, np.add.reduce(tiles.reshape(len(self.by_chunk), -1), axis=1).tolist()

    def totals(self) -> list[float]:
        """The sum of each chunk."""
        found: list[float] = self.by_chunk.sum(1).tolist()
        return found

    def max_abs(self) -> list[float]:
        """The largest magnitude of each chunk."""
        values = self.by_chunk.numpy()
        found: list[float] = np.maximum(np.maximum.reduce(values, axis=1), -np.minimum.reduce(values, axis=1)).tolist()
        return found


class _Panel:
    """The buffers of several chunks: x, which becomes d; y; and d, for temporary values."""

    def __init__(self, buffer: torch.Tensor) -> None:
        self.x, self.y, self.d = (_Chunks(row) for row in buffer)
        self.count, self.size, self.chunks = buffer.shape[1], self.x.size, len(self.x.by_chunk)

    def product(self, chunk: int) -> float:
        """sum(x * y) of one chunk."""
        return ChunkBuffer(self.x.by_chunk[chunk]).dot(ChunkBuffer(self.y.by_chunk[chunk]))
