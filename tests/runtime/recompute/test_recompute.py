"""Recomputed regions: which point of the forward pass a point is when it fires again."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from jobs import Jobs, Rank, succeed
from recompute_parts import both_kinds, own_value, run_both
from torch.utils.checkpoint import checkpoint

import grafter

# Which forward point it is.


def first_call_is_inside(rank: Rank) -> Any:
    (use_reentrant,) = rank.arguments
    weight = torch.tensor(own_value(rank), requires_grad=True)

    def block(x: torch.Tensor) -> torch.Tensor:
        with grafter.context(part="first"):
            y = grafter.dump("h", x * 1, write="return")
        z = grafter.dump("h", y * y, write="return")
        return z * z

    out = checkpoint(block, weight * 1, use_reentrant=use_reentrant)
    again = checkpoint(block, out, use_reentrant=use_reentrant)
    grafter.step()
    again.backward()
    return float(again), float(weight.grad)


@both_kinds
def test_a_region_that_began_before_grafter_is_recomputed_as_well(tmp_path: Path, use_reentrant: bool) -> None:
    """The first call of grafter at all may be inside a region, and in a context that ends before the region."""
    found, ledger = run_both(tmp_path, first_call_is_inside, use_reentrant)
    # All grafts bring 1, so the derivative is 2 * 2 at each of the two blocks.
    assert found == (1.0, 16.0)
    assert [(record.occurrence, record.tags) for record in ledger] == [
        (0, {"part": "first"}),
        (0, {}),
        (1, {"part": "first"}),
        (1, {}),
    ]


def other_step_and_context(rank: Rank) -> Any:
    use_reentrant, in_thread = rank.arguments
    weight = torch.tensor(own_value(rank), requires_grad=True)
    results = []

    def block(x: torch.Tensor) -> torch.Tensor:
        y = grafter.dump("h", x * 1, write="return")
        return y * y

    losses = []
    for _ in range(2):
        x = weight * 1
        for layer in range(3):
            with grafter.context(layer_id=layer):
                x = checkpoint(block, x, use_reentrant=use_reentrant)
        losses.append(x)
        grafter.step()
    with grafter.context(layer_id=1):
        for loss in losses:
            if in_thread:
                thread = threading.Thread(target=loss.backward)
                thread.start()
                thread.join()
            else:
                loss.backward()
            results.append(float(weight.grad))
    return results


@both_kinds
@pytest.mark.parametrize("in_thread", [True, False], ids=["other thread", "same thread"])
def test_step_and_context_are_those_of_the_forward_pass(tmp_path: Path, use_reentrant: bool, in_thread: bool) -> None:
    """Filters see them, too: layer 1 at step 0 alone is grafted, in the recomputation as in the forward pass."""
    found, ledger = run_both(
        tmp_path, other_step_and_context, use_reentrant, in_thread, b2t_filter="layer_id == 1 and step == 0"
    )
    # Step 0: 2 * 3 (layer 0), 2 * 1 (grafted), 2 * 1. Step 1: 2 * 3, 2 * 9, 2 * 81.
    assert found == [24.0, 24.0 + 6 * 18 * 162]
    assert [(record.step, record.tags, record.outcome) for record in ledger] == [(0, {"layer_id": 1}, "grafted")]


def backward_twice(rank: Rank) -> Any:
    use_reentrant, way = rank.arguments
    weight = torch.tensor(own_value(rank), requires_grad=True)

    def block(x: torch.Tensor) -> torch.Tensor:
        y = grafter.dump("h", x * 1, write="return")
        return y * y * y

    out = checkpoint(block, weight * 1, use_reentrant=use_reentrant)
    if way == "retain_graph":
        out.backward(retain_graph=True)
        first = float(weight.grad)
        out.backward()
        return first, float(weight.grad)
    (first_gradient,) = torch.autograd.grad(out, weight, create_graph=True)
    (second_gradient,) = torch.autograd.grad(first_gradient, weight)
    return float(first_gradient), float(second_gradient)


@pytest.mark.parametrize(
    ("use_reentrant", "way", "expected"),
    [(True, "retain_graph", (3.0, 6.0)), (False, "retain_graph", (3.0, 6.0)), (False, "create_graph", (3.0, 6.0))],
)
def test_a_region_may_be_recomputed_twice(
    tmp_path: Path, use_reentrant: bool, way: str, expected: tuple[float, float]
) -> None:
    """With retain_graph, and for the gradient of a gradient (y^3 at the grafted 1: 3, then 6)."""
    found, ledger = run_both(tmp_path, backward_twice, use_reentrant, way)
    assert found == expected
    assert len(ledger) == 1


def points_around(rank: Rank) -> Any:
    (use_reentrant,) = rank.arguments
    value = own_value(rank)
    weight = torch.tensor(value, requires_grad=True)
    calls = []

    def make(y: torch.Tensor) -> dict[str, Any]:
        calls.append(1)
        return {"double": y * 2, "parts": [y * 3, "text"]}

    def block(x: torch.Tensor) -> torch.Tensor:
        if use_reentrant:
            grafter.dump("input", x, gradient="cut")
        else:
            # torch does not recompute from an input that was detached in place.
            x = grafter.dump("input", x, gradient="cut", write="return")
        compared = grafter.dump("compared", x * weight)
        several = grafter.dump("several", lambda: make(compared), write="return")
        return several["double"] * several["parts"][0]

    x = grafter.dump("before", weight * 1, write="return")
    out = checkpoint(block, x, use_reentrant=use_reentrant)
    out = grafter.dump("after", out * 1, write="return")
    out.backward()
    return float(out), float(weight.grad), len(calls)


@both_kinds
def test_points_of_all_kinds_inside_and_outside_of_a_region(tmp_path: Path, use_reentrant: bool) -> None:
    """A cut of the region's own input, a comparison, a function that gives a pytree; one record for each."""
    filters = {"b2t_filter": "name != 'compared'", "compare_filter": "name == 'compared'"}
    with Jobs(tmp_path, compiler=True, **filters) as jobs:
        for role in ("baseline", "target"):
            jobs.start(role, 1, points_around, use_reentrant)
        baseline, target = succeed(jobs.wait())
        ledgers = jobs.ledgers()
    # The baseline: 6 (x w)^2 with x = w: its gradient is 24. The target's x is cut off and 1, its own w is 3: twice
    # 6 * 1 (the grafted values 2 and 3 with the derivatives 3 and 2) at compared = x w.
    assert baseline == (6.0, 24.0, 2)
    assert target == (6.0, 12.0, 2)
    assert [(record.name, record.outcome) for record in ledgers["target", 0]] == [
        ("before", "grafted"),
        ("input", "grafted"),
        ("compared", "compared"),
        ("several", "grafted"),
        ("after", "grafted"),
    ]


