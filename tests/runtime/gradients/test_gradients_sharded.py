"""Gradients of parameters where a framework moves them: sharded by FSDP2, or added up in Megatron's `main_grad`."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from jobs import Jobs, Rank, succeed
from torch import nn

import grafter

# The gradient of the loss, too, where that is a point.
GRADIENTS = "phase == 'backward' and name in ('weight', 'bias', 'loss')"


def make_model(seed: int) -> nn.Sequential:
    """A size of 5 is not shared out evenly."""
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 2))


def inputs() -> torch.Tensor:
    return torch.linspace(-1, 1, 12).view(4, 3)


def train(rank: Rank) -> dict[str, Any]:
    """The mean over a batch that the ranks of a job share; one rank has it all, and no framework.

    Returns each parameter's gradient, whole, and its class.
    """
    directory, framework, same_weights, dumps_loss = rank.arguments
    model: nn.Module = make_model(1 if same_weights or rank.is_baseline else 2)
    if rank.world_size > 1:
        model = distribute(model, framework, rank, directory)
    grafter.attach(model, inputs=False)
    loss = model(inputs().chunk(rank.world_size)[rank.role_rank]).square().mean().view(1)
    if dumps_loss:
        # Each rank has a loss of its own; what is compared is its gradient, which is 1.
        loss = grafter.dump(
            "loss", loss, dims="one # fsdp:replicated", axes={"fsdp": (rank.role_rank, rank.world_size)}
        )
    loss.backward()
    found = [whole(parameter.grad) for parameter in model.parameters()]
    kinds = {type(parameter.grad).__name__ for parameter in model.parameters()}
    if rank.world_size > 1:
        torch.distributed.destroy_process_group()
    return {"gradients": found, "kinds": kinds}


def distribute(model: nn.Module, framework: str, rank: Rank, directory: Path) -> nn.Module:
    import torch.distributed as dist
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    dist.init_process_group(
        "gloo", init_method=f"file://{directory}/{rank.role}", rank=rank.role_rank, world_size=rank.world_size
    )
    if framework == "ddp":
        return nn.parallel.DistributedDataParallel(model)
    mesh = init_device_mesh("cpu", (rank.world_size,))
    # The last layer is reduced within the backward pass. The first is left to the root's group, which FSDP2 reduces at
    # the end, by a callback of its own, since no gradient goes on from there.
    fully_shard(model[2], mesh=mesh)  # type: ignore[index]
    return fully_shard(model, mesh=mesh)


def whole(gradient: Any) -> list[Any]:
    return (gradient.full_tensor() if hasattr(gradient, "full_tensor") else gradient).tolist()


@dataclass
class Setup:
    """Two jobs of so many ranks; one of several ranks is distributed by `framework`. `dumps_loss`: the loss is a point.

    Then a hook of ours runs before any of the framework's, and what we do at the end would come before what it does.
    """

    framework: str
    ranks: tuple[int, int]
    dumps_loss: bool

    def run(self, directory: Path, *, same_weights: bool, **filters: str) -> tuple[list[dict[str, Any]], Any]:
        directory.mkdir(exist_ok=True)
        with Jobs(directory, compiler=True, gradients="1", **filters) as jobs:
            for role, size in zip(("baseline", "target"), self.ranks, strict=True):
                jobs.start(role, size, train, directory, self.framework, same_weights, self.dumps_loss)
            return succeed(jobs.wait()), jobs.ledgers()

    @property
    def points(self) -> list[tuple[str, int | None]]:
        """By name, then layer, whatever the order in which they come."""
        loss: list[tuple[str, int | None]] = [("loss", None)] if self.dumps_loss else []
        return loss + [(name, layer) for name in ("bias", "weight") for layer in (0, 2)]


setups = pytest.mark.parametrize(
    "setup",
    [
        Setup("fsdp2", (1, 2), dumps_loss=False),
        Setup("fsdp2", (2, 1), dumps_loss=False),
        Setup("fsdp2", (2, 1), dumps_loss=True),
        Setup("fsdp2", (2, 2), dumps_loss=True),
        Setup("ddp", (1, 2), dumps_loss=False),
        Setup("ddp", (2, 2), dumps_loss=True),
    ],
    ids=lambda setup: f"{setup.framework}-{setup.ranks[0]}-{setup.ranks[1]}{'-loss' * setup.dumps_loss}",
)


@setups
def test_gradients_are_compared_after_their_reduction(tmp_path: Path, setup: Setup) -> None:
    """With the same weights, what each rank has is its part of the plain job's gradient of the whole batch."""
    results, ledgers = setup.run(tmp_path, same_weights=True, compare_filter=GRADIENTS)
    several = "DTensor" if setup.framework == "fsdp2" else "Tensor"
    assert [result["kinds"] for result in results] == [
        {several if size > 1 else "Tensor"} for size in setup.ranks for _ in range(size)
    ]
    for records in ledgers.values():
        assert [(r.name, r.tags.get("layer_id"), r.outcome) for r in records] == [
            (*p, "compared") for p in setup.points
        ]
    for record in (r for (role, _), records in ledgers.items() if role == "target" for r in records):
        assert record.difference.max_abs < 1e-6, record


