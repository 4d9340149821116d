"""The layout that a DTensor says of itself, against what torch itself puts on each rank."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import product
from math import prod
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st
from layout_parts import StandIn, role_headers
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.distributed.tensor.placement_types import _StridedShard
from torch.testing._internal.distributed.fake_pg import FakeStore

from grafter.core.layout.declared import DeclaredLayout, declare
from grafter.core.layout.dtensor import DTensorLayout, read_dtensor
from grafter.core.plan.resharding import Resharding
from grafter.core.plan.token_shares import find_shares
from grafter.errors import LayoutError


@contextmanager
def being_rank(rank: int, mesh: tuple[int, ...], names: tuple[str, ...]) -> Iterator[DeviceMesh]:
    """A mesh as this rank sees it. The process group is torch's fake one: nothing is communicated."""
    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=prod(mesh))
    try:
        yield init_device_mesh("cpu", mesh, mesh_dim_names=names)
    finally:
        dist.destroy_process_group()


def on_each_rank(mesh: tuple[int, ...], work: Callable[[DeviceMesh], Any]) -> list[Any]:
    results = []
    for rank in range(prod(mesh)):
        with being_rank(rank, mesh, ("dp", "tp", "cp")[: len(mesh)]) as own:
            results.append(work(own))
    return results


def places(found: DTensorLayout, dim: int) -> list[int]:
    """Of the global dim, in the order of the local one."""
    return [at for start, length, _ in found.runs[dim] for at in range(start, start + length)]


def assert_lies_where_it_says(full: torch.Tensor, found: DTensorLayout, local: torch.Tensor) -> None:
    """The local tensor is the global one at the places that were read."""
    assert found.global_shape == tuple(full.shape)
    expected = full
    for dim in range(full.ndim):
        expected = expected.index_select(dim, torch.tensor(places(found, dim), dtype=torch.int64))
        assert [run[2] for run in found.runs[dim]] == [
            sum(length for _, length, _ in found.runs[dim][:n]) for n in range(len(found.runs[dim]))
        ]
    assert torch.equal(local, expected)


PLACEMENTS = [Replicate(), Shard(0), Shard(1), _StridedShard(0, split_factor=2), _StridedShard(1, split_factor=3)]
MESHES_1D = [((n,), (p,)) for n in (1, 2, 3) for p in PLACEMENTS]
MESHES_2D = [((2, 3), pair) for pair in product(PLACEMENTS, PLACEMENTS)]
MESHES_3D = [
    ((2, 2, 2), (Shard(0), Shard(0), Shard(0))),
    ((2, 3, 2), (Shard(1), Replicate(), Shard(1))),
    ((2, 2, 3), (_StridedShard(0, split_factor=6), _StridedShard(0, split_factor=3), Shard(0))),
]


@settings(max_examples=6)
@given(st.sampled_from([(8, 6), (7, 5), (12, 1), (3, 2), (1, 9), (0, 4), (13, 11)]))
@pytest.mark.parametrize(("mesh", "placements"), [*MESHES_1D, *MESHES_2D, *MESHES_3D], ids=str)
def test_what_is_read_is_what_torch_splits(
    mesh: tuple[int, ...], placements: tuple[Any, ...], shape: tuple[int, int]
) -> None:
    """All placements, sizes that divide or do not, shards that are empty; and together they hold all of it."""
    full = torch.arange(prod(shape)).view(shape)
    together = set()
    for place in product(*map(range, mesh)):
        local = full
        for placement, coordinate, size in zip(placements, place, mesh, strict=True):
            if not isinstance(placement, Replicate):
                local = placement._split_tensor(local, size, with_padding=False, contiguous=True)[0][coordinate]
        found = read_dtensor(StandIn(shape, local, mesh, place, placements))
        assert_lies_where_it_says(full, found, local)
        assert (found.place, found.summand) == (place, None)
        together |= set(local.flatten().tolist())
    assert together == set(range(full.numel()))


@pytest.mark.parametrize("shape", [(8, 6), (7, 5), (3, 2)])
@pytest.mark.parametrize(
    ("mesh", "placements"),
    [
        ((3,), (Shard(0),)),
        ((3,), (Shard(-1),)),
        ((2, 2), (Shard(0), Shard(0))),
        ((2, 3), (Shard(1), Shard(0))),
        ((2, 2), (Replicate(), Shard(1))),
        ((2, 2, 2), (Shard(0), Shard(1), Shard(0))),
    ],
    ids=str,
)
def test_a_real_dtensor_is_read_on_every_rank(
    shape: tuple[int, int], mesh: tuple[int, ...], placements: tuple[Any, ...]
) -> None:
    full = torch.arange(float(prod(shape))).view(shape)

    def read(own: DeviceMesh) -> tuple[DTensorLayout, torch.Tensor]:
        tensor = distribute_tensor(full, own, placements, src_data_rank=None)
        return read_dtensor(tensor), tensor.to_local()

    results = on_each_rank(mesh, read)
    for found, local in results:
        assert_lies_where_it_says(full, found, local)
    assert len({found.mesh for found, _ in results}) == 1
    assert [found.place for found, _ in results] == list(product(*map(range, mesh)))