def ends_in_a_cut(rank: Rank) -> Any:
    use_reentrant, write = rank.arguments
    before, weight = (torch.tensor(own_value(rank), requires_grad=True) for _ in range(2))

    def block(x: torch.Tensor) -> tuple[torch.Tensor, str]:
        return grafter.dump("h", x * weight, write=write, gradient="cut"), "text"

    out, _ = checkpoint(block, before * 1, use_reentrant=use_reentrant)
    (out * 2 + before).backward()
    return float(out), float(before.grad), float(weight.grad or 0)


@both_kinds
@pytest.mark.parametrize("write", ["in_place", "return"])
def test_a_region_whose_whole_output_is_cut_off(tmp_path: Path, use_reentrant: bool, write: str) -> None:
    """Reentrant checkpointing refuses a recomputation without gradient; grafter has it end there, as it should."""
    found, _ = run_both(tmp_path, ends_in_a_cut, use_reentrant, write)
    assert found == (1.0, 1.0, 0.0)


def gradient_points(rank: Rank) -> Any:
    use_reentrant = rank.arguments[0 if rank.is_baseline else 1]
    weight = torch.tensor(2.0, requires_grad=True)

    def block(x: torch.Tensor) -> torch.Tensor:
        return grafter.dump("h", x * 2) * 1

    x = weight * 1
    for _ in range(3):
        x = block(x) if use_reentrant is None else checkpoint(block, x, use_reentrant=use_reentrant)
    (x * own_value(rank)).backward()
    return float(weight.grad)