@setups
def test_gradients_are_grafted_across_layouts(tmp_path: Path, setup: Setup) -> None:
    """With weights of its own, the target's gradients become the baseline's bit for bit, on every rank."""
    results, ledgers = setup.run(tmp_path / "grafted", same_weights=False, b2t_filter=GRADIENTS)
    alone, _ = setup.run(tmp_path / "alone", same_weights=False, compare_filter=GRADIENTS)
    found = [result["gradients"] for result in results]
    assert found == [alone[0]["gradients"]] * len(found)
    assert alone[-1]["gradients"] != alone[0]["gradients"]
    for (role, _), records in ledgers.items():
        assert {r.outcome for r in records} == {"sent" if role == "baseline" else "grafted"}
        assert sorted((r.name, r.tags.get("layer_id")) for r in records if r.name != "loss") == setup.points[-4:]


def train_with_main_grad(rank: Rank) -> list[Any]:
    """As Megatron's DDP: a hook on the accumulation adds each gradient to `main_grad` and drops `.grad`."""
    model = make_model(1 if rank.is_baseline else 2)
    moves_gradients = rank.role in rank.arguments
    accumulators = []
    for parameter in model.parameters() if moves_gradients else ():
        parameter.main_grad = torch.zeros_like(parameter, dtype=torch.float32)
        accumulators.append(parameter.expand_as(parameter).grad_fn.next_functions[0][0])
        accumulators[-1].register_hook(partial(move_gradient, parameter))
    grafter.attach(model, inputs=False)
    found = []
    for batch in inputs().chunk(2):
        model(batch).square().mean().backward()
        gradients = [p.main_grad if moves_gradients else p.grad for p in model.parameters()]
        found.append([gradient.tolist() for gradient in gradients])
    assert all((parameter.grad is None) == moves_gradients for parameter in model.parameters())
    return found


def move_gradient(parameter: Any, *_: Any) -> None:
    parameter.main_grad.add_(parameter.grad)
    parameter.grad = None


@pytest.mark.parametrize("roles", [("baseline",), ("target",), ("baseline", "target")], ids="-".join)
def test_main_grad_is_the_gradient_where_grad_is_moved_there(tmp_path: Path, roles: tuple[str, ...]) -> None:
    """Compared and grafted with what the other job has added up in `.grad` or `main_grad`, pass by pass."""
    filters = {"b2t_filter": f"{GRADIENTS} and layer_id == 0", "compare_filter": f"{GRADIENTS} and layer_id == 2"}
    with Jobs(tmp_path, gradients="1", **filters) as jobs:
        for role in ("baseline", "target"):
            jobs.start(role, 1, train_with_main_grad, *roles)
        baseline, target = succeed(jobs.wait())
        records = jobs.ledgers()["target", 0]
    for of_baseline, of_target in zip(baseline, target, strict=True):
        assert of_target[:2] == of_baseline[:2]
        assert of_target[2:] != of_baseline[2:]
    assert baseline[0] != baseline[1]
    expected = [
        (name, layer, "grafted" if layer == 0 else "compared") for name in ("bias", "weight") for layer in (0, 2)
    ]
    assert [(r.name, r.tags["layer_id"], r.outcome) for r in records] == expected * 2
    assert all(r.difference.max_abs > 1e-3 for r in records)


def train_accumulating(rank: Rank) -> Any:
    """Two steps. A job of several ranks takes each rank's part of the batch row by row, with a backward pass for each;
    returns the class of the gradients."""
    directory, framework = rank.arguments
    model: nn.Module = make_model(1)
    if rank.world_size > 1:
        model = distribute(model, framework, rank, directory)
    grafter.attach(model, inputs=False)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for _ in range(2):
        part = inputs().chunk(rank.world_size)[rank.role_rank]
        micro_batches = part.chunk(len(part)) if rank.world_size > 1 else (part,)
        for micro_batch in micro_batches:
            (model(micro_batch).square().mean() / len(micro_batches)).backward()
        kinds = {type(parameter.grad).__name__ for parameter in model.parameters()}
        optimizer.step()
        optimizer.zero_grad()
        grafter.step()
    if rank.world_size > 1:
        torch.distributed.destroy_process_group()
    return kinds


@pytest.mark.parametrize("framework", ["fsdp2", "ddp"])
def test_accumulated_gradients_are_taken_once_for_each_step_of_the_optimizer(tmp_path: Path, framework: str) -> None:
    """What has been added up over reduced backward passes is the gradient of the whole batch."""
    settings = {"gradients": "1", "weight_gradients": "optimizer_step", "compare_filter": GRADIENTS}
    with Jobs(tmp_path, compiler=True, **settings) as jobs:
        jobs.start("baseline", 1, train_accumulating, tmp_path, framework)
        jobs.start("target", 2, train_accumulating, tmp_path, framework)
        kinds = succeed(jobs.wait())
        ledgers = jobs.ledgers()
    assert kinds == [{"Tensor"}, *[{"DTensor" if framework == "fsdp2" else "Tensor"}] * 2]
    expected = [(step, name, layer) for step in (0, 1) for name in ("bias", "weight") for layer in (0, 2)]
    for records in ledgers.values():
        assert [(r.step, r.name, r.tags["layer_id"]) for r in records] == expected
        assert {r.outcome for r in records} == {"compared"}
        assert all(r.difference is None or r.difference.max_abs < 1e-6 for r in records)