@pytest.mark.parametrize("rows", [8, 12, 7, 5, 9])
@pytest.mark.parametrize("style", ["colwise", "rowwise"])
def test_fsdp2_over_tensor_parallel_is_read_with_all_its_runs(rows: int, style: str) -> None:
    """Rows are cut by tp first and by dp inside of it: a rank's rows are where FSDP2 itself put them."""

    def read(own: DeviceMesh) -> tuple[DTensorLayout, torch.Tensor, Any]:
        layer = torch.nn.Linear(6, rows, bias=False)
        with torch.no_grad():
            layer.weight.copy_(full)
        plan = ColwiseParallel() if style == "colwise" else RowwiseParallel()
        tp, dp = own["tp"], own["dp"]
        # The fake group brings nothing from rank 0, so each rank takes its own part of the same weights.
        parallelize_module(layer, tp, plan, src_data_rank=None)
        fully_shard(layer, mesh=dp)
        local, placements = layer.weight._local_tensor.detach(), layer.weight.placements
        # torch remembers joined meshes, and here it would give the first rank's to all ranks of this one process.
        assert layer.weight.device_mesh == own
        spec = SimpleNamespace(mesh=own, placements=placements, shape=layer.weight.shape)
        return read_dtensor(SimpleNamespace(_spec=spec, _local_tensor=local)), local, placements

    full = torch.arange(rows * 6.0).view(rows, 6)
    seen = set()
    for found, local, placements in on_each_rank((2, 2), read):
        assert_lies_where_it_says(full, found, local)
        seen |= set(local.flatten().tolist())
        assert any(isinstance(p, _StridedShard) for p in placements) == (style == "colwise")
    assert seen == set(full.flatten().tolist())


def test_summands_are_numbered_over_all_partial_mesh_axes() -> None:
    mesh, placements = (2, 3, 2), (Partial(), Shard(0), Partial())
    found = [
        read_dtensor(StandIn((6,), torch.arange(2), mesh, place, placements)).summand
        for place in product(*map(range, mesh))
        if place[1] == 0
    ]
    assert found == [("sum", n, 4) for n in range(4)]
    assert read_dtensor(StandIn((6,), torch.arange(6), (2,), (1,), [Partial("avg")])).summand == ("avg", 1, 2)
    with pytest.raises(LayoutError, match="partial by sum and by max at once"):
        read_dtensor(StandIn((6,), torch.arange(6), (2, 2), (0, 0), [Partial(), Partial("max")]))


# --- what has no plain reading


def test_an_uneven_shard_that_from_local_took_for_even_is_refused() -> None:
    """Each rank believes that all hold as much as it does: two global shapes, and both agree with themselves."""

    def read(own: DeviceMesh) -> DeclaredLayout | None:
        local = torch.zeros(3 if own.get_local_rank() == 0 else 2, 4)
        return declare(DTensor.from_local(local, own, [Shard(0)], run_check=False), local.shape, None, None, None)

    layouts = on_each_rank((2,), read)
    with pytest.raises(LayoutError) as error:
        find_shares(role_headers("baseline", None, [(3, 4), (2, 4)], layouts=layouts), 0)
    assert str(error.value) == (
        "baseline rank 0 declares DTensor of [6, 4], and baseline rank 1 declares DTensor of [4, 4]. One of them was "
        "made by `from_local` of uneven shards, probably: give `from_local` the true shape= and stride=."
    )


def test_a_local_tensor_that_is_not_what_its_placements_make_is_refused_on_its_rank() -> None:
    def read(own: DeviceMesh) -> str:
        local = torch.zeros(3, 4)
        tensor = DTensor.from_local(local, own, [Shard(0)], run_check=False, shape=torch.Size((5, 4)), stride=(4, 1))
        if own.get_local_rank() == 0:
            return str(read_dtensor(tensor).runs)
        with pytest.raises(LayoutError) as error:
            read_dtensor(tensor)
        return str(error.value)

    first, second = on_each_rank((2,), read)
    assert first == "(((0, 3, 0),), ((0, 4, 0),))"
    assert second.startswith("a DTensor of global shape [5, 4] with [Shard(dim=0)] has [2, 4] on this rank, but its")
    assert second.endswith("give `from_local` the true shape= and stride=.")


class OwnPartial(Partial):
    """Stands for `_MaskPartial` and its like: summands that are masked before they are added."""


class OwnShard(Shard):
    """A placement class of some library."""


class OwnReplicate(Replicate):
    """A placement class of some library."""


