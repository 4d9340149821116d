"""Measures of a pair that comes block by block: right by fractions, the same digits however the blocks are cut.

Costs about 4 s of one core.
"""

from __future__ import annotations

import math
import threading
import weakref
from concurrent.futures import ThreadPoolExecutor
from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from grafter.core.measures.flat_chunks import CHUNK
from grafter.core.measures.magnitudes import Magnitudes
from grafter.core.measures.pair_stream import Measurement, PairStream, RowMeasures
from grafter.core.measures.rows import WORST_ROWS, Rows
from grafter.core.measures.stats import compare
from grafter.core.measures.ulps import UlpCounter, narrower
from grafter.errors import UsageError

NAN, INF = math.nan, math.inf
FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.float8_e4m3fn, torch.float8_e5m2)


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def measure(x: torch.Tensor, y: torch.Tensor, *, row_ndim: int = 0, step: int | None = None) -> Measurement:
    """All of it, in blocks of `step` values."""
    stream = PairStream(x.shape, x.dtype, y.dtype, row_ndim=row_ndim)
    flat_x, flat_y = x.reshape(-1), y.reshape(-1)
    step = step or max(1, x.numel())
    for start in range(0, x.numel(), step):
        stream.add(flat_x[start : start + step], flat_y[start : start + step])
    return stream.finish()


# --- the same digits as for whole tensors, however they come


