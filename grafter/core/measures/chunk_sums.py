"""Sums over chunks of two tensors, in float64: `stats` combines them into statistics and differences.

There are two ways to the same numbers:

* `fast_pair`, `fast_tensors`: one chunk of finite numbers on the CPU, with numpy on buffers that stay in cache. They
  decline what they cannot compute exactly: NaN, Inf, and float64 values whose squares leave float64's range.
* `exact_rows`, `tensor_rows`: many chunks at once, as rows, with torch, on any device and without a synchronisation;
  all values are masked and scaled. CUDA uses it for all chunks, the CPU for those that the fast way declines.

Sums are scaled, as sum(v * 2**-exponent). Only float64 input ever needs an exponent other than 0, since the square of
any number of a narrower dtype lies well within float64.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from grafter.core.measures.flat_chunks import CHUNK, PIECE

# Between these, squares of float64 numbers and their sums neither overflow nor lose bits that matter.
_SAFE_LOW, _SAFE_HIGH = 1e-140, 1e140
# Below this part of the sum of squares, the rest after subtracting the mean's share has lost half its digits.
_CANCELLED = 1e-7
# Norms may differ by this factor before the dot product derived from three squares loses digits that matter.
_COMPARABLE = 1e3

# The squares of a whole chunk are summed in tiles of this many values: one call instead of three, and rows of whole
# tiles need no further sums of squares.
TILE = 256

_vecdot = getattr(np, "vecdot", None)

# Marks a PairSums whose index of the maximum is not looked up yet: that is done only in the chunk with the maximum.
UNKNOWN_INDEX = -1.0


class TensorSums(NamedTuple):
    """The sums of one chunk of one tensor, over its `finite` finite values v. low and high are not scaled."""

    finite: float
    exponent: float  # of total, absolute and (twice it) centred
    total: float  # sum(v)
    absolute: float  # sum(|v|)
    centred: float  # sum((v - mean of this chunk)**2)
    low: float
    high: float
    nan: float = 0.0
    inf: float = 0.0


class PairSums(NamedTuple):
    """The sums of one chunk of both tensors, over the positions where x and y are finite; d = x - y."""

    x_exponent: float = 0.0
    x_squares: float = 0.0
    y_exponent: float = 0.0
    y_squares: float = 0.0
    products: float = 0.0  # sum(x * y), by both exponents
    d_exponent: float = 0.0  # of the next three
    d_squares: float = 0.0
    d_absolute: float = 0.0
    d_max: float = 0.0
    d_index: float = UNKNOWN_INDEX  # of the first maximum, within the chunk
    x_at: float = 0.0  # x and y there, not scaled
    y_at: float = 0.0
    mismatched: float = 0.0  # over all positions
    nan: float = 0.0  # positions where exactly one is NaN
    inf: float = 0.0  # other positions where one is infinite and they differ


class ChunkBuffer:
    """A float64 buffer of one chunk, as torch and as numpy, and its pieces for dot products."""

    def __init__(self, buffer: torch.Tensor) -> None:
        self.tensor = buffer
        self.values: NDArray[np.float64] = buffer.numpy()
        self._pieces = [self.values[start : start + PIECE] for start in range(0, len(buffer), PIECE)]
        self._tiles = self.values.reshape(-1, TILE) if len(buffer) == CHUNK else None

    def squares(self) -> float:
        """The sum of squares, the same for any number of threads."""
        if self._tiles is not None:
            return float(np.add.reduce(squares_of_rows(self._tiles)))
        result = 0.0
        for piece in self._pieces:
            # The method, since np.dot costs a third more at this size.
            result += piece.dot(piece)
        return result

    def total(self) -> float:
        """The sum."""
        # On a chunk, torch's sum and abs are twice as fast as numpy's; numpy's dot, max and subtract as torch's.
        return self.tensor.sum().item()

    def dot(self, other: ChunkBuffer) -> float:
        """The dot product, the same for any number of threads."""
        return sum(float(a.dot(b)) for a, b in zip(self._pieces, other._pieces, strict=True))

    def max_abs(self) -> float:
        """The largest magnitude; NaN if a value is NaN."""
        return max(float(np.maximum.reduce(self.values)), -float(np.minimum.reduce(self.values)))


def squares_of_rows(matrix: NDArray[np.float64]) -> NDArray[np.float64]:
    """The sum of squares of each row of [rows, n]."""
    # BLAS would split rows longer than a piece over its threads. vecdot, new in NumPy 2, is four times as fast.
    if matrix.shape[1] <= PIECE and _vecdot is not None:
        result: NDArray[np.float64] = _vecdot(matrix, matrix)
        return result
    summed: NDArray[np.float64] = np.einsum("ij,ij->i", matrix, matrix)
    return summed


class Workspace:
    """The buffers for one chunk of `size` parts, used for one after the other: x, y, d, and where x and y differ."""

    def __init__(self, size: int, within: Workspace | None = None) -> None:
        """within: a larger workspace, whose memory this one uses."""
        self.size = size
        # Allocated by torch for its alignment to 64 bytes, which numpy's allocation lacks.
        self._buffer: torch.Tensor = (
            torch.empty(3, size, dtype=torch.float64) if within is None else within._buffer[:, :size]
        )
        self.x, self.y, self.d = (ChunkBuffer(row) for row in self._buffer)
        self.values: NDArray[np.float64] = self._buffer.numpy()
        self.unequal: NDArray[np.bool_] = np.empty(size, dtype=np.bool_) if within is None else within.unequal[:size]


def is_exact(row: ChunkBuffer, squares: float, wide: bool) -> bool:
    """Whether the fast way may be used for a chunk: all values are finite, and their squares within range."""
    return squares < np.inf and (not wide or is_safe(row.max_abs()))


def fast_pair(
    space: Workspace,
    mismatched: int,
    same_bits: bool,
    wide: bool,
    level: str,
    lost: NDArray[np.float64] | None = None,
) -> PairSums | None:
    """The sums of one chunk whose values lie in `space`; |d| is left in space.d. None: `exact_rows` must compute them.

    same_bits: all of x equals y, and space.y is not read. wide: either dtype is float64. lost: see `exact_rows`.
    """
    x, y, d = space.x, space.x if same_bits else space.y, space.d
    x_squares = x.squares()
    y_squares = x_squares if same_bits else y.squares()
    if not (is_exact(x, x_squares, wide) and (same_bits or is_exact(y, y_squares, wide))):
        return None
    if same_bits:
        return PairSums(x_squares=x_squares, y_squares=y_squares, products=x_squares)
    np.subtract(x.values, y.values, out=d.values)
    if lost is not None:
        d.values += lost
    d_squares = d.squares()
    products = absolute = 0.0
    if level == "full":
        d.tensor.abs_()
        absolute = d.total()
        largest = np.maximum.reduce(d.values)
        comparable = are_comparable(x_squares, y_squares)
        products = products_from_squares(x_squares, y_squares, d_squares) if comparable else x.dot(y)
    else:
        largest = d.max_abs()
    if wide and not is_safe(largest):
        return None
    return PairSums(0.0, x_squares, 0.0, y_squares, products, 0.0, d_squares, absolute, largest, mismatched=mismatched)


def is_safe(largest: float) -> bool:
    """Whether the squares of float64 numbers up to this one stay within float64."""
    return _SAFE_LOW < largest < _SAFE_HIGH or largest == 0.0


def are_comparable(x_squares: float, y_squares: float) -> bool:
    """Whether sum(xy) may be computed from the squares: its error, relative to |x||y|, is float64's epsilon times the
    ratio of the norms."""
    return x_squares < y_squares * _COMPARABLE**2 and y_squares < x_squares * _COMPARABLE**2


def products_from_squares(x_squares: float, y_squares: float, d_squares: float) -> float:
    """sum(xy), if the norms are comparable."""
    return (x_squares + y_squares - d_squares) / 2


def fast_tensors(space: Workspace, squares: list[float]) -> list[TensorSums]:
    """The sums of finite chunks whose squares are known: of x, or of x and y. Overwrites them and space.d."""
    rows = [space.x, space.y][: len(squares)]
    # Both rows in one call: calls are a third of the cost.
    values = space.values[: len(rows)]
    lows = np.minimum.reduce(values, axis=1).tolist()
    highs = np.maximum.reduce(values, axis=1).tolist()
    totals = [row.total() for row in rows]
    centred = [
        centred_squares(space, row, row_squares, total) if low < high else 0.0
        for row, row_squares, total, low, high in zip(rows, squares, totals, lows, highs, strict=True)
    ]
    return [
        TensorSums(space.size, 0.0, total, _absolute(row, total, low, high), row_centred, low, high)
        for row, total, row_centred, low, high in zip(rows, totals, centred, lows, highs, strict=True)
    ]


def _absolute(row: ChunkBuffer, total: float, low: float, high: float) -> float:
    """sum(|v|), which is |sum(v)| if all have one sign. Overwrites the row."""
    if low >= 0.0 or high <= 0.0:
        return abs(total)
    row.tensor.abs_()
    return row.total()


def centred_from_sums(count: int, squares: float, total: float) -> float | None:
    """sum((v - mean)**2), or None if the sums cancel."""
    centred = squares - total * total / count
    return centred if centred >= _CANCELLED * squares else None


def centred_squares(space: Workspace, row: ChunkBuffer, squares: float, total: float) -> float:
    """sum((v - mean)**2), from the sums, or if these cancel, in a second pass, which overwrites space.d."""
    centred = centred_from_sums(space.size, squares, total)
    if centred is not None:
        return centred
    np.subtract(row.values, total / space.size, out=space.d.values)
    rest = space.d.total()
    # The rounding error of the mean is removed.
    return max(space.d.squares() - rest * rest / space.size, 0.0)


def exact_rows(
    x: torch.Tensor,
    y: torch.Tensor,
    unequal: torch.Tensor,
    wide: bool,
    statistics: bool,
    lost: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None]:
    """The sums of each row: [rows, fields of PairSums], and with `statistics`, [rows, fields of TensorSums] of x and y.

    x, y: [rows, n] float64 on one device. unequal: bool, of the same shape. lost: what float64 lost of x - y, if x or y
    are whole numbers that it cannot represent. Does not synchronise with the device.
    """
    pair = _pair_rows(x, y, unequal, wide, lost)
    if not statistics:
        return pair, None, None
    return pair, tensor_rows(x, wide), tensor_rows(y, wide)


def tensor_rows(v: torch.Tensor, wide: bool) -> torch.Tensor:
    """[rows, fields of TensorSums] of [rows, n] float64."""
    finite = v.isfinite()
    clean = v.where(finite, 0.0)
    scaled, exponent = _scale(clean, clean.abs().amax(1), wide)
    count = finite.sum(1).double()
    total = scaled.sum(1)
    mean = total / count.clamp(min=1)
    deviation = (scaled - mean[:, None]).where(finite, 0.0)
    correction = deviation.sum(1).square() / count.clamp(min=1)
    return torch.stack(
        [
            count, exponent, total, scaled.abs().sum(1),
            (deviation.square().sum(1) - correction).clamp(min=0),
            v.where(finite, torch.inf).amin(1), v.where(finite, -torch.inf).amax(1),
            v.isnan().sum(1).double(), v.isinf().sum(1).double(),
        ],
        dim=1,
    )  # fmt: skip


def _pair_rows(
    x: torch.Tensor, y: torch.Tensor, unequal: torch.Tensor, wide: bool, lost: torch.Tensor | None
) -> torch.Tensor:
    finite = x.isfinite() & y.isfinite()
    x_nan, y_nan = x.isnan(), y.isnan()
    nan = x_nan ^ y_nan
    inf = ~finite & ~nan & ~(x_nan & y_nan) & (x != y)
    x_clean, y_clean = x.where(finite, 0.0), y.where(finite, 0.0)
    x_max, y_max = x_clean.abs().amax(1), y_clean.abs().amax(1)
    # Two float64 numbers near the end of the range may differ by more than the range, so both are halved first.
    halved = (torch.maximum(x_max, y_max) > 2.0**1022) if wide else torch.zeros_like(x_max, dtype=torch.bool)
    factor = torch.where(halved, 0.5, 1.0).double()[:, None]
    d = x_clean * factor - y_clean * factor
    if lost is not None:
        d += lost.where(finite, 0.0) * factor
    d.abs_()
    d_scaled, d_exponent = _scale(d, d.amax(1), wide)
    d_max = d_scaled.amax(1)
    place = torch.arange(d.shape[1], device=d.device).expand_as(d)
    # argmax does not guarantee the first of equal values.
    index = place.where(d_scaled == d_max[:, None], d.shape[1]).amin(1)
    x_scaled, x_exponent = _scale(x_clean, x_max, wide)
    y_scaled, y_exponent = _scale(y_clean, y_max, wide)
    return torch.stack(
        [
            x_exponent, x_scaled.square().sum(1), y_exponent, y_scaled.square().sum(1), (x_scaled * y_scaled).sum(1),
            d_exponent + halved, d_scaled.square().sum(1), d_scaled.sum(1), d_max, index.double(),
            x_clean.gather(1, index[:, None])[:, 0], y_clean.gather(1, index[:, None])[:, 0],
            (unequal & ~(x_nan & y_nan)).sum(1).double(), nan.sum(1).double(), inf.sum(1).double(),
        ],
        dim=1,
    )  # fmt: skip


def _scale(v: torch.Tensor, largest: torch.Tensor, wide: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """v * 2**-exponent, with the largest magnitude of each row in [0.5, 1), and the exponents (float64). Exact."""
    if not wide:
        return v, torch.zeros_like(largest)
    exponent = torch.frexp(largest).exponent.long()
    # Two factors, since 2**-exponent leaves float64's range if `largest` is subnormal.
    half = exponent.div(2, rounding_mode="floor")
    scaled = v * _power_of_two(-half)[:, None] * _power_of_two(half - exponent)[:, None]
    return scaled, exponent.double()


def _power_of_two(exponent: torch.Tensor) -> torch.Tensor:
    """2.0**exponent by its bits (int64 in -1022..1023), exact on every device, where pow and exp2 need not be."""
    return ((exponent + 1023) << 52).view(torch.float64)
