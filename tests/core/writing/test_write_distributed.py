"""Write-back into a DTensor, and into the result of a functional collective that may still be under way."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from grafter.core.writing.write_back import WriteMode, Written, apply_write, check_write
from grafter.errors import WriteRefused

IN_PLACE = WriteMode()
CUT = WriteMode(gradient="cut")
STRICT = WriteMode(gradient="strict")
RETURN = WriteMode(write="return")
RETURN_CUT = WriteMode(write="return", gradient="cut")
RETURN_STRICT = WriteMode(write="return", gradient="strict")
ALL_MODES = [IN_PLACE, CUT, STRICT, RETURN, RETURN_CUT, RETURN_STRICT]
by_mode = pytest.mark.parametrize("mode", ALL_MODES, ids=lambda m: f"{m.write}-{m.gradient}")


def write(target: torch.Tensor, incoming: torch.Tensor, mode: WriteMode = IN_PLACE) -> Written:
    check_write(target, incoming, mode)
    return apply_write(target, incoming, mode)


def refused(target: torch.Tensor, incoming: torch.Tensor, mode: WriteMode, match: str) -> None:
    with pytest.raises(WriteRefused, match=match) as caught:
        check_write(target, incoming, mode)
    assert "Nothing was written." in str(caught.value)


@pytest.fixture(scope="module")
def world() -> Iterator[None]:
    """A default group of one rank, without a port."""
    import torch.distributed as dist

    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def _dtensor(local: torch.Tensor) -> torch.Tensor:
    from torch.distributed.tensor import DTensor, Shard, init_device_mesh

    result: torch.Tensor = DTensor.from_local(local, init_device_mesh("cpu", (1,)), [Shard(0)])
    return result


@by_mode
def test_a_dtensor_takes_a_local_value(world: None, mode: WriteMode) -> None:
    """Its local shard is written (or a DTensor of the same mesh and placements returned), from a plain tensor."""
    from torch.distributed.tensor import DTensor

    local = torch.zeros(2, 3)
    target = _dtensor(local)
    value = write(target, torch.ones(2, 3), mode).value
    assert isinstance(value, DTensor) and isinstance(target, DTensor)
    assert (value.device_mesh, value.placements, value.shape) == (target.device_mesh, target.placements, target.shape)
    assert value.to_local().eq(1).all()
    assert local.eq(1).all() == (mode.write == "in_place")


def test_a_dtensor_may_come_in(world: None) -> None:
    """An incoming DTensor (a transform's result) is its local shard."""
    target = torch.zeros(2, 3)
    write(target, _dtensor(torch.ones(2, 3)))
    assert target.eq(1).all()


@pytest.mark.parametrize(
    ("mode", "expected"),
    [(IN_PLACE, 3 * 10.0), (STRICT, 3 * 10.0), (RETURN, 3 * 10.0), (CUT, None), (RETURN_CUT, None)],
    ids=lambda x: f"{x.write}-{x.gradient}" if isinstance(x, WriteMode) else "",
)
def test_gradients_through_a_dtensor(world: None, mode: WriteMode, expected: float | None) -> None:
    """As for a plain tensor: d(w y^2) at the grafted y=5 is 10, times 3 for the producer; or none with cut."""
    x = torch.ones(2, requires_grad=True)
    weight = torch.ones(2, requires_grad=True)
    y = write(3 * _dtensor(x), torch.full((2,), 5.0), mode).value
    (_dtensor(weight) * y * y).sum().backward()
    assert weight.grad is not None and weight.grad.tolist() == [25, 25]
    assert (None if x.grad is None else x.grad.tolist()) == (None if expected is None else [expected, expected])


def test_strict_on_a_dtensor_makes_autograd_name_the_operation(world: None) -> None:
    """exp of a DTensor saved the DTensor: its version is raised too."""
    y = _dtensor(torch.ones(2, requires_grad=True)).exp()
    write(y, torch.zeros(2), STRICT)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


def test_cut_in_place_on_a_view_of_a_dtensor_is_refused(world: None) -> None:
    """torch can't detach it in place, and `return` can."""
    y = (3 * _dtensor(torch.ones(2, 2, requires_grad=True))).t()
    refused(y, torch.zeros(2, 2), CUT, "view of a DTensor")
    assert not write(y, torch.zeros(2, 2), RETURN_CUT).value.requires_grad


def _gathered(x: torch.Tensor) -> torch.Tensor:
    import torch.distributed as dist
    import torch.distributed._functional_collectives as collectives

    gather = collectives.all_gather_tensor_autograd if x.requires_grad else collectives.all_gather_tensor
    result: torch.Tensor = gather(x, 0, dist.group.WORLD)
    assert isinstance(result, collectives.AsyncCollectiveTensor)
    return result


@pytest.mark.filterwarnings("ignore")
@by_mode
def test_a_pending_collective_is_waited_for_and_written(world: None, mode: WriteMode) -> None:
    """Its result takes the value (in_place), or a plain tensor with the value comes back (return)."""
    target = _gathered(torch.zeros(3))
    value = write(target, torch.ones(3), mode).value
    assert target.completed  # type: ignore[attr-defined]
    assert value.eq(1).all()
    assert (target + 0).eq(1).all() == (mode.write == "in_place")


@pytest.mark.filterwarnings("ignore")
def test_a_pending_collective_is_not_waited_for_by_the_check(world: None) -> None:
    """check_write looks at shape and memory only."""
    target = _gathered(torch.zeros(3))
    check_write(target, torch.ones(3), IN_PLACE)
    assert not target.completed  # type: ignore[attr-defined]
    assert (target + 0).tolist() == [0, 0, 0]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("mode", [IN_PLACE, STRICT, RETURN], ids=lambda m: f"{m.write}-{m.gradient}")
def test_gradients_through_a_pending_collective(world: None, mode: WriteMode) -> None:
    """The gradient at the grafted value reaches the collective's producer."""
    x = torch.ones(3, requires_grad=True)
    y = write(_gathered(x * 1), torch.full((3,), 5.0), mode).value
    (y * y).sum().backward()
    assert x.grad is not None and x.grad.tolist() == [10, 10, 10]


@pytest.mark.filterwarnings("ignore")
def test_cut_in_place_on_a_pending_collective_is_refused(world: None) -> None:
    """detach_ would act on the inner tensor alone; `return` cuts."""
    y = _gathered(torch.ones(3, requires_grad=True) * 1)
    refused(y, torch.zeros(3), CUT, "Use write=return")
    assert not write(y, torch.zeros(3), RETURN_CUT).value.requires_grad
