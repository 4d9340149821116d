"""Copies and summands between real jobs: one copy serves a receiver, differing ones are told, summands are added."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from jobs import Jobs, Rank, succeed, two_jobs

import grafter
from grafter.analysis.run.run_summary import read_run_summary
from grafter.core.records import LedgerRecord


def full_tensor() -> torch.Tensor:
    return torch.arange(48.0).view(4, 12)


def only(ledgers: dict[tuple[str, int], list[LedgerRecord]], role: str) -> list[LedgerRecord]:
    """The one record of each rank of a role."""
    return [record for (own, _), (record,) in sorted(ledgers.items()) if own == role]


# Copies.


def dump_copies(rank: Rank, fault: float = 0.0) -> Any:
    """Four senders have two halves twice; four receivers want a quarter each."""
    if rank.is_baseline:
        axes = {"dp": (rank.role_rank // 2, 2), "tp": (rank.role_rank % 2, 2)}
        mine = full_tensor().chunk(2, 1)[axes["tp"][0]].clone()
        if fault and rank.role_rank == 3:
            mine[1, 4] += fault
        grafter.dump("h", mine, dims="t h[tp]  # dp:replicated", axes=axes)
        return None
    mine = torch.zeros(4, 3)
    grafter.dump("h", mine, dims="t h[tp]", axes={"tp": (rank.role_rank, 4)})
    return mine.tolist()


class Told(logging.Handler):
    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.lines: list[str] = []
        logging.getLogger("grafter").addHandler(self)

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append(record.getMessage())


def dump_copies_that_differ(rank: Rank) -> Any:
    told = Told()
    return dump_copies(rank, fault=0.5), told.lines


@pytest.mark.parametrize("backend", ["auto", "gloo"])
def test_each_receiver_reads_from_one_of_the_copies_and_the_load_is_even(tmp_path: Path, backend: str) -> None:
    with two_jobs(tmp_path, dump_copies, dump_copies, ranks=(4, 4), b2t_filter="True", backend=backend) as jobs:
        values = succeed(jobs.wait())
        ledgers = jobs.ledgers()
    assert values[4:] == [part.tolist() for part in full_tensor().chunk(4, 1)]
    assert [record.bytes_sent for record in only(ledgers, "baseline")] == [48] * 4
    assert [record.bytes_received for record in only(ledgers, "target")] == [48] * 4
    assert all(record.leaves[0].replicas is None for record in only(ledgers, "target"))


@pytest.mark.parametrize("backend", ["auto", "gloo"])
def test_a_copy_that_nobody_needs_stays_idle_and_nobody_waits_for_it(tmp_path: Path, backend: str) -> None:
    """Four copies, one receiver: three senders have nothing to move, also while the groups are built."""
    with two_jobs(tmp_path, dump_idle, dump_idle, ranks=(4, 1), b2t_filter="True", backend=backend) as jobs:
        *_, got = succeed(jobs.wait())
        ledgers = jobs.ledgers()
    assert got == [full_tensor().tolist()] * 2
    sent = [[record.bytes_sent for record in ledgers["baseline", role_rank]] for role_rank in range(4)]
    assert sent == [[192, 192], [0, 0], [0, 0], [0, 0]]
    assert {record.outcome for own in ledgers.values() for record in own} == {"sent", "grafted"}


def dump_idle(rank: Rank) -> Any:
    found = []
    for number in range(2):
        if rank.is_baseline:
            grafter.dump("h", full_tensor(), dims="t h # dp:replicated", axes={"dp": (rank.role_rank, 4)}, at=number)
        else:
            mine = torch.zeros(4, 12)
            grafter.dump("h", mine, at=number)
            found.append(mine.tolist())
    return found


def test_equal_copies_are_compared_where_that_is_asked_for(tmp_path: Path) -> None:
    """All copies cross then, and the ledger says that they are equal."""
    settings = {"b2t_filter": "True", "check_replicas": 1}
    with two_jobs(tmp_path, dump_copies, dump_copies, ranks=(4, 4), **settings) as jobs:
        values = succeed(jobs.wait())
        ledgers = jobs.ledgers()
    assert values[4:] == [part.tolist() for part in full_tensor().chunk(4, 1)]
    for record in only(ledgers, "target"):
        assert record.bytes_received == 2 * 48
        assert record.leaves[0].replicas is not None
        assert record.leaves[0].replicas.mismatched_fraction == 0.0 and record.leaves[0].replicas.rel == 0.0


@pytest.mark.parametrize("asked_by", ["baseline", "target"])
def test_copies_that_differ_are_told_and_the_first_is_taken(tmp_path: Path, asked_by: str) -> None:
    """One side that asks is enough. What is written is what the lowest of the ranks has."""
    with Jobs(tmp_path, b2t_filter="True", stats="off") as jobs:
        for role in ("baseline", "target"):
            jobs.start(role, 4, dump_copies_that_differ, check_replicas=int(role == asked_by))
        values = succeed(jobs.wait())
        ledgers = jobs.ledgers()
        summary = read_run_summary(tmp_path / "run")
    (problem,) = summary.problems
    assert problem.startswith("the sender's replicas differ at 1 point") and "h at step 0 (max |d| 0.5)" in problem
    assert json.loads(summary.rows[0].as_json())["replicas"]["max_abs"] == 0.5
    assert [value for value, _ in values[4:]] == [part.tolist() for part in full_tensor().chunk(4, 1)]
    apart = [record.leaves[0].replicas for record in only(ledgers, "target")]
    assert [found.max_abs if found else None for found in apart] == [0.0, 0.0, 0.0, 0.5]
    assert apart[3] is not None and apart[3].max_abs_index == [1, 1]
    assert apart[3].mismatched_fraction == pytest.approx(1 / 12)
    assert apart[3].max_abs_values == [22.0, 22.5], "the first copy against the other"
    assert [lines for _, lines in values[:7]] == [[]] * 7
    (told,) = values[7][1]
    assert "the replicas of 'h' (step=0) differ: baseline rank 1 and baseline rank 3, as target rank 3 sees" in told
    assert "most at [1, 1] of its part (22 against 22.5)" in told


# The receiver's copies.


def dump_into_copies(rank: Rank, fault: float) -> Any:
    """One sender; four receivers hold two halves twice, each half padded by what is no part of it."""
    if rank.is_baseline:
        grafter.dump("h", full_tensor(), dims="t h=12")
        return None
    axes = {"dp": (rank.role_rank // 2, 2), "tp": (rank.role_rank % 2, 2)}
    mine = torch.full((4, 7), float(rank.role_rank))[:, : 7 - rank.role_rank % 2 * 2].clone()
    held = full_tensor()[:, :7] if not axes["tp"][0] else full_tensor()[:, 7:]
    mine[:, : held.shape[1]] = held
    if rank.role_rank == 3:
        mine[1, 4] += fault
    grafter.dump("h", mine, dims="t h=12[tp]  # dp:replicated", axes=axes)
    return mine.tolist()


def dump_into_copies_that_differ(rank: Rank) -> Any:
    return dump_into_copies(rank, 0.5)


def dump_into_equal_copies(rank: Rank) -> Any:
    return dump_into_copies(rank, 0.0)


@pytest.mark.parametrize("asked_by", ["baseline", "target"])
@pytest.mark.parametrize("direction", ["compare_filter", "b2t_filter"])
def test_the_receivers_copies_that_differ_are_told_as_the_senders_are(
    tmp_path: Path, asked_by: str, direction: str
) -> None:
    """Whichever side asks, compared or grafted: the run has a problem that names both ranks."""
    with Jobs(tmp_path, **{direction: "True"}) as jobs:
        jobs.start("baseline", 1, dump_into_copies_that_differ, check_replicas=int(asked_by == "baseline"))
        jobs.start("target", 4, dump_into_copies_that_differ, check_replicas=int(asked_by == "target"))
        succeed(jobs.wait())
        ledgers = jobs.ledgers()
        summary = read_run_summary(tmp_path / "run")
    copies = [record.leaves[0].copy_of for record in only(ledgers, "target")]
    assert [copy.ranks if copy else None for copy in copies] == [[0, 2], [1, 3], [0, 2], [1, 3]]
    (problem,) = summary.problems
    assert problem.startswith("the receiver's replicas differ at 1 point, though they were declared copies")
    assert "h at step 0, on target 1 and target 3" in problem
    assert json.loads(summary.rows[0].as_json())["copies"]["ranks"] == ["target 1", "target 3"]


@pytest.mark.parametrize("check", [0, 1])
def test_the_receivers_copies_are_compared_where_that_is_asked_for(tmp_path: Path, check: int) -> None:
    """Equal ones are no problem; unasked, no rank makes a checksum."""
    with Jobs(tmp_path, compare_filter="True", check_replicas=check) as jobs:
        jobs.start("baseline", 1, dump_into_equal_copies if check else dump_into_copies_that_differ)
        jobs.start("target", 4, dump_into_equal_copies if check else dump_into_copies_that_differ)
        succeed(jobs.wait())
        ledgers = jobs.ledgers()
        summary = read_run_summary(tmp_path / "run")
    assert summary.problems == []
    assert {record.leaves[0].copy_of is not None for record in only(ledgers, "target")} == {bool(check)}


# Summands.


def dump_summands(rank: Rank) -> Any:
    if rank.is_baseline:
        small = torch.full((4, 12), 256.0 if rank.role_rank == 0 else 1.0, dtype=torch.bfloat16)
        axes = {"tp": (rank.role_rank, 4)}
        grafter.dump("bfloat16", small, dims="t h[tp:partial]", axes=axes)
        grafter.dump("integers", torch.full((4, 12), rank.role_rank), dims="t h[tp:partial]", axes=axes)
        grafter.dump("bool", torch.ones(4, 12, dtype=torch.bool), dims="t h[tp:partial]", axes=axes)
        return None
    found = []
    for name, dtype in (("bfloat16", torch.float32), ("integers", torch.int64), ("bool", torch.bool)):
        mine = torch.zeros(4, 6, dtype=dtype)
        grafter.dump(name, mine, dims="t h[tp]", axes={"tp": (rank.role_rank, 2)})
        found.append(mine.unique().tolist())
    return found


@pytest.mark.parametrize("backend", ["auto", "gloo"])
def test_summands_are_added_in_float32_or_exactly(tmp_path: Path, backend: str) -> None:
    """In bfloat16, 256 + 1 + 1 + 1 is 256. Truth values have no sum, and the reason names the dtype."""
    with two_jobs(tmp_path, dump_summands, dump_summands, ranks=(4, 2), b2t_filter="True", backend=backend) as jobs:
        values = succeed(jobs.wait())
        ledgers = jobs.ledgers()
    assert values[4:] == [[[259.0], [6], [False]]] * 2
    assert [record.outcome for record in ledgers["target", 1]] == ["grafted", "grafted", "failed"]
    assert [record.bytes_received for record in ledgers["target", 1]][:2] == [4 * 24 * 2, 4 * 24 * 8]
    reason = ledgers["target", 1][2].reason
    assert reason is not None and "summands of torch.bool have no sum, and 't h[tp:partial]' at baseline" in reason
    assert ".py:" not in reason


def dump_into_summands(rank: Rank) -> Any:
    if rank.is_baseline:
        grafter.dump("h", full_tensor(), dims="t h")
        return None
    mine = torch.full((4, 12), 9.0)
    grafter.dump("h", mine, dims="t h[tp:partial]", axes={"tp": (rank.role_rank, 2)})
    return mine.tolist()


@pytest.mark.parametrize("backend", ["auto", "gloo"])
def test_summands_take_a_value_only_where_it_is_said_how(tmp_path: Path, backend: str) -> None:
    settings = {"b2t_filter": "True", "backend": backend}
    ranks = (1, 2)
    with two_jobs(tmp_path / "refused", dump_into_summands, dump_into_summands, ranks=ranks, **settings) as jobs:
        values = succeed(jobs.wait())
        ledgers = jobs.ledgers()
    assert values[1:] == [[[9.0] * 12] * 4] * 2
    reasons = {record.reason for own in ledgers.values() for record in own}
    assert len(reasons) == 1
    assert "GRAFTER_PARTIAL_TARGET=first" in str(reasons) and "after its reduction" in str(reasons)

    settings["partial_target"] = "first"
    with two_jobs(tmp_path / "first", dump_into_summands, dump_into_summands, ranks=ranks, **settings) as jobs:
        values = succeed(jobs.wait())
        ledgers = jobs.ledgers()
    assert values[1:] == [full_tensor().tolist(), [[0.0] * 12] * 4]
    assert [record.bytes_received for record in only(ledgers, "target")] == [192, 0]


def dump_product_target(rank: Rank) -> Any:
    import torch.distributed as dist
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import DTensor, Partial

    if rank.is_baseline:
        grafter.dump("h", torch.full((2,), -3.0))
        return None
    where = f"file://{rank.arguments[0]}/{rank.role}"
    dist.init_process_group("gloo", init_method=where, rank=rank.role_rank, world_size=rank.world_size)
    mine = torch.full((2,), 9.0)
    grafter.dump("h", DTensor.from_local(mine, init_device_mesh("cpu", (2,)), [Partial("max")]))
    dist.destroy_process_group()
    return mine.tolist()


def test_zeros_beside_the_first_summand_are_only_for_sums(tmp_path: Path) -> None:
    """The maximum of -3 and 0 is not -3."""
    with Jobs(tmp_path, b2t_filter="True", partial_target="first") as jobs:
        jobs.start("baseline", 1, dump_product_target, tmp_path)
        jobs.start("target", 2, dump_product_target, tmp_path)
        values = succeed(jobs.wait())
        ledgers = jobs.ledgers()
    assert values[1:] == [[9.0, 9.0]] * 2
    assert all(record.outcome == "failed" and "max" in str(record.reason) for record in only(ledgers, "target"))
