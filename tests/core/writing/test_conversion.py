"""Which dtypes may be written into which, and how the values are counted that a dtype cannot hold."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from grafter.core.writing.conversion import count_saturated, why_not_convertible
from grafter.core.writing.write_back import WriteMode, Written, apply_write, check_write
from grafter.errors import WriteRefused

IN_PLACE = WriteMode()
RETURN = WriteMode(write="return")

FLOATS = [torch.float16, torch.bfloat16, torch.float32, torch.float64]
FLOATS8 = [torch.float8_e4m3fn, torch.float8_e5m2, torch.float8_e4m3fnuz, torch.float8_e5m2fnuz]
INTEGERS = [torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64, torch.uint16, torch.uint32, torch.uint64]
COMPLEX = [torch.complex64, torch.complex128]
DTYPES = [torch.bool, *FLOATS, *FLOATS8, *INTEGERS, *COMPLEX]


def write(target: torch.Tensor, incoming: torch.Tensor, mode: WriteMode = IN_PLACE) -> Written:
    check_write(target, incoming, mode)
    return apply_write(target, incoming, mode)


def refused(target: torch.Tensor, incoming: torch.Tensor, mode: WriteMode, match: str) -> None:
    with pytest.raises(WriteRefused, match=match) as caught:
        check_write(target, incoming, mode)
    assert "Nothing was written." in str(caught.value)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_same_dtype_is_copied_bit_for_bit(dtype: torch.dtype) -> None:
    """Every dtype goes in with its bits: NaN payloads, negative zeros and denormals included."""
    bits = torch.arange(256, dtype=torch.uint8).repeat(16)
    incoming = (bits % 2 if dtype == torch.bool else bits.flip(0)).view(dtype)
    target = torch.zeros_like(incoming)
    written = write(target, incoming)
    assert torch.equal(target.view(torch.uint8), incoming.view(torch.uint8))
    assert written.saturated is None


@pytest.mark.parametrize("source", DTYPES, ids=str)
def test_every_conversion_that_is_allowed_works(source: torch.dtype) -> None:
    """For each pair of dtypes: it is refused with a reason, or small values arrive equal, in both write modes."""
    incoming = torch.tensor([0, 1, 1]).to(source)
    for destination in DTYPES:
        target = torch.zeros(3).to(destination)
        if why_not_convertible(source, destination) is not None:
            refused(target, incoming, IN_PLACE, "cannot be written into")
            continue
        for mode in (IN_PLACE, RETURN):
            written = write(target, incoming, mode)
            assert written.value.dtype == destination
            assert written.value.to(torch.complex128).tolist() == [0, 1, 1]
            assert written.saturated == (None if source == destination else 0)


def test_the_table_of_conversions() -> None:
    """Complex to real, float to integer, narrowing integers and anything to bool are refused; nothing else is."""

    def legal(source: torch.dtype, destination: torch.dtype) -> bool:
        if source == destination:
            return True
        if destination == torch.bool or (source.is_complex and not destination.is_complex):
            return False
        if destination.is_floating_point or destination.is_complex or source == torch.bool:
            return True
        if source.is_floating_point:
            return False
        # promote_types widens to what holds both; the unsigned wide ones it doesn't know.
        low, high = torch.iinfo(source), torch.iinfo(destination)
        return low.min in range(high.min, high.max + 1) and low.max in range(high.min, high.max + 1)

    for source, destination in itertools.product(DTYPES, DTYPES):
        assert (why_not_convertible(source, destination) is None) == legal(source, destination), (source, destination)


@pytest.mark.parametrize(
    ("source", "destination"),
    [
        (torch.int64, torch.int32),
        (torch.int8, torch.uint8),
        (torch.uint8, torch.int8),
        (torch.float32, torch.int64),
        (torch.complex64, torch.float64),
        (torch.int64, torch.bool),
        (torch.float8_e4m3fn, torch.int32),
    ],
    ids=str,
)
def test_conversions_that_lose_values_are_refused(source: torch.dtype, destination: torch.dtype) -> None:
    """The named cases of the design are refused, by dtype, whatever the values."""
    refused(torch.ones(2).to(destination), torch.ones(2).to(source), RETURN, f"{source} cannot be written")


@pytest.mark.skipif(not hasattr(torch, "float4_e2m1fn_x2"), reason="torch has no float4_e2m1fn_x2")
def test_packed_dtypes_cross_only_as_they_are() -> None:
    """Packed 4-bit values are copied as bits into the same dtype, and converted into no other."""
    incoming = torch.tensor([1, 200], dtype=torch.uint8).view(torch.float4_e2m1fn_x2)
    target = torch.zeros(2, dtype=torch.uint8).view(torch.float4_e2m1fn_x2)
    write(target, incoming)
    assert target.view(torch.uint8).tolist() == [1, 200]
    refused(torch.zeros(2), incoming, IN_PLACE, "does not convert")


INF, NAN = float("inf"), float("nan")


@pytest.mark.parametrize(
    ("source", "destination", "values", "expected"),
    [
        (torch.float32, torch.float16, [65504.0, 65519.0, 65520.0, -1e6, INF, NAN], 2),
        (torch.float64, torch.float32, [3.4e38, 3.5e38, -1e300, INF, 1e-300], 2),
        (torch.float32, torch.bfloat16, [3.38e38, 3.4e38, 1.0, -INF], 1),
        (torch.bfloat16, torch.float16, [1.0, 65536.0, 1e30], 2),
        (torch.float32, torch.float8_e4m3fn, [448.0, 463.0, 480.0, -1000.0, NAN], 2),
        (torch.float32, torch.float8_e5m2, [57344.0, 61439.0, 61441.0, -1e9, INF], 2),
        # An infinity that the dtype can't hold is lost too, clipped or turned into NaN.
        (torch.float32, torch.float8_e4m3fn, [INF, -INF], 2),
        (torch.float32, torch.float8_e4m3fnuz, [240.0, 1000.0, INF, NAN], 2),
        (torch.float8_e5m2, torch.float8_e4m3fn, [448.0, 57344.0], 1),
        (torch.int64, torch.float16, [1, 65504, 70000, -70000], 2),
        (torch.uint16, torch.float16, [1, 65535], 1),
        (torch.complex128, torch.complex64, [complex(1e300, 1e300), complex(1.0, -1e300), 1j], 3),
        (torch.float64, torch.complex64, [1e300, 1.0], 1),
        (torch.bfloat16, torch.float32, [1e38, INF, NAN], 0),
        (torch.bool, torch.float8_e4m3fn, [True, False], 0),
        (torch.int32, torch.int64, [2**31 - 1], 0),
    ],
)
def test_saturated_values_are_counted(
    source: torch.dtype, destination: torch.dtype, values: list[complex], expected: int
) -> None:
    """A value counts when it can't be held, not when it only rounds; NaN and a kept infinity do not count."""
    exact = torch.complex128 if source.is_complex else torch.float64 if source.is_floating_point else torch.int64
    incoming = torch.tensor(values, dtype=exact).to(source)
    target = torch.zeros(len(values)).to(destination)
    assert write(target, incoming).saturated == expected


