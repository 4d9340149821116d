"""Row measures: the worst row (a token, say), which the average over a thousand good ones would hide.

A row is a run of `width` parts of the flattened index. Chunks do not end where rows end, so a chunk is

        head           the rest of a row that began before
        middle         whole rows, whose sums are taken in one call
        tail           the beginning of a row that goes on in the next chunk

and a row in pieces has the sum of its pieces, by math.fsum. The rel of a row is that of `stats`, over this row alone.
"""

from __future__ import annotations

import heapq
import math
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from grafter.measures.flat_chunks import PIECE
from grafter.measures.magnitudes import Magnitudes

_vecdot = getattr(np, "vecdot", None)

# How many of the worst rows are named.
WORST_ROWS = 8


class RowPiece(NamedTuple):
    """Sums over one piece of a row, in units of 4**exponent."""

    d_squares: float
    both_squares: float
    exponent: int


class WorstRow(NamedTuple):
    """A row by its number, and its rel."""

    row: int
    rel: float


class Rows:
    """All rows of a pair of tensors, fed chunk by chunk in the order of the flattened index. `width` >= 1."""

    def __init__(self, width: int) -> None:
        self.width = width
        self.rel = Magnitudes()
        self.nonfinite = 0
        self.first_nonfinite: int | None = None
        self._worst: list[tuple[float, int]] = []
        self._pieces: list[RowPiece] = []
        self._piece_is_nonfinite = False

    def add_equal(self, start: int, x: NDArray[np.float64]) -> None:
        """A chunk of finite values that are the same in both, from the flattened index `start` on."""
        head, middle, tail = self._cut(start, len(x))
        if head:
            self._add_piece(_piece_of_equal(x[:head]), start, head)
        if middle:
            self.rel.add_zeros(middle)
        if tail:
            self._add_piece(_piece_of_equal(x[len(x) - tail :]), start + len(x) - tail, tail)

    def add(self, start: int, x: NDArray[np.float64], y: NDArray[np.float64], d: NDArray[np.float64]) -> None:
        """A chunk of finite values whose squares lie within float64, and d = |x - y|."""
        self._add(start, x, y, d, 0, None)

    def add_any(self, start: int, x: torch.Tensor, y: torch.Tensor) -> None:
        """A chunk of any float64 values: what is not finite is left out, and unequal such values are counted."""
        finite = x.isfinite() & y.isfinite()
        unequal = (~finite & (x != y) & ~(x.isnan() & y.isnan())).numpy()
        x_clean, y_clean = (v.where(finite, 0.0).numpy() for v in (x, y))
        # A power of two of which the largest square is near 1: scaling by it is exact.
        largest = max(float(np.abs(v).max(initial=0.0)) for v in (x_clean, y_clean))
        exponent = math.frexp(largest)[1] if largest else 0
        x_clean, y_clean = np.ldexp(x_clean, -exponent), np.ldexp(y_clean, -exponent)
        self._add(start, x_clean, y_clean, np.abs(x_clean - y_clean), exponent, unequal)

    def worst(self) -> list[WorstRow]:
        """The rows of the largest rel, the first of equals first; none whose rel is 0."""
        return [WorstRow(-row, rel) for rel, row in sorted(self._worst, reverse=True)]

    def _add(
        self,
        start: int,
        x: NDArray[np.float64],
        y: NDArray[np.float64],
        d: NDArray[np.float64],
        exponent: int,
        unequal: NDArray[np.bool_] | None,
    ) -> None:
        """All in units of 2**exponent. unequal: where non-finite values differ; None: nowhere."""
        head, middle, tail = self._cut(start, len(x))
        last = len(x) - tail
        if head:
            self._note_nonfinite(unequal, 0, head)
            self._add_piece(_piece(x[:head], y[:head], d[:head], exponent), start, head)
        if middle:
            first = (start + head) // self.width
            if unequal is not None:
                self._count_nonfinite(first, np.logical_or.reduce(unequal[head:last].reshape(middle, -1), axis=1))
            self._add_rows(first, *(_squares(v[head:last], middle) for v in (d, x, y)))
        if tail:
            self._note_nonfinite(unequal, last, len(x))
            self._add_piece(_piece(x[last:], y[last:], d[last:], exponent), start + last, tail)

    def _note_nonfinite(self, unequal: NDArray[np.bool_] | None, start: int, stop: int) -> None:
        """The row that is in pieces has such values if one of its pieces has."""
        if unequal is not None:
            self._piece_is_nonfinite |= bool(unequal[start:stop].any())

    def _count_nonfinite(self, first: int, rows: NDArray[np.bool_]) -> None:
        count = int(np.count_nonzero(rows))
        if count and self.first_nonfinite is None:
            self.first_nonfinite = first + int(rows.argmax())
        self.nonfinite += count

    def _cut(self, start: int, count: int) -> tuple[int, int, int]:
        """Values of the head, rows of the middle, values of the tail."""
        head = min(-start % self.width, count)
        middle, tail = divmod(count - head, self.width)
        return head, middle, tail

    def _add_rows(self, first: int, d: NDArray[np.float64], x: NDArray[np.float64], y: NDArray[np.float64]) -> None:
        """Sums of squares of whole rows, the first of which has the number `first`."""
        both = np.add(x, y, out=x)
        rel = np.divide(d, both, out=np.zeros_like(d), where=d > 0)
        self.rel.add(rel)
        self._keep_worst(first, rel)

    def _add_piece(self, piece: RowPiece, start: int, count: int) -> None:
        self._pieces.append(piece)
        if (start + count) % self.width:
            return
        row = start // self.width
        self._count_nonfinite(row, np.array([self._piece_is_nonfinite]))
        self._piece_is_nonfinite = False
        rel = np.array([_rel(self._pieces)])
        self._pieces.clear()
        self.rel.add(rel)
        self._keep_worst(row, rel)

    def _keep_worst(self, first: int, rel: NDArray[np.float64]) -> None:
        worst = self._worst
        if rel.max() <= (worst[0][0] if len(worst) == WORST_ROWS else 0.0):
            return
        # The largest of these, and all that equal the last of them, so that the first of equals is among them.
        order = np.argsort(-rel, kind="stable")[:WORST_ROWS]
        for number in order:
            value = float(rel[number])
            # By the negative row: of equals the first row counts as the worse.
            entry = (value, -(first + int(number)))
            if value <= 0.0:
                break
            if len(worst) < WORST_ROWS:
                heapq.heappush(worst, entry)
            elif entry > worst[0]:
                heapq.heapreplace(worst, entry)


def _squares(values: NDArray[np.float64], rows: int) -> NDArray[np.float64]:
    """The sum of squares of each row."""
    matrix = values.reshape(rows, -1)
    # Rows longer than a piece not by BLAS, whose threads would share them out. vecdot came with NumPy 2, and is four
    # times as fast.
    if matrix.shape[1] <= PIECE and _vecdot is not None:
        result: NDArray[np.float64] = _vecdot(matrix, matrix)
        return result
    summed: NDArray[np.float64] = np.einsum("ij,ij->i", matrix, matrix)
    return summed


def _square(values: NDArray[np.float64]) -> float:
    return float(sum(piece.dot(piece) for piece in (values[at : at + PIECE] for at in range(0, len(values), PIECE))))


def _piece_of_equal(x: NDArray[np.float64]) -> RowPiece:
    return RowPiece(0.0, 2 * _square(x), 0)


def _piece(x: NDArray[np.float64], y: NDArray[np.float64], d: NDArray[np.float64], exponent: int) -> RowPiece:
    return RowPiece(_square(d), _square(x) + _square(y), exponent)


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