@pytest.mark.parametrize("second", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_what_comes_in_blocks_is_measured_as_the_whole_would_be(second: torch.dtype) -> None:
    """Statistics and difference are those of `stats.compare`, to the last digit, for any size of block."""
    x = random(7, 3 * CHUNK // 7 + 11)
    y = (x + 0.01 * random(*x.shape, seed=1)).to(second)
    whole = compare(x, y, "full")
    streams = [measure(x, y, row_ndim=1, step=step) for step in (None, 1000, CHUNK, CHUNK + 1, 70_001)]
    for stream in streams:
        assert (stream.x, stream.y, stream.difference) == whole
        assert stream == streams[0]


@settings(max_examples=30)
@given(st.lists(st.integers(1, CHUNK), max_size=8), st.integers(1, 2 * CHUNK))
def test_no_digit_depends_on_where_blocks_end(cuts: list[int], width: int) -> None:
    """Any cuts give what one block gives: sums, maxima, percentiles, ULPs, rows."""
    x = random(2 * CHUNK + 501)
    y = x + 1e-3 * random(len(x), seed=2)
    x[5], y[CHUNK + 7], y[2 * CHUNK] = NAN, INF, 1.0
    stream = PairStream((len(x) // width, width), x.dtype, y.dtype, row_ndim=1)
    one = PairStream((len(x) // width, width), x.dtype, y.dtype, row_ndim=1)
    end = len(x) // width * width
    one.add(x[:end], y[:end])
    at = 0
    for cut in (*cuts, end):
        stop = min(end, at + cut)
        stream.add(x[at:stop], y[at:stop])
        at = stop
    assert stream.finish() == one.finish()


@pytest.mark.parametrize("width", [256 * 30, 4 * CHUNK + 256, 1000], ids=str)
def test_no_digit_depends_on_who_measured(width: int) -> None:
    """Runs of chunks that other threads took are merged in their order: rows across them, maxima, NaN, other dtypes."""
    rows = 90 * CHUNK // width
    x = random(rows * width)
    y = x + 1e-3 * random(len(x), seed=2)
    x[5], y[16 * CHUNK], y[40 * CHUNK + 1], y[70 * CHUNK :] = NAN, INF, 1e30, x[70 * CHUNK :]
    for second in (torch.float32, torch.bfloat16):
        with ThreadPoolExecutor(3) as helpers:
            alone, helped = (
                PairStream((rows, width), x.dtype, second, row_ndim=1, helpers=own) for own in (None, helpers)
            )
            for start in range(0, len(x), 40 * CHUNK + 3):
                for stream in (alone, helped):
                    stream.add(x[start : start + 40 * CHUNK + 3], y[start : start + 40 * CHUNK + 3].to(second))
            assert helped.finish() == alone.finish()


def test_work_that_no_helper_has_begun_is_done_by_the_caller() -> None:
    """Helpers that are busy for good delay nothing, and what waits in their queue holds no block."""
    x = random(40 * CHUNK)
    stop = threading.Event()
    with ThreadPoolExecutor(1) as helpers:
        try:
            helpers.submit(stop.wait)
            stream = PairStream(x.shape, x.dtype, x.dtype, row_ndim=0, helpers=helpers)
            block = x.clone()
            stream.add(block, x)
            gone = weakref.ref(block)
            del block
            assert gone() is None
            assert stream.finish() == measure(x, x)
        finally:
            stop.set()


def test_a_stream_that_is_short_of_values_gives_nothing() -> None:
    """A measurement of less than all values is refused."""
    stream = PairStream((4,), torch.float32, torch.float32, row_ndim=0)
    stream.add(torch.ones(3), torch.ones(3))
    with pytest.raises(RuntimeError, match="0 of 4"):
        stream.finish()
    with pytest.raises(UsageError, match="one of them is packed"):
        PairStream((4,), torch.float4_e2m1fn_x2, torch.float32, row_ndim=0)


@pytest.mark.parametrize("shape", [(), (0, 4), (1,), (3, 0)])
def test_scalars_and_empty_tensors(shape: tuple[int, ...]) -> None:
    """They differ by 0 and have no percentiles where there is no value."""
    result = measure(torch.ones(shape), torch.ones(shape))
    assert result.difference.rel == 0
    assert result.ulps is not None and result.ulps.max == 0
    assert bool(result.percentiles) == (shape in ((), (1,)))


# --- magnitudes


@given(
    st.lists(st.floats(min_value=0, allow_nan=False) | st.sampled_from([0.0, 1.0, 2.0, 1.125]), min_size=1),
    st.integers(1, 1000),
)
def test_a_percentile_lies_in_its_bin(values: list[float], thousandths: int) -> None:
    """The bounds hold the nearest-rank percentile of the sorted values, and are 12.5 % apart or less."""
    counted = Magnitudes()
    counted.add(np.array(values))
    exact = sorted(values)[max(1, math.ceil(Fraction(len(values) * thousandths, 1000))) - 1]
    found = counted.percentile(thousandths)
    assert found is not None
    if exact >= 2.0**-1022:
        assert found.low <= exact <= found.high
        assert found.high <= found.low * 1.125 or exact > 1e308
    assert sum(count for _, _, count in counted.bins()) == len(values) == counted.count


@given(st.lists(st.lists(st.floats(0, 1e300)), max_size=5))
def test_histograms_merge_exactly(parts: list[list[float]]) -> None:
    """Counted apart and merged is counted together; zeros may be given as a number."""
    together, merged = Magnitudes(), Magnitudes()
    for part in parts:
        apart = Magnitudes()
        apart.add(np.array([value for value in part if value]))
        apart.add_zeros(part.count(0))
        merged.merge(apart)
        together.add(np.array(part))
    assert merged.bins() == together.bins()
    assert Magnitudes().percentile(500) is None


def test_the_percentiles_of_differences() -> None:
    """A thousand differences of 1, one of 100: p50 and p99 stay at 1, p99.9 with its rank, the largest is exact."""
    x = torch.zeros(1001)
    y = torch.ones(1001)
    y[400] = 100.0
    result = measure(x, y)
    assert result.percentiles["p50"].low <= 1 <= result.percentiles["p99"].high < 1.2
    assert measure(x[400:401], y[400:401]).percentiles["p99_9"] == (96.0, 100.0)
    assert [count for _, _, count in result.magnitudes] == [1000, 1]


# --- ULPs


def brute_ulps(x: torch.Tensor, y: torch.Tensor) -> tuple[int, int, int]:
    """By counting steps through all numbers of a 16-bit dtype."""
    tiny = torch.finfo(x.dtype).tiny
    every = torch.arange(-(2**15), 2**15).to(torch.int16).view(x.dtype)
    positive = sorted({value for value in every.double().tolist() if value >= tiny and value != INF})
    place = {value: number for number, value in enumerate(positive)}
    found = [
        abs(place[abs(a)] - place[abs(b)])
        for a, b in zip(x.double().tolist(), y.double().tolist(), strict=True)
        if abs(a) in place and abs(b) in place and (a > 0) == (b > 0)
    ]
    return len(found), max(found, default=0), sum(found)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_ulps_are_steps_from_number_to_number(dtype: torch.dtype) -> None:
    """Among all numbers of a 16-bit dtype, both signs, zeros, subnormals, NaN and Inf among them."""
    generator = torch.Generator().manual_seed(3)
    pairs = torch.randint(-(2**15), 2**15, (2, 20_000), generator=generator).to(torch.int16)
    near = pairs[0] + torch.randint(-3, 4, (20_000,), generator=generator).to(torch.int16)
    for second in (pairs[1], near):
        x, y = pairs[0].view(dtype), second.view(dtype)
        assert tuple(UlpCounter(dtype, len(x)).compare(x, y)) == brute_ulps(x, y)
    x = pairs[0].view(dtype)
    assert tuple(UlpCounter(dtype, len(x)).equal(x)) == brute_ulps(x, x)


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_one_step_is_one_ulp_in_every_dtype(dtype: torch.dtype) -> None:
    """1 and the next number; the largest and the one before; not across zero, and not among subnormals."""
    eps, tiny, largest = (getattr(torch.finfo(dtype), name) for name in ("eps", "tiny", "max"))
    x = torch.tensor([1.0, -1.0, largest, 1.0, tiny, 0.0], dtype=torch.float64).to(dtype)
    y = torch.tensor([1 + eps, -1 - eps, largest, -1.0, 0.0, 0.0], dtype=torch.float64).to(dtype)
    result = measure(x, y)
    assert result.ulps is not None
    assert (result.ulps.counted, result.ulps.max) == (3, 1)
    assert result.ulps.mean == pytest.approx(2 / 3)


@pytest.mark.parametrize("rel", [0.02, 0.5])
@pytest.mark.parametrize("chunks", [1, 4])
def test_the_mean_of_large_distances_is_exact(chunks: int, rel: float) -> None:
    """float64 values that are some per cent apart: 2**47 and more each, whose sum leaves int64 at four chunks."""
    x = random(chunks * CHUNK).double()
    y = x * (1 + rel)
    ulps = measure(x, y).ulps
    exact = Fraction(sum((x.view(torch.int64) - y.view(torch.int64)).abs().tolist()), len(x))
    assert ulps is not None and ulps.mean == pytest.approx(float(exact), rel=1e-12)


def test_scales_have_no_ulps() -> None:
    """float8_e8m0fnu (MX scales) has no sign and no zero; it is measured without ULPs, and not rounded to."""
    scales = torch.tensor([1.0, 2.0, 4.0, 0.5]).to(torch.float8_e8m0fnu)
    for other in (scales, scales.float()):
        result = measure(scales, other)
        assert result.ulps is None and result.narrow is None and result.difference.mismatched_fraction == 0


def test_the_sum_of_huge_distances_does_not_overflow() -> None:
    """float64 distances of 2**62, thirty thousand of them, have a right mean."""
    x = torch.full((30_000,), 2.3e-308, dtype=torch.float64)
    y = torch.full((30_000,), 1.7e308, dtype=torch.float64)
    steps = int(y[0:1].view(torch.int64)) - int(x[0:1].view(torch.int64))
    ulps = measure(x, y).ulps
    assert ulps is not None and ulps.max == steps and ulps.mean == pytest.approx(steps, rel=1e-12)


def test_of_two_dtypes_the_narrower_counts() -> None:
    """By bits of precision: the pair is measured once more, rounded to nearest even, and ULPs are of that dtype."""
    assert narrower(torch.bfloat16, torch.float16) == torch.bfloat16
    assert narrower(torch.float8_e4m3fn, torch.float8_e5m2) == torch.float8_e5m2
    assert narrower(torch.complex64, torch.float64) == torch.float32
    assert narrower(torch.int32, torch.float32) is None
    x = random(5000)
    result = measure(x, x.bfloat16())
    assert result.ulps is None and result.difference.rel is not None and result.difference.rel > 1e-7
    assert result.narrow is not None and result.narrow_dtype == torch.bfloat16
    assert (result.narrow.difference.mismatched_fraction, result.narrow.difference.rel) == (0, 0)
    assert result.narrow.ulps is not None and result.narrow.ulps.max == 0
    # Half a step is rounded to the even neighbour: 1 + 2**-8 to 1, 1 + 3 * 2**-8 to 1 + 2**-6.
    halves = torch.tensor([1 + 2.0**-8, 1 + 3 * 2.0**-8])
    rounded = measure(halves, torch.tensor([1.0, 1 + 2.0**-6], dtype=torch.bfloat16)).narrow
    assert rounded is not None and rounded.difference.mismatched_fraction == 0
    assert measure(torch.ones(3), torch.ones(3, dtype=torch.int32)).narrow is None
    # What the narrower cannot hold is infinite in it, and told.
    overflowing = measure(torch.tensor([1e6, 1.0]), torch.tensor([1.0, 1.0], dtype=torch.float16)).narrow
    assert overflowing is not None and overflowing.difference.inf == 1


# --- rows


def row_rels(x: torch.Tensor, y: torch.Tensor) -> list[float]:
    """By fractions."""
    found = []
    for one, other in zip(x.double().tolist(), y.double().tolist(), strict=True):
        pairs = [(Fraction(a), Fraction(b)) for a, b in zip(one, other, strict=True)]
        both = sum(a * a + b * b for a, b in pairs)
        found.append(float(sum((a - b) ** 2 for a, b in pairs) / both) if both else 0.0)
    return found


def rows_in_chunks(x: torch.Tensor, y: torch.Tensor, chunk: int, *, slow: bool = False) -> Rows:
    rows = Rows(x.shape[1])
    flat_x, flat_y = x.double().reshape(-1), y.double().reshape(-1)
    for start in range(0, len(flat_x), chunk):
        a, b = flat_x[start : start + chunk], flat_y[start : start + chunk]
        if slow:
            rows.add_any(start, a, b)
        else:
            rows.add(start, len(a), *(rows.squares(start, v.numpy()) for v in (a - b, a, b)))
    return rows


@settings(max_examples=60)
@given(st.integers(1, 12), st.integers(1, 9), st.integers(1, 40), st.integers(0, 99), st.booleans())
def test_row_sums_are_those_of_fractions_wherever_chunks_end(
    count: int, width: int, chunk: int, seed: int, slow: bool
) -> None:
    """Chunks shorter than a row, longer than several, aligned or not; equal, and zero, rows among them."""
    x = random(count, width, seed=seed)
    y = x + 0.1 * random(count, width, seed=seed + 1)
    y[seed % count] = x[seed % count]
    x[(seed + 1) % count] = y[(seed + 1) % count] = 0
    rows = rows_in_chunks(x, y, chunk, slow=slow)
    expected = row_rels(x, y)
    ranked = sorted(((rel, -row) for row, rel in enumerate(expected) if rel), reverse=True)[:WORST_ROWS]
    assert [row for row, _ in rows.worst()] == [-row for _, row in ranked]
    assert [rel for _, rel in rows.worst()] == pytest.approx([rel for rel, _ in ranked], rel=1e-12)
    assert rows.rel.count == count


def measured_rows(x: torch.Tensor, y: torch.Tensor, row_ndim: int = 1) -> RowMeasures:
    return measure(x, y, row_ndim=row_ndim).rows


def test_one_bad_row_in_a_thousand_does_not_hide() -> None:
    """The average hardly moves; the worst row's rel does, and it is named and counted."""
    x = random(1000, 256)
    y = x + 1e-5 * random(1000, 256, seed=1)
    y[417] = x[417] * 1.3
    result = measure(x, y, row_ndim=1)
    assert result.difference.rel is not None and result.difference.rel < 1e-4
    assert result.rows.worst[0].row == 417
    assert result.rows.worst[0].rel == pytest.approx(0.09 / (1 + 1.69), rel=1e-6)
    assert (result.rows.count, result.rows.differing, result.rows.far) == (1000, 1000, 1)


def test_rows_of_equal_rel_are_named_in_order() -> None:
    """Of more equal rows than are named, the first ones are."""
    x = torch.ones(3 * CHUNK // 8, 8)
    y = x.clone()
    y[20:80] = 2.0
    result = measured_rows(x, y)
    assert [row for row, _ in result.worst] == list(range(20, 20 + WORST_ROWS))
    assert (result.differing, result.far) == (60, 60)


def test_a_row_with_unequal_non_finite_values_is_counted() -> None:
    """NaN against a number leaves a row's sums, is counted once per row, and the first such row is named."""
    x, y = random(50, 16), random(50, 16)
    x[30, 2] = x[30, 9] = NAN
    y[41, 0] = INF
    x[44, 1] = y[44, 1] = NAN
    result = measured_rows(x, y)
    assert (result.nonfinite, result.first_nonfinite, result.differing) == (2, 30, 0)


def test_rows_of_float64_beyond_the_range_of_squares() -> None:
    """A row's rel is right at 1e300 and at 1e-300."""
    for scale in (1e300, 1e-300):
        x = random(5, 8).double() * scale
        y = x.clone()
        y[3] *= 1.5
        (worst,) = measured_rows(x, y).worst
        assert worst.row == 3
        assert worst.rel == pytest.approx(0.25 / (1 + 2.25))


def test_complex_rows_are_their_parts() -> None:
    """A row of complex numbers has twice as many parts, and its number stays."""
    x = torch.complex(random(20, 7), random(20, 7, seed=1))
    y = x.clone()
    y[13, 6] += 1j
    result = measure(x, y, row_ndim=1)
    assert result.rows.worst[0].row == 13 and result.rows.count == 20
    assert result.difference.max_abs_index == [13, 6, 1]
