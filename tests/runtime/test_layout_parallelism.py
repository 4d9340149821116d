"""Pipeline, data and expert parallel between real jobs: who takes part differs, and each rank gets its own."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from jobs import Jobs, Rank, succeed, two_jobs

import grafter

LAYERS = 4


def hidden(layer: int) -> torch.Tensor:
    return torch.arange(32.0).view(4, 8) + 100 * layer


# Pipeline stages.


def dump_stages(rank: Rank) -> list[Any]:
    """Four layers over `stages` stages of `tp` ranks each: [pp][tp], a stage has neighbouring layers."""
    stages, tp = rank.arguments[0 if rank.is_baseline else 1]
    stage, place = divmod(rank.role_rank, tp)
    grafter.set_axes(pp=(stage, stages), tp=(place, tp))
    per_stage = LAYERS // stages
    found = []
    with grafter.context(ranks=[stage * tp + number for number in range(tp)]):
        for layer in range(stage * per_stage, (stage + 1) * per_stage):
            part = hidden(layer).chunk(tp, 1)[place]
            value = part if rank.is_baseline else torch.zeros_like(part)
            grafter.dump("h", value, layer_id=layer, dims="t h[tp]")
            found.append(torch.equal(value, part))
    return found


@pytest.mark.parametrize("backend", ["auto", "gloo"])
@pytest.mark.parametrize(
    ("baseline", "target"), [((1, 1), (4, 1)), ((2, 1), (1, 4)), ((2, 2), (4, 1))], ids=["1-4", "2-tp4", "2xtp2-4"]
)
def test_stages_of_other_sizes_meet_layer_by_layer(
    tmp_path: Path, backend: str, baseline: tuple[int, int], target: tuple[int, int]
) -> None:
    ranks = (baseline[0] * baseline[1], target[0] * target[1])
    settings = {"b2t_filter": "True", "backend": backend}
    with Jobs(tmp_path, **settings) as jobs:
        for role, count in zip(("baseline", "target"), ranks, strict=True):
            jobs.start(role, count, dump_stages, baseline, target)
        values = succeed(jobs.wait())
        ledgers = jobs.ledgers()
    assert all(all(found) for found in values)
    records = [record for own in ledgers.values() for record in own]
    assert {record.outcome for record in records} == {"sent", "grafted"}
    for layer in range(LAYERS):
        own = [record for record in records if record.tags["layer_id"] == layer]
        assert sum(record.bytes_sent for record in own) == sum(record.bytes_received for record in own) == 128


# Data parallel replicas.


def dump_batches(rank: Rank) -> list[Any]:
    """The batch is split over dp, the hidden dim over tp, on two meshes of other shapes."""
    dp, tp = (2, 2) if rank.is_baseline else (4, 1)
    axes = {"dp": (rank.role_rank // tp, dp), "tp": (rank.role_rank % tp, tp)}
    grafter.set_axes(**axes)
    batches = torch.arange(8.0 * 6).view(8, 6)
    part = batches.chunk(dp, 0)[axes["dp"][0]].chunk(tp, 1)[axes["tp"][0]]
    value = part.clone() if rank.is_baseline else torch.zeros_like(part)
    grafter.dump("h", value, dims="b[dp] h[tp]")
    # One replica of each job alone, as if the batches had nothing to do with one another.
    own = torch.full((4,), 1.0 + axes["tp"][0]) if rank.is_baseline else torch.zeros(8 // tp)
    if axes["dp"][0] == 0:
        grafter.dump("first replica", own, dims="h[tp]", ranks=range(tp))
    return [torch.equal(value, part), own.tolist()]


def test_batches_over_data_parallel_ranks(tmp_path: Path) -> None:
    """Either as one tensor, or one replica of each job with the other's, through ranks=."""
    with two_jobs(tmp_path, dump_batches, dump_batches, ranks=(4, 4), b2t_filter="True") as jobs:
        values = succeed(jobs.wait())
    assert values[4] == [True, [1.0] * 4 + [2.0] * 4]
    assert [right for right, _ in values[5:]] == [True] * 3
    assert [own for _, own in values[5:]] == [[0.0] * 8] * 3


def dump_renamed(rank: Rank) -> Any:
    """A layer whose data-parallel axis has another name: `# dp:=moe_dp`."""
    if rank.is_baseline:
        grafter.set_axes(moe_dp=(rank.role_rank, 2), tp=(0, 1))
        grafter.dump("h", torch.full((2, 3), float(rank.role_rank)), dims="b[dp] h[tp] # dp:=moe_dp")
        return None
    mine = torch.full((4, 3), 9.0)
    grafter.dump("h", mine)
    return mine.tolist()


def test_an_axis_may_have_another_name_in_the_job(tmp_path: Path) -> None:
    with two_jobs(tmp_path, dump_renamed, dump_renamed, ranks=(2, 1), b2t_filter="True") as jobs:
        assert succeed(jobs.wait())[2] == [[0.0] * 3] * 2 + [[1.0] * 3] * 2


# Experts.


def dump_experts(rank: Rank) -> list[bool]:
    """Weights [e, h, f] over ep (and etp inside), and the tokens that an expert parallel group shares."""
    ep, etp = (2, 2) if rank.is_baseline else (4, 1)
    axes = {"ep": (rank.role_rank // etp, ep), "etp": (rank.role_rank % etp, etp)}
    weights = torch.arange(8.0 * 2 * 4).view(8, 2, 4)
    tokens = torch.arange(16.0 * 2).view(16, 2)
    part = weights.chunk(ep, 0)[axes["ep"][0]].chunk(etp, 2)[axes["etp"][0]]
    experts = part.contiguous() if rank.is_baseline else torch.zeros_like(part)
    grafter.dump("experts", experts, dims="e[ep] h f[etp]", axes=axes)
    share = tokens.chunk(ep, 0)[axes["ep"][0]]
    routed = share.clone() if rank.is_baseline else torch.zeros_like(share)
    dims = "t[ep] h # etp:replicated" if rank.is_baseline else "t[ep] h"
    grafter.dump("tokens", routed, dims=dims, axes=axes)
    one_by_one = [torch.equal(experts, part), torch.equal(routed, share)]
    # An expert is a point of its own: whoever has it takes part.
    for expert in range(8):
        owner = expert // (8 // ep)
        if owner != axes["ep"][0]:
            continue
        mine = part[expert - owner * (8 // ep)]
        value = mine.contiguous() if rank.is_baseline else torch.zeros_like(mine)
        holders = [owner * etp + number for number in range(etp)]
        grafter.dump("expert", value, expert=expert, dims="h f[etp]", axes=axes, ranks=holders)
        one_by_one.append(torch.equal(value, mine))
    return one_by_one


@pytest.mark.parametrize("backend", ["auto", "gloo"])
def test_experts_over_other_numbers_of_ranks(tmp_path: Path, backend: str) -> None:
    """As one tensor [e, ...] over ep=2 x etp=2 into ep=4, as tokens, and expert by expert."""
    with two_jobs(tmp_path, dump_experts, dump_experts, ranks=(4, 4), b2t_filter="True", backend=backend) as jobs:
        values = succeed(jobs.wait())
        ledgers = jobs.ledgers()
    assert [r.reason for own in ledgers.values() for r in own if r.outcome == "failed"] == []
    assert values[4:] == [[True] * 4] * 4
    for name, nbytes in (("experts", 256), ("tokens", 128), ("expert", 256)):
        records = [record for own in ledgers.values() for record in own if record.name == name]
        assert sum(record.bytes_sent for record in records) == nbytes
        assert sum(record.bytes_received for record in records) == nbytes
