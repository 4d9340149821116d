"""Row measures: the worst row (a token, say), which the average over a thousand good ones would hide.

A row is a run of `width` parts of the flattened index. Chunks do not end where rows end, so a chunk is

        head           the rest of a row that began before
        middle         whole rows, whose sums are taken in one call
        tail           the beginning of a row that goes on in the next chunk

and a row in pieces has the sum of its pieces, by math.fsum. The rel of a row is that of `stats`, over this row alone.

Runs of chunks may be counted apart, by several threads, and are then merged in their order: a run that begins inside of
a row keeps the pieces of it (`_opening`) until it is known what came before.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from grafter.core.measures.chunk_sums import TILE, squares_of_rows
from grafter.core.measures.flat_chunks import CHUNK, PIECE
from grafter.core.measures.magnitudes import Magnitudes

# How many of the worst rows are named.
WORST_ROWS = 8
# Rows whose sums wait, so that the rels of many are taken in one call.
_BATCH = 2048
_MOST_LAYOUTS = 64


class RowPiece(NamedTuple):
    """Sums over one piece of a row, in units of 4**exponent."""

    d_squares: float
    both_squares: float
    exponent: int


class WorstRow(NamedTuple):
    """A row by its number, and its rel."""

    row: int
    rel: float


class _Segments(NamedTuple):
    """What chunks have of rows, cut where rows and where chunks begin.

    begins: of each segment, from the first chunk on. whole: which of them are whole rows, and rows: their numbers, from
    the row on in which the first chunk begins. parts: the others, and the row that each ends, or None.
    """

    begins: NDArray[np.int64]
    whole: NDArray[np.int64]
    rows: NDArray[np.int64]
    parts: list[tuple[int, int | None]]


class _Pieces:
    """The pieces so far of one row, and whether unequal non-finite values are among them."""

    def __init__(self) -> None:
        self.sums: list[RowPiece] = []
        self.is_nonfinite = False

    def extend(self, later: _Pieces) -> None:
        self.sums += later.sums
        self.is_nonfinite |= later.is_nonfinite


class Rows:
    """Rows of a pair of tensors, fed chunk by chunk in the order of the flattened index. `width` >= 1.

    start: the flattened index at which it begins; what comes before is counted by another, which merges this one.
    """

    def __init__(self, width: int, start: int = 0) -> None:
        self.width = width
        self.nonfinite = 0
        self.first_nonfinite: int | None = None
        self._rel = Magnitudes()
        self._worst: list[tuple[float, int]] = []
        # Sums of squares of whole rows, d's and both tensors', and the number of each; and rels of rows in pieces.
        self._waiting: list[tuple[NDArray[np.int64], NDArray[np.float64], NDArray[np.float64]]] = []
        self._waiting_rows = 0
        self._closed: list[tuple[int, float]] = []
        self._layouts: dict[tuple[int, int], _Segments] = {}
        self._begins_inside = start % width != 0
        # Of the row that is under way at the start, complete; and of the one that is under way at the end.
        self._opening: _Pieces | None = None
        self._opening_row = 0
        self._pieces = _Pieces()

    @property
    def rel(self) -> Magnitudes:
        """How the rels of all rows so far are spread."""
        self._count_waiting()
        return self._rel

    def squares(
        self, start: int, values: NDArray[np.float64], tiles: NDArray[np.float64] | None = None
    ) -> NDArray[np.float64]:
        """The sums of squares of all that chunks from the flattened index `start` on have of rows.

        tiles: of each TILE values, where they are known and begin where the chunks do.
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
        """Chunks of `count` finite values in all. squares: what `squares` gives of d, of x, and of y."""
        self._add(start, count, squares, 0, None)

    def add_any(self, start: int, x: torch.Tensor, y: torch.Tensor, lost: torch.Tensor | None = None) -> None:
        """A chunk of any float64 values: what is not finite is left out, and unequal such values are counted.

        lost: what float64 lost of x - y.
        """
        finite = x.isfinite() & y.isfinite()
        unequal = (~finite & (x != y) & ~(x.isnan() & y.isnan())).numpy()
        x_clean, y_clean = (v.where(finite, 0.0).numpy() for v in (x, y))
        # A power of two of which the largest square is near 1: scaling by it is exact.
        largest = max(float(np.abs(v).max(initial=0.0)) for v in (x_clean, y_clean))
        exponent = math.frexp(largest)[1] if largest else 0
        x_clean, y_clean = np.ldexp(x_clean, -exponent), np.ldexp(y_clean, -exponent)
        d = x_clean - y_clean
        if lost is not None:
            d += np.ldexp(lost.where(finite, 0.0).numpy(), -exponent)
        squares = tuple(self.squares(start, v) for v in (d, x_clean, y_clean))
        self._add(start, len(x), squares, exponent, unequal)

    def merge(self, later: Rows) -> None:
        """Count what `later` has counted, which begins where this one has come to."""
        if later._begins_inside and later._opening is None:
            # All of it lies within one row.
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
        """The rows of the largest rel, the first of equals first; none whose rel is 0."""
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
        """All in units of 2**exponent. unequal: where non-finite values differ; None: nowhere."""
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
        """Remembered: rows and chunks meet in few ways."""
        key = start % self.width, count
        found = self._layouts.get(key)
        if found is None:
            if len(self._layouts) >= _MOST_LAYOUTS:
                self._layouts.clear()
            found = self._layouts[key] = _find_segments(self.width, *key)
        return found

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
        """Rows by their numbers, in order, and their rels."""
        self._rel.add(rel)
        self._keep_worst(numbers, rel)

    def _end_row(self, row: int) -> None:
        """A row in pieces has come to its end."""
        if self._begins_inside and self._opening is None:
            self._opening, self._opening_row = self._pieces, row
            self._pieces = _Pieces()
        else:
            self._close_row(row)

    def _close_row(self, row: int) -> None:
        """All pieces of the row are there."""
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
        # The largest of these, and all that equal the last of them, so that the first of equals is among them.
        order = np.argsort(-rel, kind="stable")[:WORST_ROWS]
        for number in order:
            value = float(rel[number])
            if value <= 0.0:
                break
            # By the negative row: of equals the first row counts as the worse.
            self._keep((value, -int(numbers[number])))

    def _keep(self, entry: tuple[float, int]) -> None:
        if len(self._worst) < WORST_ROWS:
            heapq.heappush(self._worst, entry)
        elif entry > self._worst[0]:
            heapq.heapreplace(self._worst, entry)


