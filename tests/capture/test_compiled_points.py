"""Points inside a compiled region: in one graph, in program order, neither removed nor repeated."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from attach_parts import Tower, some_input
from jobs import Rank, succeed, two_jobs

import grafter

BACKENDS = ["eager", "aot_eager", "inductor"]


def forward(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    h = x @ weight
    # What a comparison returns need not be used.
    grafter.dump("h", h, layer_id=0)
    for i in range(2):
        h = grafter.dump("r", torch.relu(h) * 2, layer_id=i)
        h = grafter.dump("never", h)
    return h.sum()


def run_compiled(rank: Rank) -> Any:
    (backend,) = rank.arguments
    compiled = torch.compile(forward, backend=backend, fullgraph=True)
    x = torch.ones(3, 4)
    results = []
    for step in range(2):
        weight = torch.full((4, 5), 1.0 + step + (0.5 if rank.is_baseline else 0.0), requires_grad=True)
        out = compiled(x, weight)
        out.backward()
        assert weight.grad is not None
        results.append((float(out.detach()), float(weight.grad.sum())))
        grafter.step()
    return results


@pytest.mark.parametrize("backend", BACKENDS)
def test_comparisons_run_in_one_graph_and_in_program_order(tmp_path: Path, backend: str) -> None:
    settings = {"compare_filter": "name != 'never'", "timeout": 90}
    with Jobs_with(tmp_path, run_compiled, backend, **settings) as jobs:
        baseline, target = succeed(jobs.wait())
        ledgers = jobs.ledgers()
    assert target == [(240.0, 240.0), (480.0, 240.0)]
    assert baseline == [(360.0, 240.0), (600.0, 240.0)]
    expected = [(n, t, s) for s in range(2) for n, t in (("h", 0), ("r", 0), ("r", 1))]
    for records in ledgers.values():
        assert [(r.name, r.tags["layer_id"], r.step) for r in records] == expected
        assert {r.outcome for r in records} == {"compared"}
    assert "test_compiled_points.py:" in ledgers["target", 0][0].call_site
    assert [r.difference.max_abs for r in ledgers["target", 0][:3] if r.difference] == [2.0, 4.0, 8.0]


def graft_compiled(rank: Rank) -> Any:
    (backend,) = rank.arguments

    def function(weight: torch.Tensor) -> torch.Tensor:
        y = grafter.dump("y", weight.exp() + (4 if rank.is_baseline else 0), write="return")
        return (2 * y * y).sum()

    weight = torch.zeros(3, requires_grad=True)
    out = torch.compile(function, backend=backend, fullgraph=True)(weight)
    out.backward()
    assert weight.grad is not None
    return float(out.detach()), weight.grad.tolist()


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_graft_that_returns_goes_on_in_the_graph_and_gradients_are_exact(tmp_path: Path, backend: str) -> None:
    """y is 5 for the consumer; exp differentiates at its own 0: 2 * 2 * 5 * exp(0) = 20."""
    with Jobs_with(tmp_path, graft_compiled, backend, b2t_filter="True", timeout=500) as jobs:
        baseline, target = succeed(jobs.wait())
    assert target == baseline == (150.0, [20.0] * 3)


def choose_by_step(rank: Rank) -> Any:
    """A filter on the step, and one on a tag of the context around the compiled code."""
    compiled = torch.compile(lambda x: grafter.dump("h", x * 2) + 1, backend="eager", fullgraph=True)
    for layer_id in range(2):
        for _ in range(2):
            with grafter.context(layer_id=layer_id):
                compiled(torch.ones(2))
            grafter.step()


def test_what_matches_is_asked_again_at_each_call(tmp_path: Path) -> None:
    filters = {"compare_filter": "layer_id == 1 and step >= 3"}
    with two_jobs(tmp_path, choose_by_step, choose_by_step, compiler=True, **filters) as jobs:
        succeed(jobs.wait())
        records = jobs.ledgers()["target", 0]
    assert [(r.step, r.tags) for r in records] == [(3, {"layer_id": 1})]


def checkpoint_inside(rank: Rank) -> Any:
    from torch.utils.checkpoint import checkpoint

    (backend,) = rank.arguments

    def function(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        result: torch.Tensor = checkpoint(forward, x, weight, use_reentrant=False)
        return result

    weight = torch.ones(4, 5, requires_grad=True)
    torch.compile(function, backend=backend, fullgraph=True)(torch.ones(3, 4), weight).backward()
    assert weight.grad is not None
    return float(weight.grad.sum())


@pytest.mark.parametrize("backend", ["aot_eager"])
def test_a_checkpointed_region_inside_does_not_repeat_a_point(tmp_path: Path, backend: str) -> None:
    with Jobs_with(tmp_path, checkpoint_inside, backend, compare_filter="True", timeout=500) as jobs:
        assert succeed(jobs.wait()) == [240.0, 240.0]
        records = jobs.ledgers()["target", 0]
    assert [(r.name, r.tags.get("layer_id")) for r in records] == [
        ("h", 0),
        ("r", 0),
        ("never", None),
        ("r", 1),
        ("never", None),
    ]


def graft_in_checkpoint(rank: Rank) -> Any:
    """The same grafts in a checkpointed region: as eager code; compiled, the region inside; a region around what is
    compiled. Two forward passes come before each backward pass. Gradients, and what the compiler was asked for."""
    from torch.utils.checkpoint import checkpoint

    (backend,) = rank.arguments
    own = 0.25 if rank.is_baseline else 0.5

    def region(w: torch.Tensor) -> torch.Tensor:
        y = grafter.dump("y", w.exp() * own, write="return")
        for _ in range(2):
            y = grafter.dump("z", y.sin() * y, write="return")
        return y * w

    def inside(w: torch.Tensor, reentrant: bool = False) -> torch.Tensor:
        result: torch.Tensor = checkpoint(region, w, use_reentrant=reentrant)
        return result.sum()

    compiled_region = torch.compile(region, backend=backend, fullgraph=True)
    functions = [
        lambda w: region(w).sum(),
        torch.compile(inside, backend=backend, fullgraph=True),
        torch.compile(lambda w: inside(w, True), backend=backend, fullgraph=True),
        lambda w: checkpoint(compiled_region, w, use_reentrant=False).sum(),
        lambda w: checkpoint(compiled_region, w, use_reentrant=True).sum(),
    ]
    gradients = []
    for function in functions:
        weight = torch.linspace(0.5, 1.5, 3).requires_grad_()
        (function(weight) + function(weight * (1 + own))).backward()
        assert weight.grad is not None
        gradients.append(weight.grad.tolist())
        grafter.step()
    return gradients


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_a_recomputed_region_gets_what_was_grafted_and_asks_for_nothing(tmp_path: Path, backend: str) -> None:
    """Gradients are those of eager code without a region, in either kind of region, inside and outside."""
    with Jobs_with(tmp_path, graft_in_checkpoint, backend, b2t_filter="True", timeout=500) as jobs:
        for gradients in succeed(jobs.wait()):
            for found in gradients[1:]:
                assert found == pytest.approx(gradients[0], rel=1e-5)
        records = jobs.ledgers()["target", 0]
    expected = [(n, s, o) for s in range(5) for o in range(2) for n in ("y", "z", "z")]
    assert [(r.name, r.step) for r in records] == [(n, s) for n, s, _ in expected]
    assert {r.outcome for r in records} == {"grafted"}


def gradients_in_checkpoint(rank: Rank) -> Any:
    """h = 2x, y = 3h; the baseline's loss weighs y by 10. The points and their gradients are in a region."""
    from torch.utils.checkpoint import checkpoint

    (backend,) = rank.arguments
    weight = 10.0 if rank.is_baseline else 1.0

    def region(x: torch.Tensor) -> torch.Tensor:
        h = grafter.dump("h", 2 * x, layer_id=1)
        return grafter.dump("y", (3 * h).sin().asin())

    compiled_region = torch.compile(region, backend=backend, fullgraph=True)
    functions = [
        torch.compile(lambda x: checkpoint(region, x, use_reentrant=False), backend=backend, fullgraph=True),
        lambda x: checkpoint(compiled_region, x, use_reentrant=False),
        lambda x: checkpoint(compiled_region, x, use_reentrant=True),
    ]
    results = []
    for function in functions:
        x = torch.full((4,), 0.1, requires_grad=True)
        (weight * function(x)).sum().backward()
        assert x.grad is not None
        results.append(x.grad.tolist())
        grafter.step()
    return results


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_gradients_of_points_in_a_recomputed_region_are_points(tmp_path: Path, backend: str) -> None:
    filters = {
        "b2t_filter": "phase == 'backward' and name == 'h'",
        "compare_filter": "phase == 'backward' and name == 'y'",
    }
    with Jobs_with(tmp_path, gradients_in_checkpoint, backend, gradients="1", timeout=500, **filters) as jobs:
        gradients = succeed(jobs.wait())
        assert gradients == [[pytest.approx([60.0] * 4)] * 3] * 2
        records = jobs.ledgers()["target", 0]
    assert [(r.name, r.phase, r.step, r.outcome) for r in records] == [
        (name, "backward", step, outcome)
        for step in range(3)
        for name, outcome in (("y", "compared"), ("h", "grafted"))
    ]


