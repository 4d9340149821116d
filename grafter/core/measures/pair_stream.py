"""A pair of tensors measured block by block: values come once, in the order of the flattened index, and are not kept.

    blocks, of any size   |      |         |   |            |
    chunks, always CHUNK  |    |    |    |    |    |    |  |      -> PairSums, TensorSums, Rows, Magnitudes, UlpSums
    runs of chunks        |                  |              |      -> by the thread that is free, merged in their order

What one block leaves over after its last whole chunk waits for the next, so no digit depends on the blocks or on who
measured them, and what comes out of the sums is what `stats.compare` gives for the whole tensors. What is held: one
chunk of each side, and some 30 numbers a chunk (0.1 % of what was read).

Where the dtypes differ, the pair is measured once more with both in the narrower dtype: the baseline's float32 against
the target's bfloat16 then shows what is left when the rounding itself is taken away.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from concurrent.futures import Executor, Future
from dataclasses import dataclass

import numpy as np
import torch

from grafter.core.measures.flat_chunks import CHUNK, FlatReader, are_paired, bits
from grafter.core.measures.magnitudes import Between, Magnitudes
from grafter.core.measures.pair_chunks import CHUNKS, PairMeter, RunSums
from grafter.core.measures.rows import WorstRow
from grafter.core.measures.stats import byte_difference, check_pair, check_plain, make_difference, make_statistics
from grafter.core.measures.ulps import UlpSums, narrower, part_dtype
from grafter.core.records import Difference, TensorStatistics

# Chunks that are handed to another thread together: 2 MiB of float32, half a millisecond or more.
_RUN = 4 * CHUNKS

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
    # None where values are no numbers, and differ.
    rows: RowMeasures | None
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


class PairStream:
    """Measures x against y; see `stats` for what each number means.

    shape: of both; row_ndim: how many of its leading dims count the rows. statistics: whether those of x and of y are
    wanted, too. Dtypes of numbers only, packed ones only both (UsageError; see `ByteStream`). Not for several
    threads at once; of `helpers`, threads that have nothing to do measure parts of large blocks.
    """

    def __init__(
        self,
        shape: Sequence[int],
        x: torch.dtype,
        y: torch.dtype,
        *,
        row_ndim: int,
        statistics: bool = True,
        helpers: Executor | None = None,
    ) -> None:
        check_pair(x, y)
        check_plain(x)
        self._as_complex = x.is_complex or y.is_complex
        self._numel = math.prod(shape)
        self._shape = [*shape, 2] if are_paired(x, y) else list(shape)
        self._parts = math.prod(self._shape)
        self._dtypes, self._statistics, self._helpers = (x, y), statistics, helpers
        self._row_count = math.prod(self._shape[:row_ndim])
        self._row_width = max(1, math.prod(self._shape[row_ndim:]))
        self._meter = self._new_meter()
        self._idle_meters: list[PairMeter] = []
        self._sums = self._meter.sums(self._row_width)
        size = min(CHUNK, self._parts)
        self._waiting = _Waiting(torch.empty(size, dtype=part_dtype(x)), torch.empty(size, dtype=part_dtype(y)))
        self._done = 0

    def add(self, x: torch.Tensor, y: torch.Tensor) -> None:
        """The next values of both, in the order of the flattened index: of any shape, on the CPU, as many of each.

        Nothing of them is held once this returns.
        """
        readers = FlatReader(x, self._as_complex), FlatReader(y, self._as_complex)
        at, end = 0, readers[0].parts
        waiting = self._waiting
        with torch.no_grad(), np.errstate(over="ignore", invalid="ignore"):
            while at < end:
                chunks = (end - at) // CHUNK
                if self._helpers is not None and not waiting.filled and chunks >= 2 * _RUN:
                    self._share(self._helpers, readers, at, chunks)
                    at += chunks * CHUNK
                    continue
                if not waiting.filled and chunks > 1:
                    size = min(chunks, CHUNKS) * CHUNK
                    self._meter.measure(self._sums, self._done, *(reader.read(at, at + size) for reader in readers))
                    at += size
                    self._done += size
                    continue
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
                self._meter.measure(self._sums, self._done, pieces[0], pieces[1])
                self._done += size

    def finish(self) -> Measurement:
        """What was measured; all values have been added."""
        if self._done != self._parts:
            raise RuntimeError(f"{self._done} of {self._parts} parts were measured.")
        return self._finished(self._sums, *self._dtypes)

    # --- runs of chunks

    def _new_meter(self) -> PairMeter:
        return PairMeter(*self._dtypes, self._parts, statistics=self._statistics)

    def _share(self, helpers: Executor, readers: tuple[FlatReader, FlatReader], at: int, chunks: int) -> None:
        """Measure so many whole chunks of a block: each run by a helper, if one takes it before this thread does."""
        runs = [
            _Run(self, readers, at + first * CHUNK, self._done + first * CHUNK, min(_RUN, chunks - first))
            for first in range(0, chunks, _RUN)
        ]
        futures: list[Future[RunSums]] = [helpers.submit(run.measured) for run in runs]
        try:
            own = [run.measured() if future.cancel() else None for run, future in zip(runs, futures, strict=True)]
            for sums, future in zip(own, futures, strict=True):
                self._sums.merge(sums if sums is not None else future.result())
        finally:
            for run, future in zip(runs, futures, strict=True):
                # What was cancelled stays in the helpers' queue for a while; the block does not.
                future.cancel()
                run.let_go()
        self._done += chunks * CHUNK

    def measure_run(self, readers: tuple[FlatReader, FlatReader], at: int, start: int, chunks: int) -> RunSums:
        """The sums of chunks that begin at `at` of the block and at `start` of the whole. By any thread."""
        # list's own pop and append are whole, whatever the other threads do.
        try:
            meter = self._idle_meters.pop()
        except IndexError:
            meter = self._new_meter()
        sums = meter.sums(self._row_width, start)
        with torch.no_grad(), np.errstate(over="ignore", invalid="ignore"):
            for first in range(0, chunks, CHUNKS):
                done, end = first * CHUNK, min(first + CHUNKS, chunks) * CHUNK
                meter.measure(sums, start + done, *(reader.read(at + done, at + end) for reader in readers))
        self._idle_meters.append(meter)
        return sums

    # --- at the end

    def _finished(self, sums: RunSums, x: torch.dtype, y: torch.dtype) -> Measurement:
        difference = make_difference(self._shape, sums.pair, "full")
        of_x: TensorStatistics | None = None
        of_y: TensorStatistics | None = None
        # The narrower pair has none of its own.
        if self._statistics and sums is self._sums:
            of_x, of_y = make_statistics(self._numel, sums.x), make_statistics(self._numel, sums.y)
        narrow_dtype = self._meter.narrow_dtype if sums.narrow is not None else None
        narrow = None
        if sums.narrow is not None and narrow_dtype is not None:
            narrow = self._finished(sums.narrow, narrow_dtype, narrow_dtype)
        return Measurement(
            difference,
            _finish_ulps(sums.ulps, difference, x, y),
            _percentiles(sums.magnitudes, difference.max_abs),
            self._finish_rows(sums),
            sums.magnitudes.bins(),
            of_x,
            of_y,
            narrow,
            narrow_dtype,
        )

    def _finish_rows(self, sums: RunSums) -> RowMeasures:
        rows = sums.rows
        percentiles = _percentiles(rows.rel, rows.worst()[0].rel if rows.worst() else 0.0)
        differing = rows.rel.count_from(math.ulp(0.0))
        far = (
            rows.rel.count_from(FAR * percentiles["p50"].high) if percentiles and percentiles["p50"].high else differing
        )
        return RowMeasures(
            self._row_count, differing, rows.worst(), percentiles, far, rows.nonfinite, rows.first_nonfinite
        )


class _Run:
    """Some chunks of a block, until they are measured."""

    def __init__(
        self, stream: PairStream, readers: tuple[FlatReader, FlatReader], at: int, start: int, chunks: int
    ) -> None:
        self._stream: PairStream | None = stream
        self._readers: tuple[FlatReader, FlatReader] | None = readers
        self._place = (at, start, chunks)

    def measured(self) -> RunSums:
        assert self._stream is not None and self._readers is not None
        return self._stream.measure_run(self._readers, *self._place)

    def let_go(self) -> None:
        self._stream = self._readers = None


def _finish_ulps(sums: UlpSums, difference: Difference, x: torch.dtype, y: torch.dtype) -> Ulps | None:
    if narrower(x, y) is None or part_dtype(x) != part_dtype(y):
        return None
    counted, largest, total = sums
    if counted:
        return Ulps(counted, largest, total / counted)
    # Nothing but zeros, say: equal is equal.
    return Ulps(0, 0, 0.0) if difference.mismatched_fraction == 0 else Ulps(0, None, None)


def _percentiles(counted: Magnitudes, largest: float | None) -> dict[str, Between]:
    """Each by its bin; nothing is larger than the largest."""
    found: dict[str, Between] = {}
    for name, thousandths in PERCENTILES.items():
        between = counted.percentile(thousandths)
        if between is not None and largest is not None:
            found[name] = Between(min(between.low, largest), min(between.high, largest))
    return found


# Values of a dtype that torch does not read as numbers, compared block by block: how many have other bytes.


class ByteStream:
    """As `PairStream`, of two tensors of one such dtype (UsageError for two).

    row_ndim: how many dims count the rows.
    """

    def __init__(self, shape: Sequence[int], x: torch.dtype, y: torch.dtype, *, row_ndim: int) -> None:
        check_pair(x, y)
        self._numel = math.prod(shape)
        self._row_count = math.prod(shape[:row_ndim])
        self._done = self._unequal = 0

    def add(self, x: torch.Tensor, y: torch.Tensor) -> None:
        """The next values of both, as many of each."""
        self._unequal += int(torch.count_nonzero(bits(x) != bits(y)))
        self._done += x.numel()

    def finish(self) -> Measurement:
        """What was measured; all values have been added. Of unequal values only their number is known."""
        if self._done != self._numel:
            raise RuntimeError(f"{self._done} of {self._numel} values were compared.")
        rows = None if self._unequal else RowMeasures(self._row_count, 0, [], {}, 0, 0, None)
        return Measurement(byte_difference(self._unequal, self._numel), None, {}, rows, [])
