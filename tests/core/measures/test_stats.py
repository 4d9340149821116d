"""Statistics and differences: right at the edges of every dtype, the same digits whatever the layout, no copies."""

from __future__ import annotations

import math
from fractions import Fraction
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from grafter.core.measures import chunk_pass
from grafter.core.measures.flat_chunks import CHUNK, FlatReader
from grafter.core.measures.stats import compare, difference, make_difference, make_statistics, summarize
from grafter.core.records import Difference
from grafter.errors import UsageError

NAN, INF = math.nan, math.inf
FLOAT8 = [dtype for name in dir(torch) if name.startswith("float8_") and (dtype := getattr(torch, name))]
INTEGERS = [torch.bool, torch.uint8, torch.int8, torch.int16, torch.uint16, torch.int32, torch.uint32, torch.int64]
FLOATS = [torch.float16, torch.bfloat16, torch.float32, torch.float64, *FLOAT8]


def random(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def exact_rel(x: torch.Tensor, y: torch.Tensor) -> float:
    """By fractions: no rounding before the last step."""
    pairs = [(Fraction(a), Fraction(b)) for a, b in zip(x.double().tolist(), y.double().tolist(), strict=True)]
    return float(sum((a - b) ** 2 for a, b in pairs) / sum(a * a + b * b for a, b in pairs))


def full(x: torch.Tensor, y: torch.Tensor) -> Difference:
    result = compare(x, y, "full")[2]
    assert result is not None
    return result


def in_rows(x: torch.Tensor, y: torch.Tensor, rows: int = 2) -> tuple[Any, Any, Difference]:
    """What a device computes, on the CPU."""
    as_complex = x.is_complex() or y.is_complex()
    readers = FlatReader(x, as_complex), FlatReader(y, as_complex)
    sums = chunk_pass.pass_in_rows(*readers, torch.device("cpu"), True, rows)
    shape = [*x.shape, 2] if as_complex else list(x.shape)
    return (
        make_statistics(x.numel(), sums.x),
        make_statistics(y.numel(), sums.y),
        make_difference(shape, sums.pair, "full"),
    )


def assert_close(found: Any, expected: Any, tolerance: float = 1e-12) -> None:
    for name, value in expected.model_dump().items():
        if value is None:
            assert getattr(found, name) is None, name
            continue
        assert getattr(found, name) == pytest.approx(value, rel=tolerance, abs=1e-13, nan_ok=True), name


# --- definitions


@given(
    st.lists(
        st.tuples(*[st.floats(width=32, allow_nan=False, allow_infinity=False)] * 2),
        min_size=1,
        max_size=40,
    )
)
def test_rel_is_exact_for_any_finite_float32(pairs: list[tuple[float, float]]) -> None:
    """rel agrees with exact rational arithmetic to 1e-12, from subnormals to the largest float32."""
    x, y = (torch.tensor(column, dtype=torch.float32) for column in zip(*pairs, strict=True))
    result = full(x, y)
    expected = exact_rel(x, y) if x.any() or y.any() else 0.0
    assert result.rel == pytest.approx(expected, rel=1e-12)
    assert result.max_abs == max(abs(a - b) for a, b in zip(x.tolist(), y.tolist(), strict=True))


@given(st.lists(st.tuples(*[st.floats(-1e300, 1e300)] * 2), min_size=1, max_size=20))
def test_rel_is_exact_for_float64_whose_squares_leave_the_range(pairs: list[tuple[float, float]]) -> None:
    """float64 input is scaled: neither overflow nor underflow of a square changes rel."""
    x, y = (torch.tensor(column, dtype=torch.float64) for column in zip(*pairs, strict=True))
    if not (x.any() or y.any()):
        return
    assert full(x, y).rel == pytest.approx(exact_rel(x, y), rel=1e-12, abs=1e-300)


@pytest.mark.parametrize(
    ("x", "y", "dtype", "rel"),
    [
        (1e20, 1.01e20, torch.float32, 4.95e-5),
        (1e-30, 1.01e-30, torch.float32, 4.95e-5),
        (1e300, 1.01e300, torch.float64, 4.95e-5),
        (1e-300, 1.01e-300, torch.float64, 4.95e-5),
        (1.7e308, -1.7e308, torch.float64, 2.0),
    ],
)
def test_huge_and_tiny_values_neither_overflow_nor_vanish(x: float, y: float, dtype: torch.dtype, rel: float) -> None:
    """1e20 against 1.01e20 does not read 0, and 1e300 not inf."""
    a, b = _filled(x, y, dtype)
    relative_l2 = abs(a[0].item() / 2 - b[0].item() / 2) / abs(b[0].item()) * 2
    for result in (full(a, b), in_rows(a, b)[2]):
        assert result.rel == pytest.approx(rel, rel=1e-3)
        assert result.cosine == pytest.approx(math.copysign(1.0, y))
        assert result.rel_l2 == pytest.approx(relative_l2, rel=1e-12)


def _filled(x: float, y: float, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.full((50,), x, dtype=dtype), torch.full((50,), y, dtype=dtype)


def test_nearly_equal_tensors_keep_their_small_difference() -> None:
    """rel of 1e-14 and below is right, where 1 - 2xy/(x²+y²) in float32 reads 0."""
    x = random(2000)
    y = x.clone()
    y[::7] = torch.nextafter(y[::7], torch.tensor(INF))
    assert 0 < exact_rel(x, y) < 1e-14
    assert full(x, y).rel == pytest.approx(exact_rel(x, y), rel=1e-12)


def test_every_field_agrees_with_float64_over_several_chunks() -> None:
    """Fields combined over chunks are what one float64 expression over the whole gives."""
    x = random(3 * CHUNK + 77)
    y = x + 0.01 * random(3 * CHUNK + 77, seed=1)
    before, incoming, result = compare(x, y, "full")
    assert before is not None and incoming is not None and result is not None
    a, b = x.double(), y.double()
    d = a - b
    assert result.rel == pytest.approx((d.square().sum() / (a.square() + b.square()).sum()).item(), rel=1e-12)
    assert result.rel_l2 == pytest.approx((d.norm() / b.norm()).item(), rel=1e-12)
    assert result.mean_abs == pytest.approx(d.abs().mean().item(), rel=1e-12)
    assert result.cosine == pytest.approx((a.dot(b) / a.norm() / b.norm()).item(), abs=1e-13)
    assert result.max_abs_index == [int(d.abs().argmax())]
    assert result.max_abs_values == [x[d.abs().argmax()].item(), y[d.abs().argmax()].item()]
    assert result.mismatched_fraction == (x != y).double().mean().item()
    for found, value in ((before, a), (incoming, b)):
        assert found.mean == pytest.approx(value.mean().item(), abs=1e-13)
        assert found.std == pytest.approx(value.std(correction=0).item(), rel=1e-12)
        assert (found.min, found.max) == (value.min().item(), value.max().item())
        assert found.abs_mean == pytest.approx(value.abs().mean().item(), rel=1e-12)


def test_the_first_maximum_of_the_flattened_order_is_named() -> None:
    """Among equal maxima, in one chunk or in several, the first is given, with its index in the tensor's shape."""
    x = torch.zeros(5, CHUNK // 2)
    y = x.clone()
    y[2, 7] = y[2, 9] = y[4, 3] = -3.0
    for result in (full(x, y), difference(x, y, "light"), in_rows(x, y)[2]):
        assert result is not None
        assert (result.max_abs, result.max_abs_index, result.max_abs_values) == (3.0, [2, 7], [0.0, -3.0])


def test_zero_and_empty_tensors() -> None:
    """Two all-zero or empty tensors differ by 0 with cosine 1; zero against another has rel 1, cosine 0, rel_l2 inf."""
    zero, one = torch.zeros(3), torch.ones(3)
    for x in (zero, torch.zeros(0, 4), torch.zeros(())):
        result = full(x, x.clone())
        assert (result.rel, result.rel_l2, result.cosine, result.max_abs, result.mean_abs) == (0, 0, 1, 0, 0)
        assert result.max_abs_index is None
    assert (full(one, zero).rel, full(one, zero).rel_l2, full(one, zero).cosine) == (1.0, INF, 0.0)
    assert full(zero, one).rel_l2 == 1.0
    assert full(torch.tensor(1.0), torch.tensor(3.0)).max_abs_index == []


def test_unequal_non_finite_values_are_counted_and_left_out() -> None:
    """Equal NaN and Inf differ by 0; nan counts where one is NaN, inf the other unequal infinities."""
    x = torch.tensor([NAN, INF, -INF, NAN, INF, INF, 1.0, 2.0])
    y = torch.tensor([NAN, INF, -INF, 5.0, 7.0, -INF, 1.0, 3.0])
    for result in (full(x, y), in_rows(x, y)[2]):
        assert (result.nan, result.inf) == (1, 2)
        assert result.rel == pytest.approx(1 / 15)
        assert (result.max_abs, result.max_abs_index) == (1.0, [7])
        assert result.mean_abs == pytest.approx(1 / 5)
        assert result.mismatched_fraction == 4 / 8
    statistics = summarize(x, "full")
    assert statistics is not None
    assert (statistics.nan, statistics.inf, statistics.mean, statistics.max) == (2, 4, 1.5, 2.0)


def test_where_nothing_can_be_compared_there_is_no_number() -> None:
    """A tensor of NaN against numbers has rel None and says how many: it never reads 0."""
    result = full(torch.full((4,), NAN), torch.ones(4))
    assert (result.rel, result.cosine, result.max_abs, result.nan, result.mismatched_fraction) == (
        None,
        None,
        None,
        4,
        1,
    )
    statistics = summarize(torch.full((4,), NAN), "full")
    assert statistics is not None and (statistics.mean, statistics.min, statistics.nan) == (None, None, 4)


def test_mismatch_is_of_bits_after_promotion() -> None:
    """NaNs of other bits match, zeros of other sign do not, and a float meets its own value in a wider dtype."""
    other_nan = torch.tensor([0x7FC00001], dtype=torch.int32).view(torch.float32)
    assert full(other_nan, torch.tensor([NAN])).mismatched_fraction == 0
    zeros = full(torch.tensor([0.0, 1.0]), torch.tensor([-0.0, 1.0]))
    assert (zeros.mismatched_fraction, zeros.max_abs, zeros.rel) == (0.5, 0.0, 0.0)
    narrow = random(100).bfloat16()
    assert full(narrow, narrow.float()).mismatched_fraction == 0
    assert full(narrow.float(), random(100)).mismatched_fraction == 1


def test_integers_beyond_the_53_bits_of_float64_are_compared_exactly() -> None:
    """2**60 and 2**60 + 1 mismatch although their float64 difference is 0; uint64 never wraps into a match."""
    x = torch.tensor([2**60, 5])
    assert full(x, torch.tensor([2**60 + 1, 5])).mismatched_fraction == 0.5
    unsigned = torch.tensor([2**64 - 1, 5], dtype=torch.uint64)
    assert full(unsigned, torch.tensor([-1, 5])).mismatched_fraction == 0.5
    assert full(torch.tensor([3, 4], dtype=torch.int8), torch.tensor([3, 4])).mismatched_fraction == 0


def test_mean_far_above_the_deviation() -> None:
    """std is right where mean**2 / variance is 1e12, in one chunk and across chunks."""
    x = (1e6 + random(2 * CHUNK + 5, dtype=torch.float64)).float()
    found = summarize(x, "full")
    assert found is not None and found.std == pytest.approx(x.double().std(correction=0).item(), rel=1e-9)
    steps = torch.cat([torch.full((CHUNK,), 1e6), torch.full((CHUNK,), 1e6 + 1)])
    found = summarize(steps, "full")
    assert found is not None and found.std == pytest.approx(0.5, rel=1e-12)
    constant = summarize(torch.full((100,), 0.1), "full")
    assert constant is not None and constant.std == 0.0


# --- every dtype, stride and path


@pytest.mark.parametrize("dtype", [*INTEGERS, torch.uint64, *FLOATS], ids=str)
def test_every_real_dtype(dtype: torch.dtype) -> None:
    """A tensor of each dtype compares like its float64 values do, by either way of summing."""
    x, y = (_values(CHUNK + 9, seed).to(dtype) for seed in (0, 1))
    expected = in_rows(x.double(), y.double())
    for result in (compare(x, y, "full"), in_rows(x, y)):
        for found, wanted in zip(result, expected, strict=True):
            assert_close(found, wanted)
    assert_close(summarize(x, "full"), expected[0])
    equal = full(x, x.clone())
    assert (equal.rel, equal.mismatched_fraction, equal.nan, equal.cosine) == (0.0, 0.0, 0, 1.0)


def _values(count: int, seed: int) -> torch.Tensor:
    """Small positive numbers, which every dtype can hold."""
    return random(count, seed=seed).abs() * 3


@pytest.mark.parametrize("dtype", [torch.complex64, torch.complex128], ids=str)
def test_complex_tensors_are_their_parts(dtype: torch.dtype) -> None:
    """A complex tensor compares as its view_as_real does; conjugated, strided and against a real one too."""
    x = torch.complex(random(40, 30), random(40, 30, seed=1)).to(dtype)
    y = x + 0.1 * x.flip(0)
    for a, b in ((x, y), (x.conj(), y.t().contiguous().t()), (x, y.real.clone())):
        parts = [torch.view_as_real(v.to(dtype).resolve_conj().contiguous()) for v in (a, b)]
        found = full(a, b)
        assert found == full(*parts)
        assert found.max_abs_index is not None and len(found.max_abs_index) == 3
    imaginary = torch.view_as_real(x.conj())[..., 1] if not x.conj().is_conj() else x.conj().imag
    assert full(imaginary, -x.imag).mismatched_fraction == 0


@pytest.mark.parametrize("first", FLOATS, ids=str)
@pytest.mark.parametrize("second", [torch.float32, torch.bfloat16, torch.int64], ids=str)
def test_dtypes_may_differ(first: torch.dtype, second: torch.dtype) -> None:
    """Any two dtypes meet, float8 included, for which torch has no promotion."""
    x, y = _values(300, 0).to(first), _values(300, 1).to(second)
    found, expected = full(x, y), full(x.double(), y.double())
    assert found.rel == expected.rel and found.max_abs == expected.max_abs
    assert found.mismatched_fraction == expected.mismatched_fraction


def test_the_number_of_threads_does_not_change_a_digit() -> None:
    """One thread or two: bitwise the same record, from contiguous, bf16 and non-finite input."""
    x, y = random(5 * CHUNK + 321), random(5 * CHUNK + 321, seed=1)
    with_nan = x.clone()
    with_nan[3 * CHUNK] = NAN
    threads = torch.get_num_threads()
    results = []
    try:
        for count in (1, 2):
            torch.set_num_threads(count)
            cases = ((x, y), (x.bfloat16(), y.bfloat16()), (with_nan, y), (x.double() * 1e200, y.double()))
            results.append([compare(a, b, "full") for a, b in cases])
    finally:
        torch.set_num_threads(threads)
    assert results[0] == results[1]


@pytest.mark.parametrize("rows", [1, 2, 70])
def test_rows_on_a_device_agree_with_the_chunks_of_the_cpu(rows: int) -> None:
    """The batched way that CUDA takes gives the CPU's numbers, run here on CPU tensors."""
    x = random(5 * CHUNK + 321)
    y = x + 1e-3 * random(5 * CHUNK + 321, seed=1)
    x[17] = y[17] = INF
    y[CHUNK + 1] = NAN
    for a, b in ((x, y), (x.double(), y.double()), (x.bfloat16(), y)):
        for found, expected in zip(in_rows(a, b, rows), compare(a, b, "full"), strict=True):
            assert_close(found, expected)
    rows_alone = chunk_pass.tensor_in_rows(FlatReader(x), rows)
    assert_close(make_statistics(x.numel(), rows_alone), summarize(x, "full"))


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU: statistics of CUDA tensors")
def test_cuda_agrees_with_the_cpu_and_synchronises_once() -> None:
    """Statistics of CUDA tensors are the CPU's to 1e-12, and one copy reaches the host."""
    x, y = random(5 * CHUNK + 321), random(5 * CHUNK + 321, seed=1)
    copies = _Operations()
    with copies:
        found = compare(x.cuda(), y.cuda(), "full")
    for result, expected in zip(found, compare(x, y, "full"), strict=True):
        assert_close(result, expected)
    to_host = [name for name, device in copies.transfers if device == "cpu"]
    assert len(to_host) == 1 and copies.names.count("aten._local_scalar_dense.default") == 0


# --- what it must not do


class _Operations(TorchDispatchMode):  # type: ignore[no-untyped-call]  # torch's own is untyped
    """Notes each operation, the most elements that one allocates, and where results lie."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.names: list[str] = []
        self.largest_bytes = 0
        self.transfers: list[tuple[str, str]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        inputs = [leaf for leaf in tree_leaves((args, kwargs or {})) if isinstance(leaf, torch.Tensor)]
        known = {leaf.untyped_storage().data_ptr() for leaf in inputs}
        self.names.append(str(func))
        for leaf in tree_leaves(result):
            if isinstance(leaf, torch.Tensor):
                if leaf.untyped_storage().data_ptr() not in known:
                    self.largest_bytes = max(self.largest_bytes, leaf.untyped_storage().nbytes())
                if any(leaf.device != other.device for other in inputs):
                    self.transfers.append((str(func), leaf.device.type))
        return result


@pytest.mark.parametrize("shape", ["expanded", "transposed", "contiguous"])
def test_no_full_size_temporary(shape: str) -> None:
    """Nothing allocated exceeds a few chunks, also for an expanded tensor and for strided ones."""
    rows, columns = 40, CHUNK
    x = {
        "expanded": random(columns).expand(rows, columns),
        "transposed": random(columns, rows).t(),
        "contiguous": random(rows, columns),
    }[shape]
    y = random(rows, columns, seed=1)
    operations = _Operations()
    with operations:
        compare(x, y, "full")
        summarize(x, "full")
    assert 0 < operations.largest_bytes <= 3 * 8 * CHUNK


def test_inputs_and_random_state_are_left_alone() -> None:
    """Neither tensor changes, nor its version, nor the global generator; gradients and inference mode are no matter."""
    x, y = random(CHUNK + 5).requires_grad_(), random(CHUNK + 5, seed=1)
    kept, state, version = x.detach().clone(), torch.get_rng_state(), x._version
    expected = compare(x, y, "full")
    assert torch.equal(x, kept) and x._version == version and x.grad is None
    assert torch.equal(torch.get_rng_state(), state)
    with torch.inference_mode():
        assert compare(x * 1, y, "full") == expected
    assert compare(x * 1, y, "full") == expected


def test_levels() -> None:
    """off gives nothing; light a difference of one pass, equal to the full one's fields, and no statistics."""
    x, y = random(CHUNK + 5), random(CHUNK + 5, seed=1)
    assert compare(x, y, "off") == (None, None, None)
    assert difference(x, y, "off") is None and summarize(x, "off") is None and summarize(x, "light") is None
    before, incoming, light = compare(x, y, "light")
    assert before is None and incoming is None and light is not None
    assert light == full(x, y).model_copy(update={"mean_abs": None, "cosine": None})
    assert difference(x, y, "full") == full(x, y)
    assert (summarize(x, "full"), summarize(y, "full")) == compare(x, y, "full")[:2]


@pytest.mark.filterwarnings("ignore:torch.quantize_per_tensor")
def test_what_has_no_values_is_refused_by_name() -> None:
    """Unequal shapes, sparse and quantised tensors raise UsageError that says what they are."""
    with pytest.raises(UsageError, match=r"\[2\] and \[3\]"):
        compare(torch.zeros(2), torch.zeros(3), "full")
    with pytest.raises(UsageError, match="sparse"):
        summarize(torch.eye(3).to_sparse(), "full")
    quantised = torch._empty_affine_quantized([3], scale=0.1, zero_point=0, dtype=torch.qint8)
    with pytest.raises(UsageError, match="qint8"):
        summarize(quantised, "full")
