"""Row measures: the worst rows (tokens, say), which the average over a thousand good ones would hide.

A row is a run of `width` parts of the flattened index. Chunks do not end where rows end, so a chunk has

        head           the rest of a row that began before
        middle         whole rows, whose sums one call computes
        tail           the beginning of a row that continues in the next chunk

and the pieces of a row are added by math.fsum. The rel of a row is that of `stats`, over this row alone.

Several threads may count runs of chunks, which are then merged in order. A run that begins inside a row keeps the
pieces of this row (`_opening`) until it is merged with the run before it.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from grafter.core.bounded_memory import BoundedMemory
from grafter.core.measures.chunk_sums import TILE, squares_of_rows
from grafter.core.measures.flat_chunks import CHUNK, PIECE
from grafter.core.measures.magnitudes import Magnitudes

# How many of the worst rows are named.
WORST_ROWS = 8
# Rows whose sums are collected, so that one call computes the rels of many.
_BATCH = 2048
_MOST_LAYOUTS = 64


class RowPiece(NamedTuple):
    """The sums over one piece of a row, in units of 4**exponent."""

    d_squares: float
    both_squares: float
    exponent: int


class WorstRow(NamedTuple):
    """The number of a row, and its rel."""

    row: int
    rel: float


class _Segments(NamedTuple):
    """Some chunks, cut where rows and where chunks begin.

    begins: the begin of each segment within the chunks. whole: the segments that are whole rows. rows: the numbers of
    these rows, counted from the row in which the first chunk begins. parts: the other segments, each with the row that
    it ends, or None.
    """

    begins: NDArray[np.int64]
    whole: NDArray[np.int64]
    rows: NDArray[np.int64]
    parts: list[tuple[int, int | None]]


class _Pieces:
    """The pieces of one row so far, and whether they have unequal non-finite values."""

    def __init__(self) -> None:
        self.sums: list[RowPiece] = []
        self.is_nonfinite = False

    def extend(self, later: _Pieces) -> None:
        self.sums += later.sums
        self.is_nonfinite |= later.is_nonfinite


class Rows:
    """The rows of a pair of tensors, fed chunk by chunk in the order of the flattened index. width: at least 1.

    start: the flattened index of the first chunk. What lies before it is counted by another `Rows`, which merges this.
    """

    def __init__(self, width: int, start: int = 0) -> None:
        self.width = width
        self.nonfinite = 0
        self.first_nonfinite: int | None = None
        self._rel = Magnitudes()
        self._worst: list[tuple[float, int]] = []
        # Whole rows: their numbers, and the sums of squares of d and of both tensors. Rows in pieces: number and rel.
        self._waiting: list[tuple[NDArray[np.int64], NDArray[np.float64], NDArray[np.float64]]] = []
        self._waiting_rows = 0
        self._closed: list[tuple[int, float]] = []
        # Rows and chunks overlap in few ways.
        self._layouts: BoundedMemory[tuple[int, int], _Segments] = BoundedMemory(_MOST_LAYOUTS)
        self._begins_inside = start % width != 0
        # The pieces of the row in which the first chunk begins, once it has ended; and of the row that has not ended.
        self._opening: _Pieces | None = None
        self._opening_row = 0
        self._pieces = _Pieces()

    @property
    def rel(self) -> Magnitudes:
        """The distribution of the rels of all rows so far."""
        self._count_waiting()
        return self._rel

    def squares(
        self, start: int, values: NDArray[np.float64], tiles: NDArray[np.float64] | None = None
    ) -> NDArray[np.float64]:
        """The sum of squares of each segment of the chunks that begin at the flattened index `start`.

        tiles: the sums of each TILE values, if they are known.
        """
        if tiles is not None and not (self.width % TILE or start % TILE):
            return np.add.reduceat(tiles, self._segments(start, len(values)).begins // TILE)
        sums = [self._squares_of_chunk(start + at, values[at : at + CHUNK]) for at in range(0, len(values), CHUNK)]
        return sums[0] if len(sums) == 1 else np.concatenate(sums)

    def _squares_of_chunk(self, start: int, values: NDArray[np.float64]) -> NDArray[np.float64]:
        head = min(-start % self.width, len(values))
        middle, tail = divmod(len(values) - head, self.width)
        first, last = int(head > 0), len(values) - tail
        sums = np.empty(first + middle + (tail > 0))
        if head:
            sums[0] = _square(values[:head])
        if middle:
            sums[first : first + middle] = squares_of_rows(values[head:last].reshape(middle, -1))
        if tail:
            sums[-1] = _square(values[last:])
        return sums

    def add(self, start: int, count: int, *squares: NDArray[np.float64]) -> None:
        """Add chunks of `count` finite values. squares: the results of `squares` for d, for x, and for y."""
        self._add(start, count, squares, 0, None)

    def add_any(self, start: int, x: torch.Tensor, y: torch.Tensor, lost: torch.Tensor | None = None) -> None:
        """Add a chunk of any float64 values. Non-finite ones are left out, and rows with unequal ones counted.

        lost: what float64 lost of x - y.
        """
        finite = x.isfinite() & y.isfinite()
        unequal = (~finite & (x != y) & ~(x.isnan() & y.isnan())).numpy()
        x_clean, y_clean = (v.where(finite, 0.0).numpy() for v in (x, y))
        # Scaling by a power of two is exact, and brings the largest square near 1.
        largest = max(float(np.abs(v).max(initial=0.0)) for v in (x_clean, y_clean))
        exponent = math.frexp(largest)[1] if largest else 0
        x_clean, y_clean = np.ldexp(x_clean, -exponent), np.ldexp(y_clean, -exponent)
        d = x_clean - y_clean
        if lost is not None:
            d += np.ldexp(lost.where(finite, 0.0).numpy(), -exponent)
        squares = tuple(self.squares(start, v) for v in (d, x_clean, y_clean))
        self._add(start, len(x), squares, exponent, unequal)

    def merge(self, later: Rows) -> None:
        """Add the counts of `later`, which begins where this one ends."""
        if later._begins_inside and later._opening is None:
            # It lies within one row.
            self._pieces.extend(later._pieces)
        else:
            if later._opening is not None:
                self._pieces.extend(later._opening)
                self._close_row(later._opening_row)
            self._pieces = later._pieces
        self._rel.merge(later.rel)
        self.nonfinite += later.nonfinite
        firsts = [rows.first_nonfinite for rows in (self, later) if rows.first_nonfinite is not None]
        self.first_nonfinite = min(firsts, default=None)
        for entry in later._worst:
            self._keep(entry)

    def worst(self) -> list[WorstRow]:
        """The rows with the largest rels, the first of equal ones first. Rows with rel 0 are left out."""
        self._count_waiting()
        return [WorstRow(-row, rel) for rel, row in sorted(self._worst, reverse=True)]

    def _add(
        self,
        start: int,
        count: int,
        squares: Sequence[NDArray[np.float64]],
        exponent: int,
        unequal: NDArray[np.bool_] | None,
    ) -> None:
        """Add chunks in units of 2**exponent. unequal: where non-finite values differ; None: nowhere."""
        segments = self._segments(start, count)
        d, both = squares[0], squares[1] + squares[2]
        first = start // self.width
        nonfinite = None if unequal is None else np.logical_or.reduceat(unequal, segments.begins)
        for number, ended in segments.parts:
            self._pieces.sums.append(RowPiece(float(d[number]), float(both[number]), exponent))
            self._pieces.is_nonfinite |= nonfinite is not None and bool(nonfinite[number])
            if ended is not None:
                self._end_row(first + ended)
        if nonfinite is not None:
            self._count_nonfinite((first + segments.rows)[nonfinite[segments.whole]])
        if len(segments.whole):
            self._waiting.append((first + segments.rows, d[segments.whole], both[segments.whole]))
            self._waiting_rows += len(segments.whole)
            if self._waiting_rows >= _BATCH:
                self._count_waiting()

    def _segments(self, start: int, count: int) -> _Segments:
        key = start % self.width, count
        return self._layouts.answer(key, lambda: _find_segments(self.width, *key))

    def _count_nonfinite(self, rows: NDArray[np.int64]) -> None:
        if len(rows):
            first = int(rows[0])
            self.first_nonfinite = first if self.first_nonfinite is None else min(first, self.first_nonfinite)
            self.nonfinite += len(rows)

    def _count_waiting(self) -> None:
        if self._waiting:
            numbers, d, both = (np.concatenate(parts) for parts in zip(*self._waiting, strict=True))
            self._waiting.clear()
            self._waiting_rows = 0
            self._count(numbers, np.divide(d, both, out=np.zeros_like(d), where=d > 0))
        if self._closed:
            rows, rels = zip(*self._closed, strict=True)
            self._closed.clear()
            self._count(np.array(rows), np.array(rels))

    def _count(self, numbers: NDArray[np.int64], rel: NDArray[np.float64]) -> None:
        """Count rows, given by their numbers in order, and their rels."""
        self._rel.add(rel)
        self._keep_worst(numbers, rel)

    def _end_row(self, row: int) -> None:
        """End a row in pieces."""
        if self._begins_inside and self._opening is None:
            self._opening, self._opening_row = self._pieces, row
            self._pieces = _Pieces()
        else:
            self._close_row(row)

    def _close_row(self, row: int) -> None:
        """Count a row in pieces, all of which are known."""
        if self._pieces.is_nonfinite:
            self._count_nonfinite(np.array([row]))
        self._closed.append((row, _rel(self._pieces.sums)))
        self._pieces = _Pieces()
        if len(self._closed) >= _BATCH:
            self._count_waiting()

    def _keep_worst(self, numbers: NDArray[np.int64], rel: NDArray[np.float64]) -> None:
        worst = self._worst
        if rel.max() <= (worst[0][0] if len(worst) == WORST_ROWS else 0.0):
            return
        # Stable, so that the first of equal rows is among them.
        order = np.argsort(-rel, kind="stable")[:WORST_ROWS]
        for number in order:
            value = float(rel[number])
            if value <= 0.0:
                break
            # The negative row, since the first of equal rows counts as the worst.
            self._keep((value, -int(numbers[number])))

    def _keep(self, entry: tuple[float, int]) -> None:
        if len(self._worst) < WORST_ROWS:
            heapq.heappush(self._worst, entry)
        elif entry > self._worst[0]:
            heapq.heapreplace(self._worst, entry)


def _find_segments(width: int, start: int, count: int) -> _Segments:
    """The segments of chunks that begin `start` values into a row."""
    # A row may begin in the middle of a chunk, and a chunk in the middle of a row.
    begins = np.union1d(np.arange(-start % width, count, width), np.arange(0, count, CHUNK))
    ends = np.append(begins[1:], count)
    is_whole = ends - begins == width
    whole = np.flatnonzero(is_whole)
    parts: list[tuple[int, int | None]] = []
    for number in np.flatnonzero(~is_whole).tolist():
        end = start + int(ends[number])
        parts.append((number, None if end % width else end // width - 1))
    return _Segments(begins, whole, (start + begins[whole]) // width, parts)


def _square(values: NDArray[np.float64]) -> float:
    return float(sum(piece.dot(piece) for piece in (values[at : at + PIECE] for at in range(0, len(values), PIECE))))


def _rel(pieces: list[RowPiece]) -> float:
    """sum(d^2) / sum(x^2 + y^2) of a row in pieces."""
    if not any(piece.d_squares for piece in pieces):
        return 0.0
    # In the unit of the largest piece: what underflows is too small to matter.
    unit = max(piece.exponent for piece in pieces if piece.both_squares)
    d_squares, both = (
        math.fsum(math.ldexp(piece[field], 2 * (piece.exponent - unit)) for piece in pieces) for field in (0, 1)
    )
    return d_squares / both


# Rows of a step: some ten float64 temporaries of this size are in memory at once.
_STEP_BYTES = 2 << 20


class Divergence:
    """KL(A||B) of rows of logits, in float64, fed block by block: what is lost if B's distribution replaces A's.

        p = softmax(a), q = softmax(b)
        KL = sum(p * (log p - log q))    in nats, never below 0

    Logits that are -inf in both have no share in it (a masked token). -inf in B alone makes the divergence infinite.
    """

    def __init__(self) -> None:
        self._sums: list[float] = []
        self.rows = 0
        self.undefined = 0
        self.largest = 0.0
        self.worst_row: int | None = None

    def add(self, a: torch.Tensor, b: torch.Tensor) -> None:
        """Add rows of both: [rows, n], real, of any dtype, whole along the dim of the logits."""
        step = max(1, _STEP_BYTES // (8 * max(1, a.shape[1])))
        for start in range(0, a.shape[0], step):
            self._add_step(a[start : start + step].double(), b[start : start + step].double())

    def _add_step(self, a: torch.Tensor, b: torch.Tensor) -> None:
        log_p, log_q = a.log_softmax(1), b.log_softmax(1)
        p = log_p.exp()
        terms = (p * (log_p - log_q)).where(p > 0, 0.0)
        # p is NaN for NaN logits, and is not > 0.
        undefined = log_p.isnan().any(1) | log_q.isnan().any(1)
        # Rounding may leave a sum of -1e-17 if both are the same.
        rows = terms.sum(1).clamp_(min=0.0).where(~undefined, 0.0)
        self.undefined += int(undefined.sum())
        values = rows.tolist()
        largest = max(values, default=0.0)
        if largest > self.largest:
            self.largest, self.worst_row = largest, self.rows + values.index(largest)
        # All rows are added at the end, exactly rounded, so the result does not depend on the steps.
        self._sums.extend(values)
        self.rows += len(values)

    def mean(self) -> float | None:
        """The mean over the rows for which it is defined; None if there are none."""
        defined = self.rows - self.undefined
        if not defined:
            return None
        return math.inf if self.largest == math.inf else math.fsum(self._sums) / defined
