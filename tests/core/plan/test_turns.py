"""A turn of a conversation is worked out from what is new in it: counts and memory, no times. Pure; about 2 s."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from point_parts import header, roster, spec

from grafter.core.layout.declared import DeclaredLayout
from grafter.core.layout.row_view import RowView
from grafter.core.leaves import TensorSpec
from grafter.core.measures.stats import compare, summarize
from grafter.core.messages.announced_tokens import AnnouncedTokens, announce
from grafter.core.messages.manifest import Header, Manifest, Pair, manifest_text
from grafter.core.messages.roster import Roster
from grafter.core.plan.decision import Decision, decide
from grafter.core.plan.transfer_plan import TransferPlan, make_plan
from grafter.core.records import TensorStatistics
from grafter.core.rows.tokens import FEW, Tokens


def a_turn(length: int, start: int, **fields: Any) -> Pair:
    """Both sides have `length` tokens, and those from `start` on count. As it travels."""

    def side(role: Any) -> Manifest:
        leaf = spec(length, 3, 2, dtype=torch.int32)
        tokens = announce(Tokens.from_lengths(["talk"], [length]), (start,) if start else ())
        own: Header = header(
            role, 0, leaves=(leaf,), layouts=(DeclaredLayout(dims="t layer k"),), tokens=tokens, **fields
        )
        return Manifest.model_validate_json(manifest_text(role, [own.text], None))

    return Pair(side("baseline"), side("target"))


def planned(pair: Pair, ranks: Roster, digest: str = "ab" * 12) -> tuple[Decision, TransferPlan]:
    decision = decide("b2t", pair)
    return decision, make_plan(digest, "b2t", pair, decision, ranks, 0)


def test_turns_of_as_many_new_rows_share_one_plan() -> None:
    """Their rows lie elsewhere; what goes where is the same, and is worked out once in a run."""
    run = roster(1, 1)
    plans = []
    for turn in range(1, 9):
        decision, plan = planned(a_turn(5 * turn, 5 * turn - 5), run, f"{turn:024x}")
        assert plan.digest == f"{turn:024x}"
        views = decision.rows_of(header("baseline", 0))
        assert views is not None
        (view,) = views
        assert view.segments.tolist() == [[5 * turn - 5, 5]] and view.packed_shape == (5, 3, 2)
        plans.append(plan)
    assert all(plan.pieces is plans[0].pieces and plan.memo is plans[0].memo for plan in plans)


def test_what_another_plan_follows_from_is_not_taken_for_the_same() -> None:
    """Other counts, extras, generations of groups and runs."""
    run = roster(1, 1)
    _, known = planned(a_turn(10, 5), run)
    extra = TensorSpec(path="0", shape=(7,), dtype="float32", device="cpu")
    for other, ranks in (
        (a_turn(10, 4), run),
        (a_turn(10, 5, extras="{}", extras_tensors=(extra,)), run),
        (a_turn(10, 5, generation=1), run),
        (a_turn(10, 5), roster(1, 1)),
    ):
        _, plan = planned(other, ranks)
        assert plan.pieces is not known.pieces
    assert planned(a_turn(10, 5, generation=1), run)[1].generation == 1
    assert planned(a_turn(15, 10), run)[1].pieces is known.pieces


def test_one_stretch_of_rows_is_the_tensors_own_memory() -> None:
    """However long the tensor is; two stretches are gathered."""
    tensor = torch.arange(24).view(6, 4)
    view = RowView((6, 4), (0,), np.array([[2, 3]]))
    assert view.of(tensor).data_ptr() == tensor[2].data_ptr() and torch.equal(view.of(tensor), tensor[2:5])
    batch = RowView((2, 3, 4), (0, 1), np.array([[2, 3]]))
    assert batch.of(tensor.view(2, 3, 4)).data_ptr() == tensor[2].data_ptr()
    two = RowView((6, 4), (0,), np.array([[0, 1], [4, 2]]))
    assert torch.equal(two.of(tensor), tensor[[0, 4, 5]])


def test_the_same_tokens_are_announced_and_read_as_the_same_object() -> None:
    """At every layer, whatever its window; and a peer's that are this rank's own are not read again."""
    tokens = Tokens.from_lengths(["talk", "other"], [40, 2])
    first = announce(tokens, (30, 0))
    assert announce(tokens, (30, 0)) is first and announce(tokens) is announce(tokens)
    travelled = AnnouncedTokens.model_validate_json(first.model_dump_json())
    assert travelled.read().tokens is tokens and travelled.read().starts == (30, 0)
    assert travelled.read() is first.read()


IDS = st.none() | st.integers(-3, 3) | st.sampled_from(["a", "b"])


@given(st.lists(st.tuples(IDS, st.integers(0, 4), st.integers(0, 30)), max_size=FEW))
@settings(max_examples=200, deadline=None)
def test_few_lengths_in_lists_say_what_arrays_of_them_say(given: list[tuple[Any, int, int]]) -> None:
    """Or are refused in the same words."""
    ids, lengths, starts = ([row[column] for row in given] for column in range(3))

    def made(*arguments: Any) -> Tokens | str:
        try:
            return Tokens.from_lengths(*arguments)
        except ValueError as error:
            return str(error)

    assert made(ids, lengths, starts) == made(ids, np.array(lengths, dtype=np.int64), torch.tensor(starts))
    assert made(ids, lengths) == made(ids, np.array(lengths, dtype=np.int64))


@pytest.mark.parametrize("sign", [1, -1, 0])
def test_values_of_one_sign_have_the_absolute_mean_of_their_mean(sign: int) -> None:
    """Digit by digit; and where both signs occur, that of their absolute values."""
    values = torch.randn(70_001, generator=torch.Generator().manual_seed(0))
    found = summarize(values.abs() * sign if sign else values, "full")
    expected = summarize(values.abs() * abs(sign) if sign else values.abs(), "full")
    assert isinstance(found, TensorStatistics) and isinstance(expected, TensorStatistics)
    assert found.abs_mean == expected.abs_mean == expected.mean


def test_a_small_tensor_after_a_large_one_is_measured_as_if_alone() -> None:
    """They use the same memory, one after the other."""
    generator = torch.Generator().manual_seed(0)
    large, small = torch.randn(100_000, generator=generator), torch.randn(2, 5, generator=generator)
    alone = compare(small, small + 1, "full")
    compare(large, large * 2, "full")
    assert compare(small, small + 1, "full") == alone
