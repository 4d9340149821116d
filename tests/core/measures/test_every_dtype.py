"""Every dtype that torch has: equal bytes are equal, other bytes are never taken for equal, in the ledger and in dumps.

Costs about 8 s of one core.
"""

from __future__ import annotations

import io
import math
import re
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from compare_parts import dump_by_program, one_point, sides
from hypothesis import given
from hypothesis import strategies as st
from jobs import Rank, succeed, two_jobs

import grafter
from grafter.analysis.run.run_summary import read_run_summary
from grafter.cli.show import show_run
from grafter.core.leaves import NothingToOffer, take_apart
from grafter.core.measures.chunk_pass import pass_in_rows
from grafter.core.measures.flat_chunks import FlatReader
from grafter.core.measures.stats import compare, difference, make_difference
from grafter.core.records import Difference
from grafter.core.rows.tokens import Tokens
from grafter.errors import UsageError
from grafter.store.dumps.snapshot import NothingToSave, saveable

DTYPES = sorted({value for value in vars(torch).values() if isinstance(value, torch.dtype)}, key=str)
QUANTISED = [dtype for dtype in DTYPES if str(dtype).startswith(("torch.q", "torch.quint"))]
FLOAT4 = getattr(torch, "float4_e2m1fn_x2", None)
needs_float4 = pytest.mark.skipif(FLOAT4 is None, reason="this torch has no float4_e2m1fn_x2")

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")


def of_bytes(dtype: torch.dtype, *content: int) -> torch.Tensor:
    """[2] elements: the first has these bytes, the second has them, too."""
    width = dtype.itemsize
    data = (list(content) + [0] * width)[:width]
    return torch.tensor(data * 2, dtype=torch.uint8).view(dtype)


def plain_dtypes() -> list[torch.dtype]:
    return [dtype for dtype in DTYPES if dtype not in QUANTISED]