@given(st.lists(st.floats(width=32), min_size=1, max_size=20), st.sampled_from([torch.float16, torch.float8_e5m2]))
def test_the_count_is_that_of_finite_values_that_stop_being_finite(values: list[float], dtype: torch.dtype) -> None:
    """For a dtype with infinities, saturated is the number of finite values that are not finite once written."""
    incoming = torch.tensor(values)
    target = torch.zeros(len(values)).to(dtype)
    saturated = write(target, incoming).saturated
    assert saturated == int((incoming.isfinite() & ~target.float().isfinite()).sum())


@pytest.mark.parametrize("made", [lambda x: x, torch.t, lambda x: x[::2]], ids=["contiguous", "transposed", "strided"])
def test_large_tensors_are_counted_in_blocks(made: Callable[[torch.Tensor], torch.Tensor]) -> None:
    """Blocks cover every value once, also where the incoming value is not contiguous."""
    incoming = made(torch.full((600, 1100), 1e6))
    assert count_saturated(incoming, torch.float16) == incoming.numel()


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU: counting on the GPU")
def test_saturation_is_counted_on_the_gpu() -> None:
    """Incoming on a GPU: the same count as on the CPU, for dtypes that clip and dtypes that overflow."""
    values = torch.tensor([1.0, 463.0, 480.0, -1e6, INF, NAN])
    for dtype in (torch.float16, torch.float8_e4m3fn, torch.float8_e5m2):
        assert count_saturated(values.cuda(), dtype) == count_saturated(values, dtype)
