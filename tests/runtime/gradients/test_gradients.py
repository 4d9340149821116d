"""Gradients as points: offered by senders, asked for by receivers in any order, handed on through the graph."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Any

import torch
from jobs import Jobs, Rank, succeed, two_jobs

import grafter
from grafter.analysis.run.run_summary import read_run_summary

BACKWARD = "phase == 'backward'"


def chain(rank: Rank) -> list[Any]:
    """y = 3 * h, h = 2 * x; the baseline's loss weighs y by 10, the target's by 1."""
    weight = 10.0 if rank.is_baseline else 1.0
    results = []
    for _ in range(2):
        x = torch.ones(4, requires_grad=True)
        h = grafter.dump("h", 2 * x, layer_id=1)
        y = grafter.dump("y", 3 * h)
        (weight * y).sum().backward()
        assert x.grad is not None
        results.append(x.grad.tolist())
        grafter.step()
    return results


def test_a_grafted_gradient_is_what_the_rest_of_the_graph_differentiates_with(tmp_path: Path) -> None:
    """The target's gradient at h becomes the baseline's (30), so x gets 60, where it had 6."""
    filters = {"b2t_filter": f"{BACKWARD} and name == 'h'", "compare_filter": f"{BACKWARD} and name == 'y'"}
    with two_jobs(tmp_path, chain, chain, gradients="1", **filters) as jobs:
        baseline, target = succeed(jobs.wait())
        ledgers = jobs.ledgers()
    assert baseline == [[60.0] * 4] * 2
    assert target == [[60.0] * 4] * 2
    records = ledgers["target", 0]
    assert [(r.name, r.phase, r.step, r.outcome, r.tags) for r in records] == [
        (name, "backward", step, outcome, tags)
        for step in range(2)
        for name, outcome, tags in (("y", "compared", {}), ("h", "grafted", {"layer_id": 1}))
    ]
    assert records[1].difference is not None
    assert records[1].difference.max_abs == 27.0
    assert [r.outcome for r in ledgers["baseline", 0]] == ["compared", "sent"] * 2


def test_without_the_setting_no_gradient_is_a_point(tmp_path: Path) -> None:
    with two_jobs(tmp_path, chain, chain, b2t_filter="name == 'h'") as jobs:
        _, target = succeed(jobs.wait())
        records = jobs.ledgers()["target", 0]
    assert target == [[6.0] * 4] * 2
    assert [r.phase for r in records] == ["forward"] * 2


def branches(rank: Rank) -> list[float]:
    """Two branches whose backward runs in another order on each side."""
    x = torch.ones(3, requires_grad=True)
    scale = 5.0 if rank.is_baseline else 1.0
    a = grafter.dump("a", 2 * x)
    b = grafter.dump("b", 3 * x)
    # Autograd goes back by sequence number: what was made last comes first.
    if rank.is_baseline:
        loss = (scale * a).sin().sum() + (scale * b).cos().sum()
    else:
        part = (scale * b).cos().sum()
        loss = (scale * a).sin().sum() + part
    loss.backward()
    assert x.grad is not None
    return x.grad.tolist()


def test_receivers_ask_in_their_own_order(tmp_path: Path) -> None:
    with two_jobs(tmp_path, branches, branches, gradients="1", b2t_filter=BACKWARD) as jobs:
        baseline, target = succeed(jobs.wait())
        ledgers = jobs.ledgers()
    assert target == baseline
    assert sorted(r.name for r in ledgers["target", 0]) == ["a", "b"]
    assert [r.outcome for r in ledgers["baseline", 0]] == ["sent", "sent"]


def one_side_unused(rank: Rank) -> list[Any]:
    """The gradient of `b` exists in one job alone."""
    with_b = rank.role == rank.arguments[0]
    results = []
    for _ in range(2):
        x = torch.ones(2, requires_grad=True)
        a = grafter.dump("a", 2 * x)
        b = grafter.dump("b", 3 * x)
        (a.sum() + (b.sum() if with_b else 0)).backward()
        assert x.grad is not None
        results.append(x.grad.tolist())
        grafter.step()
    return results


def test_a_gradient_that_one_job_has_not_got_is_skipped_on_both(tmp_path: Path) -> None:
    for number, role in enumerate(("baseline", "target")):
        directory = tmp_path / str(number)
        directory.mkdir()
        with Jobs(directory, gradients="1", b2t_filter=BACKWARD) as jobs:
            jobs.start("baseline", 1, one_side_unused, role)
            jobs.start("target", 1, one_side_unused, role)
            succeed(jobs.wait())
            ledgers = jobs.ledgers()
        for records in ledgers.values():
            outcomes = [(r.step, r.outcome) for r in records if r.name == "b"]
            assert outcomes == [(0, "skipped"), (1, "skipped")], (role, records)


def microbatches(rank: Rank) -> list[Any]:
    """Two forward passes, then their backward passes, on two ranks each."""
    scale = 10.0 if rank.is_baseline else 1.0
    inputs = [torch.ones(2, requires_grad=True) for _ in range(2)]
    losses = [(scale * (i + 1) * grafter.dump("h", 2 * x)).sum() for i, x in enumerate(inputs)]
    for loss in losses:
        loss.backward()
    grafter.step()
    return [x.grad.tolist() for x in inputs if x.grad is not None]


def test_several_forward_passes_before_their_backward_on_several_ranks(tmp_path: Path) -> None:
    """The count within the step is that of the forward pass."""
    with two_jobs(tmp_path, microbatches, microbatches, ranks=(2, 2), gradients="1", b2t_filter=BACKWARD) as jobs:
        results = succeed(jobs.wait())
        ledgers = jobs.ledgers()
    assert results == [[[20.0] * 2, [40.0] * 2]] * 4
    assert [r.occurrence for r in ledgers["target", 1]] == [0, 1]


def train_model(rank: Rank) -> list[list[float]]:
    """A model with hooks; both jobs have the same weights and other losses."""
    torch.manual_seed(3)
    model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Tanh(), torch.nn.Linear(4, 2))
    grafter.attach(model)
    x = torch.arange(6.0).view(2, 3)
    (model(x).sum() * (7.0 if rank.is_baseline else 1.0)).backward()
    grafter.step()
    return [p.grad.flatten().tolist() for p in model.parameters() if p.grad is not None]


def test_gradients_of_parameters_are_points_at_the_end_of_backward(tmp_path: Path) -> None:
    """In the order of their names, after accumulation, written in place."""
    filters = {
        "b2t_filter": f"{BACKWARD} and name.endswith('weight')",
        "compare_filter": f"{BACKWARD} and name.endswith('bias')",
    }
    with two_jobs(tmp_path, train_model, train_model, gradients="1", **filters) as jobs:
        baseline, target = succeed(jobs.wait())
        ledgers = jobs.ledgers()
    assert [target[0], target[2]] == [baseline[0], baseline[2]]
    torch.testing.assert_close([[7 * v for v in target[n]] for n in (1, 3)], [baseline[1], baseline[3]])
    assert [(r.name, r.tags, r.outcome) for r in ledgers["target", 0]] == [
        ("bias", {"layer_id": 0}, "compared"),
        ("bias", {"layer_id": 2}, "compared"),
        ("weight", {"layer_id": 0}, "grafted"),
        ("weight", {"layer_id": 2}, "grafted"),
    ]


def train_all(rank: Rank) -> list[list[float]]:
    torch.manual_seed(3 if rank.is_baseline else 4)
    model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Tanh(), torch.nn.Linear(4, 2))
    grafter.attach(model)
    x = torch.arange(6.0).view(2, 3)
    model(x).square().sum().backward()
    grafter.step()
    return [p.grad.flatten().tolist() for p in model.parameters() if p.grad is not None]


def test_everything_grafted_forward_and_backward_gives_the_other_jobs_gradients(tmp_path: Path) -> None:
    """Other weights; all activations and all gradients come from the baseline, so the parameters' gradients do."""
    with two_jobs(
        tmp_path,
        train_all,
        train_all,
        gradients="1",
        b2t_filter="not (name.endswith('weight') or name.endswith('bias'))",
    ) as jobs:
        baseline, target = succeed(jobs.wait())
        outcomes = {r.outcome for r in jobs.ledgers()["target", 0]}
    assert outcomes == {"grafted"}
    torch.testing.assert_close(target, baseline)