def test_placements_that_torch_itself_keeps_apart_are_refused() -> None:
    def refusal(placement: Any) -> str:
        with pytest.raises(LayoutError) as error:
            read_dtensor(StandIn((6,), torch.arange(3), (2,), (0,), [placement]))
        return str(error.value)

    from torch.distributed.tensor._ops._embedding_ops import _MaskPartial

    for masked in (_MaskPartial(offset_shape=torch.Size((6,)), offset_dim=0), OwnPartial()):
        assert "whose summands have an operation of their own. Redistribute it to Shard or Replicate" in refusal(masked)
    assert "of the class OwnShard, which grafter does not know" in refusal(OwnShard(0))
    assert "of the class OwnReplicate, which grafter does not know" in refusal(OwnReplicate())
    assert "an operation of their own" in refusal(Partial("bitwise"))


def test_a_dtensor_in_another_shard_order_is_refused() -> None:
    stand_in = StandIn((8,), torch.arange(2), (2, 2), (0, 0), [Shard(0), Shard(0)])

    class Spec(SimpleNamespace):
        @staticmethod
        def is_default_device_order(order: Any) -> bool:
            return bool(order == (0, 1))

    fields = vars(stand_in._spec)
    stand_in._spec = Spec(**fields, shard_order=(0, 1))
    assert places(read_dtensor(stand_in), 0) == [0, 1]
    stand_in._spec = Spec(**fields, shard_order=(1, 0))
    with pytest.raises(LayoutError, match="is sharded in another order than that of its mesh"):
        read_dtensor(stand_in)


def test_a_real_dtensor_in_another_shard_order_is_refused() -> None:
    from torch.distributed.tensor import _dtensor_spec as specs

    if not hasattr(specs, "ShardOrderEntry"):
        pytest.skip(f"torch {torch.__version__} knows no shard order")

    def read(own: DeviceMesh) -> str:
        tensor = distribute_tensor(torch.arange(8), own, [Shard(0), Shard(0)], src_data_rank=None)
        assert places(read_dtensor(tensor), 0) == tensor.to_local().tolist()
        tensor._spec.shard_order = (specs.ShardOrderEntry(tensor_dim=0, mesh_dims=(1, 0)),)
        with pytest.raises(LayoutError) as error:
            read_dtensor(tensor)
        return str(error.value)

    assert all("in another order than that of its mesh" in text for text in on_each_rank((2, 2), read))


def test_a_rank_outside_of_the_mesh_is_told_to_stay_out() -> None:
    stand_in = StandIn((8,), torch.arange(4), (2,), (0,), [Shard(0)])
    stand_in._spec.mesh.get_coordinate = lambda: None
    with pytest.raises(LayoutError, match="this rank is not in the mesh of its DTensor"):
        read_dtensor(stand_in)


# --- replicas on meshes of their own


def of_mesh(mesh: str, place: int, dims: str | None = None) -> DeclaredLayout:
    return DeclaredLayout(dims=dims, global_shape=(4,), runs=(((2 * place, 2, 0),),), place=(place,), mesh=mesh)


TWO_TENSORS = (
    "the DTensors of baseline rank {} and baseline rank {} are two tensors, each on a mesh of its own. If they are "
    'copies, name the axis in which their ranks differ: dims="... # dp:replicated", with set_axes or set_mesh; if not, '
    "give ranks= of those that share one."
)


def test_two_meshes_with_the_same_placements_are_two_tensors_unless_declared_replicated() -> None:
    dp = [{"dp": (rank // 2, 2)} for rank in range(4)]
    layouts = [of_mesh("ab"[rank // 2], rank % 2) for rank in range(4)]
    with pytest.raises(LayoutError) as error:
        find_shares(role_headers("baseline", None, [(2,)] * 4, dp, layouts=layouts), 0)
    assert str(error.value) == TWO_TENSORS.format(0, 2)
    layouts = [of_mesh("ab"[rank // 2], rank % 2, "h # dp:replicated") for rank in range(4)]
    found = find_shares(role_headers("baseline", None, [(2,)] * 4, dp, layouts=layouts), 0)
    assert found is not None
    target = find_shares(role_headers("target", "h", [(4,)]), 0)
    assert target is not None
    assert Resharding(found, target, check_replicas=True).replicas == 2
    with pytest.raises(LayoutError) as error:
        find_shares(role_headers("baseline", None, [(2,)] * 4, layouts=layouts), 0)
    assert str(error.value) == TWO_TENSORS.format(0, 2)


def test_halves_of_two_tensors_are_not_one() -> None:
    """The first half of one mesh's tensor and the second of the other's are at two places, and still no tensor."""
    layouts = [of_mesh("a", 0), of_mesh("b", 1)]
    with pytest.raises(LayoutError) as error:
        find_shares(role_headers("baseline", None, [(2,)] * 2, layouts=layouts), 0)
    assert str(error.value) == TWO_TENSORS.format(0, 1)
