"""A pair of tensors measured block by block: values come once, in the order of the flattened index, and are not kept.

    blocks, of any size   |      |         |   |            |
    chunks, always CHUNK  |    |    |    |    |    |    |  |      -> PairSums, TensorSums, Rows, Magnitudes, UlpSums

What one block leaves over after its last whole chunk waits for the next, so no digit depends on the blocks, and what
comes out of the sums is what `stats.compare` gives for the whole tensors. What is held: one chunk of each side, and
some 30 numbers a chunk (0.1 % of what was read).

Where the dtypes differ, the pair is measured once more with both in the narrower dtype: the baseline's float32 against
the target's bfloat16 then shows what is left when the rounding itself is taken away.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch

from grafter.ledger import Difference, TensorStatistics
from grafter.measures.chunk_pass import WIDE
from grafter.measures.chunk_sums import (
    UNKNOWN_INDEX,
    PairSums,
    TensorSums,
    Workspace,
    exact_rows,
    fast_pair,
    fast_tensors,
)
from grafter.measures.flat_chunks import CHUNK, FlatReader, bits, unequal
from grafter.measures.magnitudes import Between, Magnitudes
from grafter.measures.rows import Rows, WorstRow
from grafter.measures.stats import check_plain, make_difference, make_statistics
from grafter.measures.ulps import NO_ULPS, UlpCounter, UlpSums, narrower, part_dtype

# In thousandths, as `Magnitudes.percentile` takes them.
PERCENTILES = {"p50": 500, "p90": 900, "p99": 990, "p99_9": 999}
# A row is far off where its rel is so many times the median row's.
FAR = 10.0


@dataclass(frozen=True)
class Ulps:
    """Over the `counted` positions at which both values have one sign and are normal; None where there is none."""

    counted: int
    max: int | None
    mean: float | None


@dataclass(frozen=True)
class RowMeasures:
    """Over the rows. `percentiles` are of the rows' rel. `far`: rows whose rel lies above FAR times the median's.

    nonfinite: rows with unequal non-finite values, and the number of the first.
    """

    count: int
    differing: int
    worst: list[WorstRow]
    percentiles: dict[str, Between]
    far: int
    nonfinite: int
    first_nonfinite: int | None


@dataclass(frozen=True)
class Measurement:
    """How far x is from y. `ulps` is None where a dtype is no floating one, or where the narrower one says it.

    magnitudes: (low, high, count) of |d|, where low <= |d| < high; the first bin is 0.
    narrow: everything once more in `narrow_dtype`, where the dtypes differ and both are floating.
    """

    difference: Difference
    ulps: Ulps | None
    percentiles: dict[str, Between]
    rows: RowMeasures
    magnitudes: list[tuple[float, float, int]]
    x: TensorStatistics | None = None
    y: TensorStatistics | None = None
    narrow: Measurement | None = None
    narrow_dtype: torch.dtype | None = None


@dataclass
class _Waiting:
    """What is left of the blocks so far: less than a chunk."""

    x: torch.Tensor
    y: torch.Tensor
    filled: int = 0


@dataclass
class _Sums:
    pair: list[PairSums] = field(default_factory=list)
    x: list[TensorSums] = field(default_factory=list)
    y: list[TensorSums] = field(default_factory=list)


class PairStream:
    """Measures x against y; see `stats` for what each number means.

    shape: of both; row_ndim: how many of its leading dims count the rows. statistics: whether those of x and of y are
    wanted, too. Plain dtypes only (UsageError for packed ones). Not for several threads at once.
    """

    def __init__(
        self, shape: Sequence[int], x: torch.dtype, y: torch.dtype, *, row_ndim: int, statistics: bool = True
    ) -> None:
        check_plain(x)
        check_plain(y)
        self._as_complex = x.is_complex or y.is_complex
        self._numel = math.prod(shape)
        self._shape = [*shape, 2] if self._as_complex else list(shape)
        self._parts = math.prod(self._shape)
        self._statistics = statistics
        narrow = narrower(x, y)
        differ = part_dtype(x) != part_dtype(y)
        self._narrow_dtype = narrow if differ else None
        self._narrow: PairStream | None = None
        if narrow is not None and differ:
            self._narrow = PairStream(self._shape, narrow, narrow, row_ndim=row_ndim, statistics=False)
        self._wide = x in WIDE or y in WIDE
        self._row_count = math.prod(self._shape[:row_ndim])
        self._rows = Rows(max(1, math.prod(self._shape[row_ndim:])))
        self._magnitudes = Magnitudes()
        size = min(CHUNK, self._parts)
        self._space = Workspace(size)
        self._ulps = UlpCounter(narrow, size) if narrow is not None and not differ else None
        self._ulp_sums = NO_ULPS
        self._waiting = _Waiting(torch.empty(size, dtype=part_dtype(x)), torch.empty(size, dtype=part_dtype(y)))
        self._sums = _Sums()
        # (exponent, mantissa) of the largest |d| so far.
        self._largest = (-math.inf, 0.0)
        self._done = 0

    def add(self, x: torch.Tensor, y: torch.Tensor) -> None:
        """The next values of both, in the order of the flattened index: of any shape, on the CPU, as many of each."""
        readers = FlatReader(x, self._as_complex), FlatReader(y, self._as_complex)
        at, end = 0, readers[0].parts
        waiting = self._waiting
        with torch.no_grad(), np.errstate(over="ignore", invalid="ignore"):
            while at < end:
                size = min(CHUNK, self._parts - self._done)
                take = min(size - waiting.filled, end - at)
                pieces = [reader.read(at, at + take) for reader in readers]
                at += take
                if take < size:
                    for kept, piece in zip((waiting.x, waiting.y), pieces, strict=True):
                        kept[waiting.filled : waiting.filled + take].copy_(piece)
                    waiting.filled += take
                    if waiting.filled < size:
                        return
                    pieces = [waiting.x[:size], waiting.y[:size]]
                    waiting.filled = 0
                self._chunk(pieces[0], pieces[1])
                self._done += size

    def finish(self) -> Measurement:
        """What was measured; all values have been added."""
        if self._done != self._parts:
            raise RuntimeError(f"{self._done} of {self._parts} parts were measured.")
        difference = make_difference(self._shape, self._sums.pair, "full")
        x = y = None
        if self._statistics:
            x, y = make_statistics(self._numel, self._sums.x), make_statistics(self._numel, self._sums.y)
        return Measurement(
            difference,
            self._finish_ulps(difference),
            _percentiles(self._magnitudes, difference.max_abs),
            self._finish_rows(),
            self._magnitudes.bins(),
            x,
            y,
            self._narrow.finish() if self._narrow is not None else None,
            self._narrow_dtype,
        )

    # --- one chunk

    def _chunk(self, x: torch.Tensor, y: torch.Tensor) -> None:
        """x, y: 1-D and contiguous, the next chunk of each."""
        if self._narrow is not None and self._narrow_dtype is not None:
            self._narrow.add(x.to(self._narrow_dtype), y.to(self._narrow_dtype))
        space = self._space
        if len(x) != space.size:
            space = self._space = Workspace(len(x))
        mismatched = self._mismatched(x, y, space)
        same_bits = mismatched == 0 and x.dtype == y.dtype
        self._count_ulps(x, y, same_bits)
        pair = fast_pair(space, mismatched, same_bits, self._wide, "full")
        if pair is None:
            self._any_chunk(space.x.tensor, space.x.tensor if same_bits else space.y.tensor)
        else:
            self._finite_chunk(pair, same_bits)

    def _mismatched(self, x: torch.Tensor, y: torch.Tensor, space: Workspace) -> int:
        """How many parts differ in their bits; leaves both in `space`, y only if it differs, and which in its mask."""
        same_dtype = x.dtype == y.dtype
        if same_dtype:
            # Compared first: this reads memory at twice the speed of the conversion, which then finds it in cache.
            np.not_equal(bits(x).numpy(), bits(y).numpy(), out=space.unequal)
        mismatched = int(np.count_nonzero(space.unequal)) if same_dtype else -1
        space.x.tensor.copy_(x)
        if mismatched:
            space.y.tensor.copy_(y)
        if not same_dtype:
            np.copyto(space.unequal, unequal(x, y, space.x.tensor, space.y.tensor).numpy())
            mismatched = int(np.count_nonzero(space.unequal))
        return mismatched

    def _finite_chunk(self, pair: PairSums, same_bits: bool) -> None:
        """A chunk of finite values of ordinary size: they lie in the workspace, and |d| in its d."""
        space = self._space
        x, y, d = space.x.values, space.y.values, space.d.values
        if same_bits:
            self._rows.add_equal(self._done, x)
            self._magnitudes.add_zeros(space.size)
        else:
            self._rows.add(self._done, x, y, d)
            self._magnitudes.add(d)
        self._sums.pair.append(self._placed(pair))
        if self._statistics:
            tensors = fast_tensors(space, [pair.x_squares] if same_bits else [pair.x_squares, pair.y_squares])
            self._sums.x.append(tensors[0])
            self._sums.y.append(tensors[-1])

    def _any_chunk(self, x: torch.Tensor, y: torch.Tensor) -> None:
        """A chunk with values that are not finite, or whose squares leave float64."""
        mask = torch.from_numpy(self._space.unequal)
        pair, x_sums, y_sums = exact_rows(x[None], y[None], mask[None], self._wide, self._statistics)
        self._rows.add_any(self._done, x, y)
        finite = x.isfinite() & y.isfinite()
        same = ~finite & ((x == y) | (x.isnan() & y.isnan()))
        self._magnitudes.add((x - y).abs().where(~same, 0.0)[finite | same].numpy())
        self._sums.pair.append(self._placed(PairSums._make(pair[0].tolist())))
        if x_sums is not None and y_sums is not None:
            self._sums.x.append(TensorSums._make(x_sums[0].tolist()))
            self._sums.y.append(TensorSums._make(y_sums[0].tolist()))

    def _placed(self, pair: PairSums) -> PairSums:
        """The place of the maximum is looked up where it is the largest so far: the values are not kept."""
        if not pair.d_max:
            return pair
        mantissa, exponent = math.frexp(pair.d_max)
        size = (exponent + pair.d_exponent, mantissa)
        if size <= self._largest:
            return pair
        self._largest = size
        if pair.d_index != UNKNOWN_INDEX:
            return pair
        space = self._space
        index = int(space.d.values.argmax())
        return pair._replace(d_index=float(index), x_at=float(space.x.values[index]), y_at=float(space.y.values[index]))

    def _count_ulps(self, x: torch.Tensor, y: torch.Tensor, same_bits: bool) -> None:
        if self._ulps is None:
            return
        found = self._ulps.equal(x) if same_bits else self._ulps.compare(x, y)
        known = self._ulp_sums
        self._ulp_sums = UlpSums(
            known.counted + found.counted, max(known.largest, found.largest), known.total + found.total
        )

    # --- at the end

    def _finish_ulps(self, difference: Difference) -> Ulps | None:
        if self._ulps is None:
            return None
        counted, largest, total = self._ulp_sums
        if counted:
            return Ulps(counted, largest, total / counted)
        # Nothing but zeros, say: equal is equal.
        return Ulps(0, 0, 0.0) if difference.mismatched_fraction == 0 else Ulps(0, None, None)

    def _finish_rows(self) -> RowMeasures:
        rows = self._rows
        percentiles = _percentiles(rows.rel, rows.worst()[0].rel if rows.worst() else 0.0)
        differing = rows.rel.count_from(math.ulp(0.0))
        far = (
            rows.rel.count_from(FAR * percentiles["p50"].high) if percentiles and percentiles["p50"].high else differing
        )
        return RowMeasures(
            self._row_count, differing, rows.worst(), percentiles, far, rows.nonfinite, rows.first_nonfinite
        )


def _percentiles(counted: Magnitudes, largest: float | None) -> dict[str, Between]:
    """Each by its bin; nothing is larger than the largest."""
    found: dict[str, Between] = {}
    for name, thousandths in PERCENTILES.items():
        between = counted.percentile(thousandths)
        if between is not None and largest is not None:
            found[name] = Between(min(between.low, largest), min(between.high, largest))
    return found