def fail_in_backward(rank: Rank) -> list[list[float]]:
    """The first step's backward pass raises, and the program goes on."""
    torch.manual_seed(3)
    model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Tanh(), torch.nn.Linear(4, 2))
    grafter.attach(model)
    x = torch.arange(6.0).view(2, 3).requires_grad_()

    def refuse(_: torch.Tensor) -> None:
        raise ValueError("the program's own")

    for step in range(2):
        if step == 0:
            x.register_hook(refuse)
        with contextlib.suppress(ValueError):
            (model(x if step == 0 else x.detach()).sum() * (7.0 if rank.is_baseline else 1.0)).backward()
        model.zero_grad() if step == 0 else None
        grafter.step()
    return [p.grad.flatten().tolist() for p in model.parameters() if p.grad is not None]


def test_a_backward_pass_that_fails_costs_its_own_step_alone(tmp_path: Path) -> None:
    filters = {"b2t_filter": f"{BACKWARD} and step == 1 and name.endswith('weight')"}
    with two_jobs(tmp_path, fail_in_backward, fail_in_backward, gradients="1", **filters) as jobs:
        baseline, target = succeed(jobs.wait())
        records = jobs.ledgers()["target", 0]
    assert [target[0], target[2]] == [baseline[0], baseline[2]]
    assert [(r.step, r.outcome) for r in records] == [(1, "grafted")] * 2


def step_before_backward(rank: Rank) -> list[float]:
    w = torch.ones(3, requires_grad=True)
    for _ in range(2):
        y = grafter.dump("y", w * 2)
        grafter.step()
        y.sum().backward()
    grafter.close()
    assert w.grad is not None
    return w.grad.tolist()


def test_a_gradient_that_comes_after_its_step_is_one_record_and_a_problem_of_the_run(tmp_path: Path) -> None:
    """Both jobs step first: each point is skipped once, the program's gradients stay, and the run counts what came."""
    with two_jobs(tmp_path, step_before_backward, step_before_backward, gradients="1", compare_filter=BACKWARD) as jobs:
        baseline, target = succeed(jobs.wait())
        ledgers = jobs.ledgers()
        summary = read_run_summary(next(path for path in tmp_path.rglob("target") if path.is_dir()).parent)
    assert baseline == target == [4.0] * 3
    for records in ledgers.values():
        assert [(r.step, r.outcome) for r in records] == [(0, "skipped"), (1, "skipped")], records
    assert any(
        "gradients came after their step had ended" in problem and "baseline 0: 2, target 0: 2" in problem
        for problem in summary.problems
    ), summary.problems
    assert not any("ranks disagree" in note for note in summary.notes), summary.notes