def pair(dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """Two tensors that differ in one bit of the second element."""
    x = of_bytes(dtype, 1, 1) if dtype is torch.bool else of_bytes(dtype, 0x31, 0x32)
    y = x.clone() if dtype is torch.bool else x.view(torch.uint8).clone().view(dtype)
    y.view(torch.uint8)[dtype.itemsize] ^= 1
    return x, y


@pytest.mark.parametrize("level", ["full", "light"])
@pytest.mark.parametrize("dtype", plain_dtypes(), ids=str)
def test_the_figures_of_a_live_point_tell_equal_bytes_from_others(dtype: torch.dtype, level: str) -> None:
    """Equal: rel, max_abs and mismatched_fraction are 0. One bit apart: mismatched_fraction is not 0."""
    x, y = pair(dtype)
    _, _, same = compare(x, x.view(torch.uint8).clone().view(dtype), level)  # type: ignore[arg-type]
    _, _, other = compare(x, y, level)  # type: ignore[arg-type]
    assert same is not None and (same.rel, same.max_abs, same.mismatched_fraction) == (0, 0, 0)
    assert other is not None and other.mismatched_fraction in (0.25, 0.5)
    assert other.rel is None or other.rel > 0 or other.nan + other.inf


@pytest.mark.parametrize("dims", [None, "a c"], ids=["one order", "two orders"])
@pytest.mark.parametrize("dtype", plain_dtypes(), ids=str)
def test_dumps_of_equal_bytes_pass_and_those_of_others_fail(
    dtype: torch.dtype, dims: str | None, tmp_path: Path
) -> None:
    """Whatever the dtype, and whether both sides have the dims in one order."""
    x, y = pair(dtype)
    for name, b in (("same", x), ("other", y)):
        directory = tmp_path / name
        if dims is None:
            dump_by_program(directory, "baseline", {"x": x})
            dump_by_program(directory, "target", {"x": b})
        else:
            dump_by_program(directory, "baseline", {"x": x.view(1, 2)}, dims="a c")
            dump_by_program(directory, "target", {"x": b.view(2, 1)}, dims="c a")
        point = one_point(directory)
        assert point.verdict == ("passed" if name == "same" else "failed"), point.reason
        assert point.values["mismatched_fraction"] in ((0,) if name == "same" else (0.25, 0.5))


@pytest.mark.parametrize("dtype", plain_dtypes(), ids=str)
def test_rows_by_token_of_any_dtype_are_gathered(dtype: torch.dtype, tmp_path: Path) -> None:
    """Two rows in another order, with one bit apart."""
    x, y = (own.view(2, 1) for own in pair(dtype))
    dump_by_program(tmp_path, "baseline", {"x": x}, tokens=Tokens.from_positions(["a", "a"], [0, 1]))
    there = y.view(torch.uint8).view(2, -1).flip(0).reshape(-1).view(dtype).view(2, 1)
    dump_by_program(tmp_path, "target", {"x": there}, tokens=Tokens.from_positions(["a", "a"], [1, 0]))
    point = one_point(tmp_path)
    assert point.verdict == "failed" and point.tokens is not None and point.tokens.paired == 2, point.reason
    assert point.values["mismatched_fraction"] in (0.25, 0.5)


def quantised(dtype: torch.dtype) -> torch.Tensor:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return torch.empty(2, dtype=dtype)


OTHERS = {
    "sparse": lambda: torch.eye(2).to_sparse(),
    "csr": lambda: torch.eye(2).to_sparse_csr(),
    "meta": lambda: torch.empty(2, device="meta"),
    "nested": lambda: torch.nested.nested_tensor([torch.ones(2), torch.ones(1)], layout=torch.jagged),
    **{str(dtype): (lambda dtype=dtype: quantised(dtype)) for dtype in QUANTISED},
}


@pytest.mark.parametrize("kind", OTHERS)
def test_a_tensor_without_plain_memory_is_no_point_and_says_why(kind: str) -> None:
    """Live it is skipped with the reason, and a dump has the reason in place of the values."""
    tensor = OTHERS[kind]()
    with pytest.raises(NothingToOffer, match="without plain memory"):
        take_apart(tensor)
    with pytest.raises(NothingToSave):
        saveable(tensor)


# --- packed float4

E2M1 = [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0]
VALUES = E2M1 + [-value for value in E2M1]


@needs_float4
@given(st.lists(st.tuples(*[st.integers(0, 255)] * 2), min_size=1, max_size=9), st.booleans())
def test_packed_float4_is_compared_as_the_two_values_of_each_byte(
    content: list[tuple[int, int]], strided: bool
) -> None:
    """The lower four bits are the first value; figures are those of the unpacked tensors."""
    packed = [torch.tensor(own, dtype=torch.uint8) for own in zip(*content, strict=True)]
    unpacked = [torch.tensor([[VALUES[byte & 15], VALUES[byte >> 4]] for byte in own]) for own in packed]
    if strided:
        packed = [torch.stack([own, own], dim=1)[:, 0] for own in packed]
    x, y = (own.view(FLOAT4) for own in packed)
    assert compare(x, y, "full")[2] == compare(*unpacked, "full")[2]


@needs_float4
def test_packed_float4_is_not_compared_with_another_dtype() -> None:
    """Its shape counts bytes, so nothing says which value is which."""
    with pytest.raises(UsageError, match="one of them is packed"):
        difference(of_bytes(FLOAT4, 1), torch.zeros(2), "full")  # type: ignore[arg-type]


# --- whole numbers that float64 does not hold

LONGS = st.integers(-(2**63), 2**63 - 1) | st.sampled_from([2**53, 2**53 + 1, 2**60, 2**60 + 3, 2**63 - 1, -(2**63)])
UNSIGNED = st.integers(0, 2**64 - 1) | st.sampled_from([2**53 + 1, 2**60, 2**60 + 3, 2**63, 2**64 - 1])


@st.composite
def whole_numbers(draw: st.DrawFn) -> torch.Tensor:
    dtype = draw(st.sampled_from([torch.int64, torch.uint64]))
    numbers = draw(st.lists(LONGS if dtype is torch.int64 else UNSIGNED, min_size=4, max_size=4))
    return torch.tensor(numbers, dtype=dtype)


@given(whole_numbers(), whole_numbers())
def test_whole_numbers_are_subtracted_exactly(x: torch.Tensor, y: torch.Tensor) -> None:
    """max_abs is the largest difference, correctly rounded, with both numbers as they are; none is taken for equal."""
    found = difference(x, y, "full")
    assert found is not None and found.rel is not None and found.max_abs is not None
    numbers = list(zip(x.tolist(), y.tolist(), strict=True))
    largest = max(abs(a - b) for a, b in numbers)
    assert math.isclose(found.max_abs, float(largest), rel_tol=4e-16)
    assert found.mismatched_fraction == sum(a != b for a, b in numbers) / 4
    assert (found.rel > 0) == (found.max_abs > 0) == (x.tolist() != y.tolist())
    if largest and found.max_abs_index is not None and found.max_abs_values is not None:
        assert found.max_abs_values == list(numbers[found.max_abs_index[0]])


@pytest.mark.parametrize("dtype", [torch.int64, torch.uint64], ids=str)
@pytest.mark.parametrize("numel", [1, 3, 40_000, 200_000])
def test_one_whole_number_that_float64_rounds_to_the_other_is_found(
    dtype: torch.dtype, numel: int, tmp_path: Path
) -> None:
    """2**60 against 2**60 + 3: rel is not 0 and max_abs is 3, live and between dumps, in chunks of any number."""
    x = torch.full((numel,), 2**60, dtype=torch.int64).to(dtype)
    y = x.clone()
    y[-1] = 2**60 + 3
    found = difference(y, x, "full")
    baseline, target = sides(tmp_path)
    baseline.add("x", x)
    target.add("x", y)
    point = one_point(tmp_path, "*: max_abs <= 2")
    assert point.verdict == "failed" and point.values["max_abs"] == 3 and point.values["rows_differing"]
    measured = point.leaves[0].measures
    assert measured is not None and found is not None
    assert found.max_abs_values == measured.difference.max_abs_values == [2**60 + 3, 2**60]
    assert (found.max_abs, found.max_abs_index, found.mismatched_fraction) == (3.0, [numel - 1], 1 / numel)
    assert found.rel is not None and found.rel > 0
    assert found == measured.difference


@pytest.mark.parametrize("other", [torch.float64, torch.float32], ids=str)
def test_a_whole_number_is_not_the_floating_one_that_it_rounds_to(other: torch.dtype) -> None:
    """2**60 + 3 and 2.0**60 differ by 3."""
    found = difference(torch.tensor([2**60 + 3, 5]), torch.tensor([2.0**60, 5.0], dtype=other), "full")
    assert found is not None and (found.max_abs, found.mismatched_fraction) == (3.0, 0.5)


@pytest.mark.parametrize("scale", [1e-200, 5e-324, 1e200, 1e308], ids=str)
def test_float64_whose_squares_leave_float64_is_compared(scale: float) -> None:
    """rel is what it is of ordinary numbers."""
    x, y = torch.tensor([1.0, 1.0], dtype=torch.float64) * scale, torch.tensor([0.0, 1.0], dtype=torch.float64) * scale
    found = difference(x, y, "full")
    assert found is not None and found.rel is not None and math.isclose(found.rel, 1 / 3)
    assert isinstance(found, Difference) and found.mismatched_fraction == 0.5


# --- between two jobs


def dump_every_dtype(rank: Rank) -> Any:
    for dtype in plain_dtypes():
        x, y = pair(dtype)
        grafter.dump(f"same {dtype}", x)
        grafter.dump(f"other {dtype}", x if rank.is_baseline else y)
    grafter.dump("long", torch.tensor([2**60, 2**60 + 3 * (not rank.is_baseline)]))
    grafter.dump("zero", torch.tensor([0.0, 0.0 if rank.is_baseline else -0.0]))


def test_a_live_comparison_of_every_dtype_says_whether_it_is_equal(tmp_path: Path) -> None:
    """No point is compared without figures: of dtypes that torch cannot copy (`int1`, ...), each fails with the reason.

    The table marks what rel does not show.
    """
    with two_jobs(tmp_path, dump_every_dtype, dump_every_dtype, compare_filter="True") as jobs:
        succeed(jobs.wait())
        records = jobs.ledgers()["target", 0]
        summary = read_run_summary(tmp_path / "run")
    for record in records:
        if record.outcome == "failed":
            assert re.search(r" torch\.u?int[1-7]$", record.name) and "not implemented" in str(record.reason)
            continue
        assert record.outcome == "compared" and record.difference is not None, record.name
        assert (record.difference.mismatched_fraction == 0) == record.name.startswith("same"), record.name
    table = io.StringIO()
    show_run(summary, table)
    lines = {line.split(" compare ")[0].strip(): line for line in table.getvalue().splitlines() if " compare " in line}
    for label in ("0 zero", "0 other torch.bits8"):
        assert " !=" in lines[label], lines[label]
    assert not any(" !=" in line for label, line in lines.items() if label.startswith("0 same"))
    assert "1.7e-36" in lines["0 long"] and "3.0e+00" in lines["0 long"]


@given(whole_numbers(), whole_numbers())
def test_whole_numbers_are_subtracted_alike_on_a_device(x: torch.Tensor, y: torch.Tensor) -> None:
    """The way of accelerators, many chunks at once, gives what the CPU's way gives."""
    sums = pass_in_rows(FlatReader(x), FlatReader(y), torch.device("cpu"), True)
    by_rows, by_chunk = make_difference([4], sums.pair, "full"), difference(x, y, "full")
    assert by_chunk is not None
    assert (by_rows.max_abs, by_rows.max_abs_index) == (by_chunk.max_abs, by_chunk.max_abs_index)
    assert by_rows.mismatched_fraction == by_chunk.mismatched_fraction
    assert by_rows.rel == pytest.approx(by_chunk.rel, rel=1e-12)
