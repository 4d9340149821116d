"""DTensors between real jobs: their meshes and placements say where they lie, and nothing is annotated."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from jobs import Jobs, Rank, succeed

import grafter

SHAPE = (10, 6)


def whole(dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.arange(60, dtype=torch.float32).view(SHAPE).to(dtype)


def init_mesh(rank: Rank, shape: tuple[int, ...], names: tuple[str, ...]) -> Any:
    import torch.distributed as dist
    from torch.distributed.device_mesh import init_device_mesh

    if not dist.is_initialized():
        where = f"file://{rank.arguments[0]}/{rank.role}"
        dist.init_process_group("gloo", init_method=where, rank=rank.role_rank, world_size=rank.world_size)
    return init_device_mesh("cpu", shape, mesh_dim_names=names)


def leave() -> None:
    import torch.distributed as dist

    dist.destroy_process_group()


def run_both(tmp_path: Path, function: Any, ranks: tuple[int, int], **settings: Any) -> tuple[list[Any], Any]:
    """(values of all ranks, ledgers)."""
    with Jobs(tmp_path, compiler=True, **{"b2t_filter": "True", **settings}) as jobs:
        jobs.start("baseline", ranks[0], function, tmp_path)
        jobs.start("target", ranks[1], function, tmp_path)
        return succeed(jobs.wait()), jobs.ledgers()


# Between DTensors.


def placements_of(case: str) -> tuple[tuple[tuple[int, ...], list[Any]], tuple[tuple[int, ...], list[Any]]]:
    """(mesh shape, placements) of sender and receiver."""
    from torch.distributed.tensor import Replicate, Shard

    line, square = (4,), (2, 2)
    return {
        "rows to columns, both uneven": ((line, [Shard(0)]), (line, [Shard(1)])),
        "replicas to shards": ((square, [Replicate(), Shard(1)]), (square, [Shard(0), Shard(1)])),
        "two axes on one dim": ((square, [Shard(0), Shard(0)]), (line, [Shard(0)])),
        "negative dims": ((square, [Shard(-1), Shard(-2)]), (square, [Shard(0), Replicate()])),
        "to replicas": ((line, [Shard(0)]), (square, [Replicate(), Replicate()])),
    }[case]


CASES = ["rows to columns, both uneven", "replicas to shards", "two axes on one dim", "negative dims", "to replicas"]


def dump_distributed(rank: Rank) -> dict[str, bool]:
    from torch.distributed.tensor import distribute_tensor

    meshes = {(4,): init_mesh(rank, (4,), ("tp",)), (2, 2): init_mesh(rank, (2, 2), ("dp", "tp"))}
    found = {}
    for case in CASES:
        shape, placements = placements_of(case)[0 if rank.is_baseline else 1]
        value: Any = distribute_tensor(whole() if rank.is_baseline else torch.zeros(SHAPE), meshes[shape], placements)
        returned = grafter.dump(case, value)
        assert returned is value
        found[case] = torch.equal(value.full_tensor(), whole())
    leave()
    return found


def test_between_dtensors_of_any_placements(tmp_path: Path) -> None:
    """Each receiving rank's bytes come once, from one of those that hold them."""
    values, ledgers = run_both(tmp_path, dump_distributed, (4, 4))
    assert values[4:] == [dict.fromkeys(CASES, True)] * 4
    for role_rank in range(4):
        for record in ledgers["target", role_rank]:
            assert record.outcome == "grafted", record.reason
            assert record.bytes_received == 4 * torch.Size(record.leaves[0].shape).numel()
            assert record.leaves[0].layout == "DTensor of [10, 6]"
    replicas = [records[1].bytes_sent for (role, _), records in ledgers.items() if role == "baseline"]
    assert replicas == [60] * 4, "the load is shared among replicas"


# Between a DTensor and plain tensors.


def dump_against_plain(rank: Rank) -> list[bool]:
    """The baseline holds plain tensors, the target DTensors; or the other way round."""
    from torch.distributed.tensor import Shard, distribute_tensor

    is_distributed = rank.role == rank.arguments[1]
    sends = rank.is_baseline
    mesh = init_mesh(rank, (4,), ("tp",)) if is_distributed else None
    found = []
    for name, size in (("columns of two ranks", 2), ("one rank, and nothing is said", 1)):
        if is_distributed:
            value: Any = distribute_tensor(whole() if sends else torch.zeros(SHAPE), mesh, [Shard(0)])
            grafter.dump(name, value, dims="a b" if size == 2 else None)
            found.append(torch.equal(value.full_tensor(), whole()))
        elif rank.role_rank < size:
            mine = whole().t().chunk(size, 0)[rank.role_rank] if size == 2 else whole()
            value = mine if sends else torch.zeros_like(mine)
            options = {"dims": "b[tp] a", "axes": {"tp": (rank.role_rank, 2)}} if size == 2 else {}
            grafter.dump(name, value, ranks=range(size), **options)
            found.append(torch.equal(value, mine))
    if is_distributed:
        leave()
    return found


