"""Statistics of a tensor, and how far two tensors are apart: defined once, used everywhere.

x is the receiver's value before the write, y is the incoming value, and d = x - y is computed in float64.

    rel                  sum(d^2) / sum(x^2 + y^2). The field's 1 - 2*sum(xy)/sum(x^2+y^2), without its cancellation.
    rel_l2               |d| / |y|; inf where y is all zero and x is not.
    max_abs              max(|d|), with the index of the first maximum in flattened order and [x, y] there; index and
                         values are None where max_abs is 0.
    mean_abs             sum(|d|) / number of values compared.
    cosine               sum(xy) / (|x| |y|), within [-1, 1]; 0 where exactly one is all zero.
    mismatched_fraction  values whose bits differ after promotion to a common dtype, over all values; NaN equals NaN,
                         but -0.0 and 0.0 are mismatched (they differ by 0).
    nan, inf             how many *unequal* values are non-finite: nan if exactly one of the two is NaN, inf if one is
                         infinite and the other is another number. They are left out of every sum and maximum, and a
                         rule must fail if they are not 0. Equal non-finite values differ by 0.

Whole numbers that float64 cannot represent (int64 and uint64 from 2^53 on) are subtracted exactly before d is rounded
to float64, so unequal ones never differ by 0. `max_abs_values` has them exactly.

Two tensors that are empty or all zero have rel 0, rel_l2 0 and cosine 1. If no value can be compared, the fields are
None. A complex tensor counts as its real and imaginary parts: one more dimension of size 2 in `max_abs_index`, twice as
many values. So does one of packed float4 values, two in a byte, the lower four bits first. A dtype whose bytes torch
does not read as numbers (`bits8`, `uint4`, ...) has only `mismatched_fraction`, unless all bytes are equal.

Statistics of one tensor are over its finite values (None if it has none). std is that of the population (divided by n);
nan and inf count all of the tensor's.

Level `full` gives everything. `light` costs about one pass: a Difference with rel, rel_l2, max_abs with its index and
values, mismatched_fraction, nan and inf, and no statistics of the single tensors. `off` gives nothing.

There are three steps: sums of each chunk (`chunk_sums.py`) are combined by `math.fsum` and made into records. Chunks
are fixed on the flattened index (`flat_chunks.py`), so that neither strides nor order nor the number of threads change
a digit. No step has more than a few chunks in memory. CUDA tensors stay on their device, and the host waits once.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache
from typing import Any, Literal, NamedTuple

import numpy as np
import torch

from grafter.core.measures.chunk_pass import first_maximum, pass_over_pair, pass_over_tensor
from grafter.core.measures.chunk_sums import PairSums, TensorSums
from grafter.core.measures.flat_chunks import CHUNK, PACKED_FLOAT4, are_paired, bits, is_opaque
from grafter.core.records import Difference, TensorStatistics
from grafter.errors import UsageError

StatisticsLevel = Literal["full", "light", "off"]

# The difference of equal values that are not numbers.
ZERO_DIFFERENCE = Difference(rel=0.0, rel_l2=0.0, max_abs=0.0, mean_abs=0.0, cosine=1.0, mismatched_fraction=0.0)


def summarize(tensor: torch.Tensor, level: StatisticsLevel) -> TensorStatistics | None:
    """The statistics of one plain strided tensor of any shape and dtype; None unless level is `full`.

    Raises UsageError for a quantised tensor, and for a dtype without numbers.
    """
    if level != "full":
        return None
    check_plain(tensor.dtype, tensor.layout)
    with torch.no_grad():
        sums = pass_over_tensor(tensor)
    return make_statistics(tensor.numel(), sums)


def difference(x: torch.Tensor, y: torch.Tensor, level: StatisticsLevel) -> Difference | None:
    """How far x is from y; None if level is `off`. x, y and errors: see `compare`."""
    return None if level == "off" else _compare(x, y, level, statistics=False)[2]


def compare(
    x: torch.Tensor, y: torch.Tensor, level: StatisticsLevel
) -> tuple[TensorStatistics | None, TensorStatistics | None, Difference | None]:
    """The statistics of x and of y (level `full`), and their difference, in one pass over both.

    x, y: plain strided tensors of one shape, with any strides, dtypes and devices (computed on CUDA if either is
    there). Neither is written to, and no random state is used. Raises UsageError for unequal shapes, for quantised
    dtypes, and for two dtypes of which one is packed or is not read as numbers.
    """
    return (None, None, None) if level == "off" else _compare(x, y, level, statistics=level == "full")


def _compare(
    x: torch.Tensor, y: torch.Tensor, level: Literal["full", "light"], statistics: bool
) -> tuple[TensorStatistics | None, TensorStatistics | None, Difference | None]:
    check_layout(x.dtype, x.layout)
    check_layout(y.dtype, y.layout)
    check_pair(x.dtype, y.dtype)
    if x.shape != y.shape:
        raise UsageError(
            f"statistics: the tensors to compare have shapes {list(x.shape)} and {list(y.shape)}. A difference is"
            " defined value by value. Bring them to one shape first."
        )
    if is_opaque(x.dtype):
        unequal = bits(x) != bits(y).to(x.device)
        return None, None, byte_difference(int(torch.count_nonzero(unequal)), x.numel())
    with torch.no_grad():
        sums = pass_over_pair(x, y, level, statistics)
    before = incoming = None
    if statistics:
        before, incoming = make_statistics(x.numel(), sums.x), make_statistics(y.numel(), sums.y)
    parts_shape = [*x.shape, 2] if are_paired(x.dtype, y.dtype) else list(x.shape)
    return before, incoming, make_difference(parts_shape, sums.pair, level)


def check_plain(dtype: torch.dtype, layout: torch.layout = torch.strided) -> None:
    """Raise UsageError if a tensor of this dtype and layout does not hold plain numbers."""
    check_layout(dtype, layout)
    if is_opaque(dtype):
        raise UsageError(
            f"statistics: torch does not read a tensor of dtype {dtype} as numbers. Unpack it, or set"
            " GRAFTER_STATS=off."
        )


@lru_cache(maxsize=64)
def check_layout(dtype: torch.dtype, layout: torch.layout) -> None:
    """Raise UsageError if a tensor of this dtype and layout does not hold one value after the other in memory."""
    if layout is not torch.strided or str(dtype).startswith(("torch.q", "torch.quint")):
        raise UsageError(
            f"statistics: a tensor of dtype {dtype} and layout {layout} holds no plain numbers. Dequantise or"
            " unpack it, or set GRAFTER_STATS=off."
        )


@lru_cache(maxsize=64)
def check_pair(x: torch.dtype, y: torch.dtype) -> None:
    """Raise UsageError if values of these two dtypes cannot be compared."""
    if x != y and (is_opaque(x) or is_opaque(y) or PACKED_FLOAT4 in (x, y)):
        raise UsageError(
            f"statistics: values of the dtypes {x} and {y} cannot be compared: one of them is packed, or torch does not"
            " read it as numbers. Unpack it, or give both sides one dtype."
        )


def byte_difference(unequal: int, count: int) -> Difference:
    """The difference of `count` values that are not numbers, `unequal` of which have different bytes."""
    return Difference(mismatched_fraction=unequal / count) if unequal else ZERO_DIFFERENCE


class _Scaled(NamedTuple):
    """A sum that may leave float64's range: value * 2**exponent."""

    value: float
    exponent: int

    def over(self, other: _Scaled) -> float:
        return _ldexp(self.value / other.value, self.exponent - other.exponent)

    def root(self) -> _Scaled:
        odd = self.exponent % 2
        return _Scaled(math.sqrt(self.value * 2.0**odd), (self.exponent - odd) // 2)


def _ldexp(value: float, exponent: int) -> float:
    try:
        return math.ldexp(value, exponent)
    except OverflowError:
        return math.copysign(math.inf, value)


def _combine(values: Sequence[float], exponents: Sequence[float]) -> _Scaled:
    """The exactly rounded sum of value * 2**exponent, in the unit of the largest term."""
    if not any(exponents):
        return _Scaled(math.fsum(values), 0)
    present = [(value, int(exponent)) for value, exponent in zip(values, exponents, strict=True) if value]
    unit = max((math.frexp(value)[1] + exponent for value, exponent in present), default=0)
    return _Scaled(math.fsum(_ldexp(value, exponent - unit) for value, exponent in present), unit)


def make_statistics(numel: int, sums: Sequence[TensorSums]) -> TensorStatistics:
    """The record of all chunks' sums, in order. numel: that of the tensor, with complex numbers counted once."""
    present = [chunk for chunk in sums if chunk.finite]
    nan, inf = int(sum(chunk.nan for chunk in sums)), int(sum(chunk.inf for chunk in sums))
    if not present:
        return TensorStatistics(numel=numel, nan=nan, inf=inf)
    columns = _columns(present)
    finite = sum(columns.finite)
    low, high = min(columns.low), max(columns.high)
    total = _combine(columns.total, columns.exponent)
    absolute = _combine(columns.absolute, columns.exponent)
    return TensorStatistics(
        numel=numel,
        mean=_ldexp(total.value / finite, total.exponent),
        std=_standard_deviation(present, finite, total, math.frexp(max(-low, high))[1]),
        min=low,
        max=high,
        abs_mean=_ldexp(absolute.value / finite, absolute.exponent),
        nan=nan,
        inf=inf,
    )


def _columns(sums: Sequence[TensorSums] | Sequence[PairSums]) -> Any:
    """The sums of all chunks, transposed: each field holds the values of all chunks."""
    return type(sums[0])._make(zip(*sums, strict=True))


def _standard_deviation(sums: Sequence[TensorSums], finite: float, total: _Scaled, unit: int) -> float:
    """Within the chunks, plus between their means (Chan, Golub, LeVeque 1979), in units of 2**unit."""
    mean = _ldexp(total.value / finite, total.exponent - unit)
    terms = []
    for chunk in sums:
        scale = int(chunk.exponent) - unit
        terms.append(_ldexp(chunk.centred, 2 * scale))
        terms.append(chunk.finite * (_ldexp(chunk.total / chunk.finite, scale) - mean) ** 2)
    return _ldexp(math.sqrt(math.fsum(terms) / finite), unit)


def make_difference(shape: list[int], sums: Sequence[PairSums], level: str) -> Difference:
    """The record of a pair. shape: that of the parts; for complex tensors it has a last dimension of 2."""
    parts = math.prod(shape)
    if not parts:
        full = level == "full"
        zero, one = (0.0, 1.0) if full else (None, None)
        return Difference(rel=0.0, rel_l2=0.0, max_abs=0.0, mean_abs=zero, cosine=one, mismatched_fraction=0.0)
    columns = _columns(sums)
    nan, inf = int(sum(columns.nan)), int(sum(columns.inf))
    mismatched = sum(columns.mismatched) / parts
    compared = parts - nan - inf
    if not compared:
        return Difference(mismatched_fraction=mismatched, nan=nan, inf=inf)
    max_abs, index, values = _maximum(shape, sums)
    return Difference(
        **_from_squares(columns, compared, level),
        max_abs=max_abs,
        max_abs_index=index,
        max_abs_values=values,
        mismatched_fraction=mismatched,
        nan=nan,
        inf=inf,
    )


def _from_squares(columns: Any, compared: int, level: str) -> dict[str, float]:
    """rel and rel_l2; at level `full` also mean_abs and cosine. columns: see `_columns`."""
    x_squares = _combine(columns.x_squares, [2 * exponent for exponent in columns.x_exponent])
    y_squares = _combine(columns.y_squares, [2 * exponent for exponent in columns.y_exponent])
    d_squares = _combine(columns.d_squares, [2 * exponent for exponent in columns.d_exponent])
    both = _combine(*zip(x_squares, y_squares, strict=True))
    result = {
        "rel": d_squares.over(both) if d_squares.value else 0.0,
        "rel_l2": _relative_l2(d_squares, y_squares),
    }
    if level == "full":
        absolute = _combine(columns.d_absolute, columns.d_exponent)
        exponents = [x + y for x, y in zip(columns.x_exponent, columns.y_exponent, strict=True)]
        result["mean_abs"] = _ldexp(absolute.value / compared, absolute.exponent)
        result["cosine"] = _cosine(_combine(columns.products, exponents), x_squares, y_squares)
    return result


def _relative_l2(d_squares: _Scaled, y_squares: _Scaled) -> float:
    if not d_squares.value:
        return 0.0
    return d_squares.root().over(y_squares.root()) if y_squares.value else math.inf


def _cosine(products: _Scaled, x_squares: _Scaled, y_squares: _Scaled) -> float:
    if not x_squares.value or not y_squares.value:
        return 1.0 if x_squares.value == y_squares.value else 0.0
    if x_squares == y_squares:
        # Without a root, equal tensors have exactly 1.
        return min(1.0, max(-1.0, products.over(x_squares)))
    x_norm, y_norm = x_squares.root(), y_squares.root()
    norms = _Scaled(x_norm.value * y_norm.value, x_norm.exponent + y_norm.exponent)
    return min(1.0, max(-1.0, products.over(norms)))


def _maximum(shape: list[int], sums: Sequence[PairSums]) -> tuple[float, list[int] | None, list[int | float] | None]:
    """max(|d|), its index, and x and y there."""
    chunk = first_maximum(sums)
    if chunk is None:
        return 0.0, None, None
    entry = sums[chunk]
    place = chunk * CHUNK + int(entry.d_index)
    index = [int(i) for i in np.unravel_index(place, shape)] if shape else []
    return _ldexp(entry.d_max, int(entry.d_exponent)), index, [entry.x_at, entry.y_at]
