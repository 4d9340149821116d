"""The plan of a point: every byte once, to whoever needs it, and no two pieces of a receiver overlap."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from point_parts import header, pair, roster, sides, spec

from grafter.decision import decide
from grafter.transfer_plan import ALIGNMENT_BYTES, TransferPlan, make_plan

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