@pytest.mark.parametrize("distributed", ["baseline", "target"])
def test_between_a_dtensor_and_plain_shards(tmp_path: Path, distributed: str) -> None:
    """Against dims with other names in another order, and against one whole tensor with no word on either side."""
    ranks = (4, 2) if distributed == "baseline" else (2, 4)
    with Jobs(tmp_path, compiler=True, b2t_filter="True") as jobs:
        jobs.start("baseline", ranks[0], dump_against_plain, tmp_path, distributed)
        jobs.start("target", ranks[1], dump_against_plain, tmp_path, distributed)
        values = succeed(jobs.wait())
        ledgers = jobs.ledgers()
    assert [r.reason for own in ledgers.values() for r in own if r.outcome == "failed"] == []
    assert all(all(found) for found in values)
    for name in ("columns of two ranks", "one rank, and nothing is said"):
        sent = [r.bytes_sent for own in ledgers.values() for r in own if r.name == name]
        assert sum(sent) == 240


# Summands.


def dump_partial(rank: Rank) -> Any:
    from torch.distributed.tensor import DTensor, Partial, Shard

    found = {}
    if rank.is_baseline:
        mesh = init_mesh(rank, (4,), ("tp",))
        for reduction in ("sum", "avg", "max", "min", "product"):
            local = (whole() - 30) * (-1) ** rank.role_rank + rank.role_rank
            grafter.dump(reduction, DTensor.from_local(local, mesh, [Partial(reduction)]))
        # In bfloat16, 256 + 1 + 1 + 1 is 256 where each sum is rounded.
        small = torch.full((4, 2), 256.0 if rank.role_rank == 0 else 1.0, dtype=torch.bfloat16)
        grafter.dump("in bfloat16", DTensor.from_local(small, mesh, [Partial()]))
        square = init_mesh(rank, (2, 2), ("dp", "tp"))
        half = whole().chunk(2, 0)[rank.role_rank // 2] / 2
        grafter.dump("sharded and partial", DTensor.from_local(half, square, [Shard(0), Partial()]))
        leave()
        return None
    for name in ("sum", "avg", "max", "min", "product", "in bfloat16", "sharded and partial"):
        found[name] = torch.zeros((4, 2) if name == "in bfloat16" else SHAPE)
        grafter.dump(name, found[name])
    return {name: value.tolist() for name, value in found.items()}


def test_a_partial_dtensor_is_reduced_by_its_own_operation_in_float32(tmp_path: Path) -> None:
    values, ledgers = run_both(tmp_path, dump_partial, (4, 1))
    found = values[4]
    parts = torch.stack([(whole() - 30) * (-1) ** rank + rank for rank in range(4)])
    assert found["sum"] == parts.sum(0).tolist()
    assert found["avg"] == parts.mean(0).tolist()
    assert found["max"] == parts.amax(0).tolist()
    assert found["min"] == parts.amin(0).tolist()
    assert found["product"] == parts.prod(0).tolist()
    assert found["in bfloat16"] == [[259.0] * 2] * 4
    assert found["sharded and partial"] == whole().tolist()
    assert [r.bytes_received for r in ledgers["target", 0]] == [4 * 240] * 5 + [4 * 16, 2 * 240]


# A collective that is still under way.


def dump_async(rank: Rank) -> Any:
    from torch.distributed._functional_collectives import AsyncCollectiveTensor
    from torch.distributed.tensor import Replicate, Shard, distribute_tensor

    if not rank.is_baseline:
        grafter.dump("gathered", target := torch.zeros(SHAPE))
        return target.tolist()
    mesh = init_mesh(rank, (2,), ("tp",))
    sharded: Any = distribute_tensor(whole(), mesh, [Shard(0)])
    gathered = sharded.redistribute(mesh, [Replicate()], async_op=True)
    assert isinstance(gathered._local_tensor, AsyncCollectiveTensor)
    grafter.dump("gathered", gathered)
    leave()
    return None


def test_a_collective_that_is_under_way_is_waited_for(tmp_path: Path) -> None:
    values, _ = run_both(tmp_path, dump_async, (2, 1))
    assert values[2] == whole().tolist()


# FSDP2 over tensor parallel: rows of a strided shard are not one run.


class Block(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up = torch.nn.Linear(6, 20)
        self.down = torch.nn.Linear(20, 6)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down(self.up(x).relu())


def make_block(seed: int) -> Block:
    torch.manual_seed(seed)
    return Block()


def dump_parameters(rank: Rank) -> Any:
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

    block = make_block(0 if rank.is_baseline else 1)
    if rank.world_size == 4:
        mesh = init_mesh(rank, (2, 2), ("dp", "tp"))
        parallelize_module(block, mesh["tp"], {"up": ColwiseParallel(), "down": RowwiseParallel()})
        fully_shard(block, mesh=mesh["dp"])
    kinds = []
    for name, parameter in block.named_parameters():
        kinds.append([type(placement).__name__ for placement in getattr(parameter, "placements", ())])
        grafter.dump("parameter", parameter, parameter=name)
    full = [getattr(p, "full_tensor", lambda p=p: p)().detach() for p in block.parameters()]
    if rank.world_size == 4:
        leave()
    return [value.tolist() for value in full], kinds


@pytest.mark.parametrize(
    ("ranks", "backend"), [((1, 4), "auto"), ((4, 1), "gloo")], ids=["to FSDP x TP", "from FSDP x TP"]
)
def test_parameters_of_fsdp2_over_tensor_parallel(tmp_path: Path, ranks: tuple[int, int], backend: str) -> None:
    values, ledgers = run_both(tmp_path, dump_parameters, ranks, backend=backend)
    expected = [parameter.detach().tolist() for parameter in make_block(0).parameters()]
    assert [full for full, _ in values[ranks[0] :]] == [expected] * ranks[1]
    kinds = values[0 if ranks[0] == 4 else 1][1]
    assert any("_StridedShard" in placements for placements in kinds), kinds
    assert {r.outcome for own in ledgers.values() for r in own} == {"sent", "grafted"}
    # What is in several places of the mesh is written in each.
    assert sum(r.bytes_received for own in ledgers.values() for r in own) >= sum(4 * len(p) for p in expected)


# What is refused.


def dump_unfit(rank: Rank) -> list[str | None]:
    from torch.distributed.tensor import DTensor, Partial, Shard

    mesh = init_mesh(rank, (2,), ("tp",))
    uneven = DTensor.from_local(torch.ones(3 - rank.role_rank, 2), mesh, [Shard(0)], run_check=False)
    own_mesh: Any = None
    if rank.is_baseline:
        from torch.distributed.device_mesh import DeviceMesh

        # As data parallel replicas have it: each rank's tensor on a mesh of its own.
        meshes = [DeviceMesh("cpu", [number]) for number in range(2)]
        own_mesh = DTensor.from_local(torch.ones(4), meshes[rank.role_rank], [Shard(0)])
    else:
        own_mesh = DTensor.from_local(torch.ones(2), mesh, [Shard(0)])
    errors: list[str | None] = []
    for name, value in (
        ("uneven shards", uneven),
        ("two tensors", own_mesh),
        ("into summands", DTensor.from_local(torch.zeros(2), mesh, [Partial()])),
    ):
        try:
            grafter.dump(name, value)
            errors.append(None)
        except grafter.GrafterError as error:
            errors.append(str(error))
    leave()
    return errors


def test_dtensors_that_lie_or_contradict_are_refused_on_all_ranks_alike(tmp_path: Path) -> None:
    values, ledgers = run_both(tmp_path, dump_unfit, (2, 2))
    reasons = {name: {r.reason for own in ledgers.values() for r in own if r.name == name} for name in (
        "uneven shards", "two tensors", "into summands",
    )}  # fmt: skip
    outcomes = {r.outcome for own in ledgers.values() for r in own}
    assert outcomes == {"failed"}
    (uneven,), (two,), (summands,) = reasons.values()
    assert uneven is not None and "baseline rank 0 declares DTensor of [6, 2]" in uneven and "from_local" in uneven
    assert two is not None and "baseline rank 0 and baseline rank 1" in two and "replicated" in two
    assert summands is not None and "GRAFTER_PARTIAL_TARGET=first" in summands
    assert values == [[None, None, None]] * 4, "a matched point that fails raises nothing"