@pytest.mark.parametrize("kinds", [(None, True), (True, False), (False, None), (True, True)], ids=str)
def test_gradients_of_points_in_regions_are_met_once_and_in_the_order_of_the_program(
    tmp_path: Path, kinds: tuple[bool | None, bool | None]
) -> None:
    """However the two jobs checkpoint: one gradient for each firing, numbered as in the forward pass."""
    found, ledger = run_both(tmp_path, gradient_points, *kinds, b2t_filter="phase == 'backward'", gradients="1")
    assert found == 8.0
    assert [(record.phase, record.occurrence, record.outcome) for record in ledger] == [
        ("backward", number, "grafted") for number in (2, 1, 0)
    ]
    # Each is 3 times the baseline's where it is met first; what is grafted there goes on.
    assert [record.difference.max_abs for record in ledger] == [2.0, 0.0, 0.0]


# Random states and saved tensors.


def with_dropout(rank: Rank) -> Any:
    run_checkpointed, use_reentrant, hooks = rank.arguments
    torch.manual_seed(7)
    weight = torch.full((64,), own_value(rank), requires_grad=True)

    def block(x: torch.Tensor) -> torch.Tensor:
        y = torch.nn.functional.dropout(x * 2, 0.5)
        y = grafter.dump("h", y, transform=noisy, write="return")
        return torch.nn.functional.dropout(y * y, 0.5)

    def train() -> Any:
        out = weight * 1
        for _ in range(2):
            out = checkpoint(block, out, use_reentrant=use_reentrant) if run_checkpointed else block(out)
        out.sum().backward()
        return weight.grad.tolist(), float(torch.rand(()))

    if not hooks:
        return train()
    with torch.autograd.graph.save_on_cpu():
        return train()


def noisy(graft_input: grafter.GraftTransformInput) -> torch.Tensor:
    return graft_input.received_list[0] + torch.rand_like(graft_input.target)


@both_kinds
@pytest.mark.parametrize("hooks", [False, True], ids=["", "save_on_cpu"])
def test_dropout_around_a_graft_is_the_same_in_the_recomputation(
    tmp_path: Path, use_reentrant: bool, hooks: bool
) -> None:
    """A transform that draws random numbers shifts nothing, and saved-tensor hooks of the program's stay in force."""
    with_it, _ = run_both(tmp_path / "with", with_dropout, True, use_reentrant, hooks)
    without, _ = run_both(tmp_path / "without", with_dropout, False, use_reentrant, hooks)
    assert with_it == without
    assert any(with_it[0]) and not all(with_it[0])


# What `in_place` means in a region, as docs/write-modes.md says.


def cut_its_input_in_place(rank: Rank) -> Any:
    weight = torch.tensor(own_value(rank), requires_grad=True)

    def block(x: torch.Tensor) -> torch.Tensor:
        grafter.dump("h", x, gradient="cut")
        return x * x * weight

    checkpoint(block, weight * 1, use_reentrant=False).backward()


def test_a_cut_in_place_of_a_regions_input_is_torchs_error_without_reentrance(tmp_path: Path) -> None:
    with Jobs(tmp_path, compiler=True, b2t_filter="True") as jobs:
        for role in ("baseline", "target"):
            jobs.start(role, 1, cut_its_input_in_place)
        baseline, target = jobs.wait()
    assert baseline.error_kind is None
    assert target.error_kind == "RuntimeError" and "detached in-place" in target.error


def saves_its_output_last(rank: Rank) -> Any:
    (is_checkpointed,) = rank.arguments
    x = torch.tensor(own_value(rank), requires_grad=True)

    def block(x: torch.Tensor) -> torch.Tensor:
        y = x.exp()
        grafter.dump("h", y)
        return y + 1

    out = checkpoint(block, x, use_reentrant=False) if is_checkpointed else block(x)
    out.backward()
    return round(float(x.grad), 3)


@pytest.mark.parametrize(("is_checkpointed", "expected"), [(False, 2.718), (True, 20.086)])
def test_an_early_end_spares_what_the_last_operation_saved(
    tmp_path: Path, is_checkpointed: bool, expected: float
) -> None:
    """exp saved its output last: e^3, its own, where the plain program differentiates with the grafted e^1."""
    found, _ = run_both(tmp_path, saves_its_output_last, is_checkpointed)
    assert found == expected