def _find_segments(width: int, start: int, count: int) -> _Segments:
    """Of chunks that begin `start` values into a row."""
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
    # In the unit of the largest piece; what underflows then is too small to matter.
    unit = max(piece.exponent for piece in pieces if piece.both_squares)
    d_squares, both = (
        math.fsum(math.ldexp(piece[field], 2 * (piece.exponent - unit)) for piece in pieces) for field in (0, 1)
    )
    return d_squares / both


# KL(A||B) of logits, in float64: how much is lost where B's distribution stands for A's.
#
# p = softmax(a), q = softmax(b) along one dim KL = sum(p * (log p - log q)) in nats, never below 0
#
# Logits that are -inf in both have no part in it (a masked token); -inf in B alone makes the divergence infinite.

# Rows of a step: some ten float64 temporaries of them are held at once.
_STEP_BYTES = 2 << 20


class Divergence:
    """Rows of logits, block by block; only sums are kept."""

    def __init__(self) -> None:
        self._sums: list[float] = []
        self.rows = 0
        self.undefined = 0
        self.largest = 0.0
        self.worst_row: int | None = None

    def add(self, a: torch.Tensor, b: torch.Tensor) -> None:
        """[rows, n] of both, real, of any dtype, whole along the dim of the logits."""
        step = max(1, _STEP_BYTES // (8 * max(1, a.shape[1])))
        for start in range(0, a.shape[0], step):
            self._add_step(a[start : start + step].double(), b[start : start + step].double())

    def _add_step(self, a: torch.Tensor, b: torch.Tensor) -> None:
        log_p, log_q = a.log_softmax(1), b.log_softmax(1)
        p = log_p.exp()
        terms = (p * (log_p - log_q)).where(p > 0, 0.0)
        # NaN logits have p NaN, which is not > 0.
        undefined = log_p.isnan().any(1) | log_q.isnan().any(1)
        # Rounding may leave a sum of -1e-17 where both are the same.
        rows = terms.sum(1).clamp_(min=0.0).where(~undefined, 0.0)
        self.undefined += int(undefined.sum())
        values = rows.tolist()
        largest = max(values, default=0.0)
        if largest > self.largest:
            self.largest, self.worst_row = largest, self.rows + values.index(largest)
        # A step is some rows: their sums are exactly rounded, and do not depend on how many make a step.
        self._sums.extend(values)
        self.rows += len(values)

    def mean(self) -> float | None:
        """Over the rows in which it is defined; None where there is none."""
        defined = self.rows - self.undefined
        if not defined:
            return None
        return math.inf if self.largest == math.inf else math.fsum(self._sums) / defined
