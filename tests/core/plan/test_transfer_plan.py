"""The plan of a point: every byte once, to whoever needs it, and no two pieces of a receiver overlap."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from layout_parts import HeldSide, on_axis, role_headers, two_sides
from point_parts import header, pair, roster, sides, spec

from grafter.core.messages.manifest import Pair
from grafter.core.plan.assembly import assembled_leaves
from grafter.core.plan.decision import decide
from grafter.core.plan.transfer_plan import ALIGNMENT_BYTES, TransferPlan, make_plan

DTYPES = [torch.uint8, torch.float16, torch.complex128, torch.bool, torch.int64]


def plan_of(direction: str, both: object, baseline: int, target: int) -> TransferPlan:
    decision = decide(direction, both)  # type: ignore[arg-type]
    return make_plan("ab" * 12, direction, both, decision, roster(baseline, target))  # type: ignore[arg-type]


@given(data=st.data())
def test_pieces_of_a_receiver_never_overlap_and_lie_aligned_within_its_staging(data: st.DataObject) -> None:
    baseline, target = data.draw(st.integers(1, 3)), data.draw(st.integers(1, 3))
    direction = data.draw(st.sampled_from(["b2t", "t2b", "compare"]))

    def leaves() -> tuple[object, ...]:
        shapes = data.draw(st.lists(st.lists(st.integers(0, 40), max_size=2), min_size=1, max_size=3))
        return tuple(
            spec(*shape, dtype=data.draw(st.sampled_from(DTYPES)), path=str(i)) for i, shape in enumerate(shapes)
        )

    both = pair(
        [
            header("baseline", r, baseline, leaves=leaves(), extras_tensors=leaves(), needs="all")
            for r in range(baseline)
        ],
        [header("target", r, target, leaves=leaves(), needs="all") for r in range(target)],
    )
    plan = plan_of(direction, both, baseline, target)
    senders = both.senders(direction)
    assert sum(p.spec.nbytes for p in plan.pieces) == sum(
        s.nbytes for h in senders for s in h.leaves + h.extras_tensors
    ) * len(both.receivers(direction))
    for receiver, room in plan.staging_bytes.items():
        pieces = sorted(plan.incoming(receiver), key=lambda p: (p.offset, p.spec.nbytes))
        assert all(p.offset % ALIGNMENT_BYTES == 0 for p in pieces)
        ends = [p.offset + p.spec.nbytes for p in pieces]
        assert all(end <= after.offset for end, after in zip(ends, pieces[1:], strict=False))
        assert max(ends) <= room
    assert sorted(p for r in plan.members for p in [*map(id, plan.outgoing(r))]) == sorted(map(id, plan.pieces))


def test_ranks_of_a_plan_are_graft_ranks_and_the_highest_generation_counts() -> None:
    both = pair(
        [header("baseline", 1, participants=(1,), generation=2)],
        [header("target", 2, participants=(2,), generation=5)],
    )
    plan = plan_of("b2t", both, 3, 4)
    assert plan.members == (1, 5)
    assert [(p.sender, p.receiver) for p in plan.pieces] == [(1, 5)]
    assert plan.generation == 5
    assert plan_of("t2b", both, 3, 4).pieces[0].sender == 5


def test_a_single_sender_sends_to_each_receiver_once() -> None:
    plan = plan_of("b2t", sides(1, 3), 1, 3)
    assert [(p.sender, p.receiver, p.offset) for p in plan.pieces] == [(0, 1, 0), (0, 2, 0), (0, 3, 0)]
    assert plan.staging_bytes == {1: 64, 2: 64, 3: 64}


def test_a_dtype_that_this_torch_lacks_is_named() -> None:
    strange = spec(4).model_copy(update={"dtype": "float3_e1m1"})
    both = pair([header("baseline", 0, leaves=(strange,), needs="all")], [header("target", 0, needs="all")])
    with pytest.raises(ValueError, match="float3_e1m1"):
        plan_of("b2t", both, 1, 1)


def test_a_name_in_torch_that_is_no_dtype_is_refused() -> None:
    strange = spec(4).model_copy(update={"dtype": "save"})
    with pytest.raises(ValueError, match="'save'"):
        _ = strange.torch_dtype


# --- resharded


def two_leaves(held: tuple[HeldSide, HeldSide], needs: str, extras: tuple[object, ...]) -> Pair:
    """A point of two leaves that lie alike, of another dtype each."""
    manifests = []
    for side, role in zip(held, ("baseline", "target"), strict=True):
        headers = []
        for one in side.headers(role):
            shape = one.leaves[0].shape
            update: dict[str, object] = {
                "leaves": (spec(*shape, dtype=torch.int64, path="a"), spec(*shape, dtype=torch.uint8, path="b")),
                "layouts": one.layouts * 2,
                "structure": '["a", "b"]',
            }
            update |= {"extras_tensors": extras} if role == "baseline" else {"needs": needs}
            headers.append(one.model_copy(update=update))
        manifests.append(headers)
    return pair(*manifests)


@settings(max_examples=60)
@given(two_sides(), st.booleans(), st.data())
def test_a_plan_for_one_rank_is_that_ranks_part_of_the_whole_plan(
    held: tuple[HeldSide, HeldSide], resharded: bool, data: st.DataObject
) -> None:
    """In the same order, by which the messages of two ranks are matched."""
    extras = (spec(3), spec(5, dtype=torch.bool)) if data.draw(st.booleans()) else ()
    both = two_leaves(held, "resharded" if resharded else "identity", extras)
    numbers = len(held[0].ranks), len(held[1].ranks)
    decision = decide("b2t", both)
    assert decision.outcome is None, decision.reason
    whole = make_plan("ab" * 12, "b2t", both, decision, roster(*numbers))
    for rank in range(sum(numbers)):
        own = make_plan("ab" * 12, "b2t", both, decision, roster(*numbers), rank)
        assert all(rank in (piece.sender, piece.receiver) for piece in own.pieces)
        for peer in range(sum(numbers)):
            assert [p for p in own.outgoing(rank) if p.receiver == peer] == [
                p for p in whole.outgoing(rank) if p.receiver == peer
            ]
            assert [p for p in own.incoming(rank) if p.sender == peer] == [
                p for p in whole.incoming(rank) if p.sender == peer
            ]
        assert len(own.pieces) == len(whole.outgoing(rank)) + len(whole.incoming(rank))
        assert own.values_of(rank) == whole.values_of(rank)
        assert own.staging_bytes.get(rank) == whole.staging_bytes.get(rank)
        assert own.members == whole.members == tuple(range(sum(numbers)))


@settings(max_examples=60)
@given(two_sides(), st.booleans())
def test_pieces_fill_their_values_and_values_lie_aligned_beside_one_another(
    held: tuple[HeldSide, HeldSide], resharded: bool
) -> None:
    """Extras go with a transform that asked for the assembled tensor, from the lowest sender, and only then."""
    both = two_leaves(held, "resharded" if resharded else "identity", (spec(3), spec(5, dtype=torch.bool)))
    numbers = len(held[0].ranks), len(held[1].ranks)
    decision = decide("b2t", both)
    assert decision.outcome is None, decision.reason
    plan = make_plan("ab" * 12, "b2t", both, decision, roster(*numbers))
    for rank, one in enumerate(held[1].ranks):
        receiver = numbers[0] + rank
        values = sorted(plan.values_of(receiver), key=lambda value: value.offset)
        ends = [value.offset + value.spec.nbytes for value in values]
        assert all(value.offset % ALIGNMENT_BYTES == 0 for value in values)
        assert all(end <= after.offset for end, after in zip(ends, values[1:], strict=False))
        assert max(ends) <= plan.staging_bytes[receiver]
        for value in values:
            pieces = [piece for piece in plan.incoming(receiver) if piece.value == value]
            count = torch.zeros(value.spec.shape, dtype=torch.int64)
            for piece in pieces:
                landing = piece.landing(count)
                assert tuple(landing.shape) == piece.spec.shape
                landing += 1
                sent = torch.empty(both.baseline.headers[piece.sender].leaves[0].shape)
                assert value.sender is not None or tuple(piece.taken_from(sent).shape) == piece.spec.shape
                assert piece.spec.dtype == value.spec.dtype
            expected = np.ones(value.spec.shape) if value.sender is not None else one.index >= 0
            assert np.array_equal(count.numpy(), expected)
        extras = [(p.sender, p.index, p.spec.shape) for p in plan.incoming(receiver) if p.value.sender is not None]
        assert extras == ([(0, 2, (3,)), (0, 3, (5,))] if resharded else [])


def test_a_dtype_of_its_own_on_one_sender_is_no_part_of_the_tensor() -> None:
    senders = role_headers("baseline", "h[tp]", [(2,), (2,)], on_axis("tp", 2))
    senders[1] = senders[1].model_copy(update={"leaves": (spec(2, dtype=torch.float16),)})
    decision = decide("b2t", pair(senders, role_headers("target", "h", [(4,)])))
    assert decision.outcome == "failed"
    assert decision.reason == (
        "the parts have two dtypes: float32[2] at baseline rank 0, float16[2] at baseline rank 1. One tensor has one."
    )


def test_summands_of_several_axes_are_added_in_order_and_in_float32() -> None:
    """As a plain loop in float32 would; in float16, or in another order, the last digits were others."""
    places = [{"tp": (rank % 2, 2), "cp": (rank // 2, 3)} for rank in range(6)]
    senders = [
        one.model_copy(update={"leaves": (spec(5, dtype=torch.float16),)})
        for one in role_headers("baseline", "h[tp:partial,cp:partial]", [(5,)] * 6, places)
    ]
    both = pair(senders, role_headers("target", "h", [(5,)]))
    decision = decide("b2t", both)
    plan = make_plan("ab" * 12, "b2t", both, decision, roster(6, 1))
    sent = [torch.randn(5, generator=torch.Generator().manual_seed(rank)).half() * 10**rank for rank in range(6)]
    values = {value: torch.empty(5, dtype=torch.float16) for value in plan.values_of(6)}
    for piece in plan.pieces:
        piece.landing(values[piece.value]).copy_(piece.taken_from(sent[piece.sender]))
    (leaf,) = assembled_leaves(decision, values, both.target.headers[0])
    expected = sent[0].float()
    for tp, cp in [(0, 1), (0, 2), (1, 0), (1, 1), (1, 2)]:
        expected = expected + sent[cp * 2 + tp].float()
    assert leaf.tensor.dtype is torch.float32
    assert torch.equal(leaf.tensor, expected)