def Jobs_with(directory: Path, function: Any, argument: Any, **settings: Any) -> Any:
    from jobs import Jobs

    jobs = Jobs(directory, compiler=True, **settings)
    jobs.start("baseline", 1, function, argument)
    jobs.start("target", 1, function, argument)
    return jobs


def train_attached(rank: Rank) -> Any:
    """Two steps of one model with hooks: as eager code, then compiled whole; its layers are checkpointed."""
    from torch.utils.checkpoint import checkpoint

    model = Tower(2, seed=0 if rank.is_baseline else 1)
    attachment = grafter.attach(model, "layers.*", "head")
    assert attachment is not None

    def forward(x: torch.Tensor) -> torch.Tensor:
        for layer in model.layers:
            x, _ = checkpoint(layer, x, use_reentrant=False)
        result: torch.Tensor = model.head(x)
        return result

    found = []
    for function in (forward, torch.compile(forward, backend="aot_eager", fullgraph=True)):
        model.zero_grad()
        out = function(some_input())
        out.sum().backward()
        found.append(
            [out.detach(), *(parameter.grad.clone() for parameter in model.parameters() if parameter.grad is not None)]
        )
        grafter.step()
    eager, compiled = found
    return (
        len(eager),
        max(float((a - b).abs().max()) for a, b in zip(eager, compiled, strict=True)),
        len(attachment.never_fired()),
    )


