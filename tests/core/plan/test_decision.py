"""The decision of a point, as pure functions of both manifests: who gets what from whom, or why nobody does."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from point_parts import header, pair, sides, spec

from grafter.core.messages.mismatch import find_conflict, find_mismatch
from grafter.core.plan.decision import Decision, decide


def test_the_k_th_sender_serves_the_k_th_receiver() -> None:
    assert decide("b2t", sides(3, 3)).sources == {0: (0,), 1: (1,), 2: (2,)}


def test_participants_count_by_place_not_by_number() -> None:
    stage = pair(
        [header("baseline", r, participants=(1, 3)) for r in (1, 3)],
        [header("target", r, participants=(4, 6)) for r in (4, 6)],
    )
    assert decide("b2t", stage).sources == {4: (1,), 6: (3,)}
    assert decide("t2b", stage).sources == {1: (4,), 3: (6,)}


def test_one_sender_serves_all_receivers() -> None:
    assert decide("b2t", sides(1, 3)).sources == {0: (0,), 1: (0,), 2: (0,)}
    assert decide("t2b", sides(3, 1)).sources == {0: (0,), 1: (0,), 2: (0,)}


@given(baseline=st.integers(1, 5), target=st.integers(1, 5), direction=st.sampled_from(["b2t", "t2b", "compare"]))
def test_a_transform_that_receives_all_gets_all_on_every_receiver(baseline: int, target: int, direction: Any) -> None:
    decision = decide(direction, sides(baseline, target, needs="all"))
    senders, receivers = (target, baseline) if direction == "t2b" else (baseline, target)
    assert decision.sources == {r: tuple(range(senders)) for r in range(receivers)}
    assert decision.outcome is None


@pytest.mark.parametrize("needs", ["identity", "same_rank"])
def test_unequal_counts_fail_and_say_what_to_do(needs: str) -> None:
    decision = decide("b2t", sides(2, 3, needs=needs))
    assert (decision.outcome, decision.sources) == ("failed", {})
    assert "2 ranks send and 3 receive" in (decision.reason or "")
    assert "transform" in (decision.reason or "")


def test_same_rank_leaves_the_shape_to_the_transform_and_identity_does_not() -> None:
    def shapes(needs: str) -> Decision:
        return decide(
            "b2t",
            pair([header("baseline", 0)], [header("target", 0, leaves=(spec(5),), needs=needs)]),
        )

    assert shapes("same_rank").outcome is None
    refused = shapes("identity")
    assert refused.outcome == "failed"
    for part in ("float32[4] at baseline rank 0 (baseline.py:0)", "float32[5] at target rank 0 (target.py:0)"):
        assert part in (refused.reason or "")


def test_dtypes_may_differ() -> None:
    other = header("target", 0, leaves=(spec(4, dtype=torch.bfloat16),))
    assert find_mismatch(header("baseline", 0), other) is None


def test_another_structure_or_another_plain_leaf_is_told_with_both_values() -> None:
    tree = {"structure": "[\"['a']\", \"['n']\"]", "leaves": (spec(4, path="['a']"),)}
    ours = header("baseline", 0, others=(("['n']", '["int", 1]'),), **tree)
    theirs = header("target", 0, others=(("['n']", '["int", 2]'),), **tree)
    assert "['n'] is 1 at baseline rank 0 and 2 at target rank 0" in (find_mismatch(ours, theirs) or "")
    assert "a tensor at target rank 0" in (find_mismatch(ours, header("target", 0)) or "")


def test_a_value_that_is_no_tensor_on_one_side_skips_and_a_failure_before_fails() -> None:
    nothing = pair([header("baseline", 0, leaves=(), nothing="the value is a str")], [header("target", 0)])
    assert decide("b2t", nothing) == Decision({}, "skipped", "baseline rank 0: the value is a str")
    failure = pair([header("baseline", 0)], [header("target", 0, leaves=(), failure="ValueError: x", nothing="n")])
    assert decide("b2t", failure).outcome == "failed"
    assert "target rank 0 failed before the exchange: ValueError: x" in (decide("b2t", failure).reason or "")


def test_receivers_with_different_transforms_fail() -> None:
    mixed = pair([header("baseline", 0)], [header("target", 0, 2, needs="all"), header("target", 1, 2)])
    assert decide("b2t", mixed).outcome == "failed"


def test_two_ranks_on_one_gpu_fail_under_nccl_unless_host_ids_set_them_apart() -> None:
    def on(first: str, second: str) -> str | None:
        decision = decide(
            "b2t", pair([header("baseline", 0, nccl_device=first)], [header("target", 0, nccl_device=second)])
        )
        return decision.outcome

    assert on("GPU-1", "GPU-1") == "failed"
    assert on("GPU-1 a", "GPU-1 b") is None
    assert on("GPU-1", "GPU-2") is None


def test_ranks_of_one_role_that_describe_a_point_differently_conflict() -> None:
    first = header("baseline", 0, 2)
    assert find_conflict([first, header("baseline", 1, 2)]) is None
    declared = find_conflict([first, header("baseline", 1, participants=(1, 2))]) or ""
    for part in ("[0, 1] (at baseline.py:0)", "[1, 2] (at baseline.py:1)", "ranks="):
        assert part in declared
    assert "b2t" in (find_conflict([first, header("baseline", 1, 2, direction="compare")]) or "")


@given(data=st.data())
def test_every_rank_decides_alike_and_each_receiver_gets_something_or_nobody_does(data: st.DataObject) -> None:
    """Over many manifests: receivers without sources are those of a point with an outcome, and only those."""

    def some(role: str, count: int) -> list[Any]:
        return [
            header(
                role, rank, count,
                leaves=(spec(*data.draw(st.lists(st.integers(0, 3), max_size=2))),),
                needs=needs,
            )
            for rank in range(count)
        ]  # fmt: skip

    needs = data.draw(st.sampled_from(["identity", "same_rank", "all"]))
    both = pair(some("baseline", data.draw(st.integers(1, 3))), some("target", data.draw(st.integers(1, 3))))
    direction = data.draw(st.sampled_from(["b2t", "t2b", "compare"]))
    decision = decide(direction, both)
    if decision.outcome is None:
        assert set(decision.sources) == {h.role_rank for h in both.receivers(direction)}
        assert all(sources for sources in decision.sources.values())
    else:
        assert decision.sources == {}
        assert decision.reason
