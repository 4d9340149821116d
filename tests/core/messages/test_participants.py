"""Participants: declared ranks graft among themselves, and the others never hear of it."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pytest
import torch
from jobs import Jobs, Rank, succeed, two_jobs

import grafter
from grafter.core.messages.participants import own_participants
from grafter.core.roles import Place
from grafter.errors import UsageError

CONCATENATE = f"{Path(__file__).parents[3] / 'transforms' / 'concatenate.py'}:transform"

# Pure.


@pytest.mark.parametrize(
    ("ranks", "expected"),
    [(None, (0, 1, 2, 3)), ([1], (1,)), ((3, 1), (1, 3)), (range(1, 3), (1, 2)), ({1, 2}, (1, 2)), ([1, 1], (1,))],
    ids=repr,
)
def test_declared_ranks_are_sorted_role_ranks(ranks: Any, expected: tuple[int, ...]) -> None:
    assert own_participants(Place("target", 1, 4), ranks) == expected


@pytest.mark.parametrize(
    ("ranks", "message"),
    [
        ([0, 2], r"ranks=\[0, 2\] does not name this rank, 1"),
        ([], "does not name this rank, 1"),
        ([1, 4], "each must be a role rank, 0 to 3"),
        ([1, -1], "each must be a role rank"),
        ([1, True], "each must be a role rank"),
        ([1, 2.0], "each must be a role rank"),
        ("1", "neither a list of role ranks nor a process group"),
        (1, "neither a list of role ranks nor a process group"),
        (torch.distributed.GroupMember.NON_GROUP_MEMBER, "a process group that target rank 1 is not in"),
    ],
    ids=str,
)
def test_what_is_no_declaration_of_ranks_is_refused(ranks: Any, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        own_participants(Place("target", 1, 4), ranks)


# Live.


def dump_on_last_stage(rank: Rank) -> Any:
    """Ranks 0 do nothing but step; ranks 1 graft among themselves."""
    value = torch.full((2,), 1.0 if rank.is_baseline else 9.0)
    for _ in range(2):
        if rank.role_rank == 1:
            grafter.dump("h", value, ranks=[1])
            with grafter.context(ranks=[1], layer_id=3):
                grafter.dump("inner", value)
        grafter.step()
    return value.tolist()


def test_a_pipeline_stage_grafts_while_the_others_never_hear_of_it(tmp_path: Path) -> None:
    with two_jobs(tmp_path, dump_on_last_stage, dump_on_last_stage, ranks=(2, 2), b2t_filter="True") as jobs:
        assert succeed(jobs.wait()) == [[1.0, 1.0], [1.0, 1.0], [9.0, 9.0], [1.0, 1.0]]
        ledgers = jobs.ledgers()
    assert [len(ledgers.get((role, 0), [])) for role in ("baseline", "target")] == [0, 0]
    for role in ("baseline", "target"):
        assert [r.name for r in ledgers[role, 1]] == ["h", "inner"] * 2
        assert all(r.participants == {"baseline": [1], "target": [1]} for r in ledgers[role, 1])


def dump_on_own_stage(rank: Rank) -> Any:
    """Every stage of two ranks dumps its own layers at the same time, told apart by a tag."""
    stage, ranks = rank.role_rank // 2, [rank.role_rank // 2 * 2, rank.role_rank // 2 * 2 + 1]
    value = torch.full((2,), float(rank.role_rank if rank.is_baseline else 9))
    with grafter.context(ranks=ranks, pp_stage=stage):
        for layer_id in range(3):
            grafter.dump("h", value, layer_id=layer_id)
    grafter.dump("logits", value)
    return value.tolist()


def test_stages_graft_side_by_side_and_then_all_together(tmp_path: Path) -> None:
    with two_jobs(tmp_path, dump_on_own_stage, dump_on_own_stage, ranks=(4, 4), b2t_filter="True") as jobs:
        values = succeed(jobs.wait())
        ledgers = jobs.ledgers()
    assert values == [[float(rank % 4)] * 2 for rank in range(8)]
    assert ledgers["target", 3][0].participants == {"baseline": [2, 3], "target": [2, 3]}
    assert ledgers["target", 3][3].participants == {"baseline": [0, 1, 2, 3], "target": [0, 1, 2, 3]}


def dump_stage_of_another_size(rank: Rank) -> Any:
    grafter.step()
    if rank.is_baseline:
        if rank.role_rank == 0:
            return None
        return grafter.dump("h", torch.full((1,), float(rank.role_rank)), ranks=[1, 2]).tolist()
    if rank.role_rank == 1:
        return None
    return grafter.dump("h", torch.zeros(rank.arguments[0]), ranks=[0]).tolist()


def test_stages_of_two_and_one_ranks_meet_with_a_transform(tmp_path: Path) -> None:
    with Jobs(tmp_path, b2t_filter="True", transform_path=CONCATENATE) as jobs:
        jobs.start("baseline", 3, dump_stage_of_another_size)
        jobs.start("target", 2, dump_stage_of_another_size, 2)
        assert succeed(jobs.wait()) == [None, [1.0], [2.0], [1.0, 2.0], None]


def test_without_one_the_point_fails_and_says_what_to_do(tmp_path: Path) -> None:
    with Jobs(tmp_path, b2t_filter="True") as jobs:
        jobs.start("baseline", 3, dump_stage_of_another_size)
        jobs.start("target", 2, dump_stage_of_another_size, 1)
        assert succeed(jobs.wait())[3] == [0.0]
        (record,) = jobs.ledgers()["target", 0]
    assert record.outcome == "failed"
    assert "2 ranks send and 1 receive" in record.reason and "Give a transform" in record.reason


def dump_with_groups(rank: Rank) -> Any:
    """A job with its own gloo world and subgroups, that uses them between points."""
    import torch.distributed as dist

    dist.init_process_group(
        "gloo", init_method=f"file://{rank.arguments[0]}/{rank.role}", rank=rank.role_rank, world_size=rank.world_size
    )
    groups = [dist.new_group([0, 1]), dist.new_group([2, 3])]
    own = groups[rank.role_rank // 2]
    found = []
    for i in range(3):
        value = torch.full((2,), float(rank.role_rank if rank.is_baseline else 9))
        grafter.dump("h", value, ranks=own, stage=rank.role_rank // 2)
        dist.all_reduce(value, group=own)
        found.append(value[0].item())
        everyone = torch.ones(1)
        dist.all_reduce(everyone)
        found.append(everyone.item())
        grafter.dump("all", everyone, i=i)
    facts = (dist.get_world_size(), dist.get_rank(), dist.get_backend(), dist.get_process_group_ranks(own))
    dist.destroy_process_group()
    return found, facts


@pytest.mark.parametrize("backend", ["auto", "gloo"])
def test_a_process_group_declares_them_and_the_jobs_own_groups_are_undisturbed(tmp_path: Path, backend: str) -> None:
    with Jobs(tmp_path, b2t_filter="True", backend=backend) as jobs:
        for role in ("baseline", "target"):
            jobs.start(role, 4, dump_with_groups, tmp_path)
        results = succeed(jobs.wait())
        ledgers = jobs.ledgers()
    for number, (found, facts) in enumerate(results):
        role_rank = number % 4
        assert found == [1.0 if role_rank < 2 else 5.0, 4.0] * 3
        assert facts == (4, role_rank, "gloo", [0, 1] if role_rank < 2 else [2, 3])
    assert ledgers["target", 3][0].participants == {"baseline": [2, 3], "target": [2, 3]}


def dump_with_a_rank_of_its_own(rank: Rank) -> Any:
    """torch.distributed counts this process differently from GRAFTER_RANK: its groups say nothing about role ranks."""
    import torch.distributed as dist

    dist.init_process_group(
        "gloo", init_method=f"file://{rank.arguments[0]}/{rank.role}", rank=1 - rank.role_rank, world_size=2
    )
    try:
        grafter.dump("h", torch.ones(1), ranks=dist.group.WORLD)
    except UsageError as error:
        return str(error)
    finally:
        dist.destroy_process_group()
    return None


def test_a_group_of_another_world_is_refused(tmp_path: Path) -> None:
    """GRAFTER_RANK says 0 where torch.distributed says 1, so ranks of a group are no role ranks."""
    with Jobs(tmp_path, b2t_filter="True") as jobs:
        for role in ("baseline", "target"):
            for role_rank in (0, 1):
                jobs.start(role, 2, dump_with_a_rank_of_its_own, tmp_path, only=role_rank, rank=role_rank)
        texts = succeed(jobs.wait())
    assert all("Give the role ranks as a list" in text for text in texts)
    assert "where this process is 1; for grafter it is baseline rank 0" in texts[0]


def dump_without_being_named(rank: Rank) -> Any:
    try:
        grafter.dump("h", torch.ones(1), ranks=[0])
    except UsageError as error:
        return str(error)
    return None


def test_a_rank_that_its_own_ranks_do_not_name_gets_an_error_at_once(tmp_path: Path) -> None:
    with two_jobs(
        tmp_path, dump_without_being_named, dump_without_being_named, ranks=(2, 1), b2t_filter="True"
    ) as jobs:
        first, second, target = succeed(jobs.wait())
    assert (first, target) == (None, None), "those that are named meet"
    assert "does not name this rank, 1" in second


def step_and_end(rank: Rank) -> None:
    grafter.step()


def dump_later(rank: Rank) -> float:
    time.sleep(3)
    return float(grafter.dump("h", torch.full((1,), 1.0 if rank.is_baseline else 9.0), ranks=[rank.role_rank]))


def test_a_rank_without_points_may_end_before_the_others_have_joined(tmp_path: Path) -> None:
    """The first stage of a pipeline passes its output on and ends; the run still opens, or the others know at once."""
    with Jobs(tmp_path, b2t_filter="True", join_timeout=20) as jobs:
        jobs.start("baseline", 2, step_and_end, only=0)
        jobs.start("baseline", 2, dump_later, only=1)
        jobs.start("target", 1, dump_later)
        assert succeed(jobs.wait()) == [None, 1.0, 1.0]