def test_attached_models_train_compiled_as_they_do_in_eager_code(tmp_path: Path) -> None:
    """Values, gradients and the points that meet, forward, backward and of parameters, are the same in both steps."""
    filters = {
        "b2t_filter": "phase == 'forward' and name == 'layers.out.0'",
        "compare_filter": "phase == 'backward' or name.endswith('up.out')",
    }
    settings = {"compiler": True, "gradients": "1", "timeout": 60}
    with two_jobs(tmp_path, train_attached, train_attached, **settings, **filters) as jobs:
        for count, difference, unfired in succeed(jobs.wait()):
            assert count == 1 + len(list(Tower(2).parameters()))
            assert difference < 1e-5 and unfired == 0
        records = jobs.ledgers()["target", 0]
    eager, compiled = (
        sorted((r.name, r.phase, r.tags.get("layer_id", -1), r.outcome) for r in records if r.step == step)
        for step in range(2)
    )
    assert eager == compiled
    assert {(phase, outcome) for _, phase, _, outcome in eager} == {
        ("forward", "compared"),
        ("forward", "grafted"),
        ("backward", "compared"),
    }


def chain_compiled(rank: Rank) -> Any:
    """h = 2x, y = 3h; the baseline's loss weighs y by 10. Gradients cross in the compiled backward graph."""
    (backend,) = rank.arguments
    weight = 10.0 if rank.is_baseline else 1.0

    def function(x: torch.Tensor) -> torch.Tensor:
        h = grafter.dump("h", 2 * x, layer_id=1)
        return (weight * grafter.dump("y", 3 * h)).sum()

    compiled = torch.compile(function, backend=backend, fullgraph=True)
    results = []
    for _ in range(2):
        x = torch.ones(4, requires_grad=True)
        compiled(x).backward()
        assert x.grad is not None
        results.append(x.grad.tolist())
        grafter.step()
    return results


@pytest.mark.parametrize("backend", BACKENDS)
def test_gradients_are_points_in_the_compiled_backward_graph(tmp_path: Path, backend: str) -> None:
    """The target's gradient at h becomes the baseline's (30), so x gets 60, where it had 6."""
    filters = {
        "b2t_filter": "phase == 'backward' and name == 'h'",
        "compare_filter": "phase == 'backward' and name == 'y'",
    }
    with Jobs_with(tmp_path, chain_compiled, backend, gradients="1", timeout=500, **filters) as jobs:
        baseline, target = succeed(jobs.wait())
        records = jobs.ledgers()["target", 0]
    assert baseline == target == [[60.0] * 4] * 2
    assert [(r.name, r.phase, r.step, r.outcome) for r in records] == [
        (name, "backward", step, outcome)
        for step in range(2)
        for name, outcome in (("y", "compared"), ("h", "grafted"))
    ]
