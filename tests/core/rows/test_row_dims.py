"""Rows by token of tensors whose dims have no names: what a pass of one token leaves open, all others decide.

Pure but for small dumps; costs about 1 s of one core.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from compare_parts import dump_passes, one_point, random
from hypothesis import given
from hypothesis import strategies as st
from point_parts import header, pair, spec

from grafter.core.layout.declared import DeclaredLayout
from grafter.core.messages.announced_tokens import announce
from grafter.core.messages.manifest import Header
from grafter.core.plan.decision import decide
from grafter.core.rows.matching import common_row_ndim, leading_row_dims
from grafter.core.rows.tokens import Tokens

# One conversation of 12 tokens, 32 values each.
ROWS = random(12, 32)
# Prefill and decode, the last three passes of one token each.
PASSES = ((0, 6), (6, 3), (9, 1), (10, 1), (11, 1))


def tokens(start: int, count: int) -> Tokens:
    return Tokens.from_lengths(["a"], [count], [start])


def add_passes(directory: Path, role: str, passes: Sequence[tuple[int, int]], *forms: str) -> None:
    """Passes of some of the rows, each a step of one point, in such a form; the last form is that of the rest."""
    given = []
    for number, (start, count) in enumerate(passes):
        own, form = ROWS[start : start + count].clone(), forms[min(number, len(forms) - 1)]
        value = {"t h": own, "1 t h": own[None], "t n d": own.view(count, 4, 8)}[form]
        given.append((value, {"tokens": tokens(start, count)}))
    dump_passes(directory, role, "x", given)


@pytest.mark.parametrize("served", [PASSES, tuple((n, 1) for n in range(12))], ids=["prefill", "one by one"])
@pytest.mark.parametrize(("trained_form", "served_form"), [("1 t h", "1 t h"), ("t h", "1 t h"), ("t n d", "t n d")])
def test_a_pass_of_one_token_has_the_rows_of_the_others(
    served: Sequence[tuple[int, int]], trained_form: str, served_form: str, tmp_path: Path
) -> None:
    """[1, 1, 32] is a row of [32] where others are [1, 6, 32], and where the other side is [12, 32]."""
    add_passes(tmp_path, "baseline", ((0, 12),), trained_form)
    add_passes(tmp_path, "target", served, served_form)
    point = one_point(tmp_path)
    assert point.verdict == "passed", point.reason
    assert point.tokens is not None and (point.tokens.paired, point.tokens.only_a, point.tokens.only_b) == (12, 0, 0)


def test_rows_of_two_shapes_are_refused_with_what_to_declare(tmp_path: Path) -> None:
    """Rows of [4, 8] and rows of [32] are no rows of one tensor."""
    add_passes(tmp_path, "baseline", ((0, 6), (6, 6)), "t n d", "t h")
    add_passes(tmp_path, "target", ((0, 12),), "t h")
    point = one_point(tmp_path)
    assert point.verdict == "error" and 'dims="b s h"' in str(point.reason), point.reason


@given(st.lists(st.integers(1, 4), min_size=1, max_size=4), st.integers(0, 30))
def test_the_first_dims_that_have_as_many_rows_are_all_found(shape: list[int], rows: int) -> None:
    """And choosing one or another of them moves dims of size 1 alone."""
    found = leading_row_dims(shape, rows)
    for count in found:
        assert torch.Size(shape[:count]).numel() == rows
        assert all(size == 1 for size in shape[found[0] : count])


def test_the_row_that_all_have_is_chosen() -> None:
    """None where there is none; the one of most dims where several will do."""
    assert common_row_ndim([(3, [2]), (3, [1, 2])]) == 1
    assert common_row_ndim([(2, [1]), (3, [1, 2])]) == 1
    assert common_row_ndim([(3, [1, 2]), (3, [1, 2])]) == 2
    assert common_row_ndim([(3, [1]), (2, [1])]) is None


# --- live


def one_header(role: Any, shape: Sequence[int], told: Tokens, dims: str | None = None, **fields: Any) -> Header:
    layouts = (DeclaredLayout(dims=dims),) if dims else ()
    return header(role, 0, leaves=(spec(*shape),), tokens=announce(told), layouts=layouts, **fields)


@pytest.mark.parametrize("shape", [(12, 32), (1, 12, 32), (3, 4, 32)], ids=str)
@pytest.mark.parametrize("swapped", [False, True])
def test_a_live_pass_of_one_token_meets_the_row_of_the_other_side(shape: tuple[int, ...], swapped: bool) -> None:
    """[1, 1, 32] against any form of twelve rows of 32, whichever side sends."""
    whole, one = (shape, tokens(0, 12)), ((1, 1, 32), tokens(9, 1))
    sides = (one, whole) if swapped else (whole, one)
    decision = decide("compare", pair([one_header("baseline", *sides[0])], [one_header("target", *sides[1])]))
    assert decision.outcome is None, decision.reason
    assert decision.rows is not None and decision.rows.tokens.count == 1
    assert {view.packed_shape for view in decision.rows.views[0].values()} == {(1, 32)}


def test_a_live_pass_of_one_token_meets_dims_with_names() -> None:
    """Names of one side decide for the other, which has none."""
    named = one_header("baseline", (12, 32), tokens(0, 12), "t h")
    decision = decide("compare", pair([named], [one_header("target", (1, 1, 32), tokens(9, 1))]))
    assert decision.outcome is None, decision.reason
    assert decision.rows is not None
    assert {view.packed_shape for view in decision.rows.views[0].values()} == {(1, 32)}
