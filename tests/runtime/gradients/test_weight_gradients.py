"""Gradients of weights when the optimizer steps, for programs that accumulate them over several backward passes."""

from __future__ import annotations

from pathlib import Path

import pytest
from pair_runs import PairRun, run_program

# One batch of 4 rows against as many batches of one; "wrong" divides each by its own count.
PROGRAM = """
    import sys, torch, torch.nn.functional as F
    torch.manual_seed(0)
    mode, optimizers, steps = sys.argv[1].split(",")
    from torch.nn import Embedding, Linear, Sequential, Tanh
    model = Sequential(Embedding(20, 8), Linear(8, 8), Tanh(), Linear(8, 20))
    model.double()
    model[1].bias.requires_grad_(False)
    parameters = [p for p in model.parameters() if p.requires_grad]
    if optimizers == "one":
        steppers = [torch.optim.SGD(parameters, lr=0.1)]
    elif optimizers == "two":
        steppers = [torch.optim.SGD(parameters[::2], lr=0.1), torch.optim.SGD(parameters[1::2], lr=0.1)]
    elif optimizers == "masters":
        masters = [p.detach().clone() for p in parameters]
        steppers = [torch.optim.SGD(masters, lr=0.1)]
    else:
        steppers = []
    for step in range(int(steps)):
        x, y = torch.randint(0, 20, (4, 6)), torch.randint(0, 20, (4, 6))
        y[1, 2:] = y[3, 1:] = -100
        count = (y != -100).sum()
        rows = [slice(0, 4)] if mode == "full" else [slice(i, i + 1) for i in range(4)]
        for part in rows:
            loss = F.cross_entropy(model(x[part]).flatten(0, 1), y[part].flatten(), reduction="sum")
            (loss / ((y[part] != -100).sum() * 4 if mode == "wrong" else count)).backward()
        torch.nn.utils.clip_grad_norm_(parameters, 0.1)
        if optimizers == "masters":
            for master, p in zip(masters, parameters):
                master.grad = p.grad.clone()
        for stepper in steppers:
            stepper.step()
        if optimizers == "masters":
            for master, p in zip(masters, parameters):
                p.data.copy_(master)
        model.zero_grad()
"""


def run(directory: Path, baseline: str, target: str, *options: str) -> PairRun:
    gradients = "phase == 'backward' and name.endswith(('weight', 'bias'))"
    at_step = ("--set", "weight_gradients=optimizer_step")
    return run_program(
        directory, PROGRAM, baseline, target, "--attach", "*", "--set", "gradients=1", "--compare", gradients,
        *(options or at_step),
    )  # fmt: skip


@pytest.mark.parametrize("other", ["parts,one,2", "parts,two,2", "full,masters,2"])
def test_micro_batches_have_the_gradients_of_the_whole_batch(tmp_path: Path, other: str) -> None:
    """Once for each step and weight that has a gradient, whatever optimizers there are, and as they were clipped."""
    done = run(tmp_path, "full,one,2", other)
    assert done.code == 0, done.output
    assert len(done.rel) == 2 * 4
    assert {point.split(" ")[0] for point in done.rel} == {"0", "1"}
    assert max(done.rel.values()) < 1e-14


def test_micro_batches_that_are_weighted_wrongly_differ(tmp_path: Path) -> None:
    done = run(tmp_path, "full,one,1", "wrong,one,1")
    assert min(done.rel.values()) > 1e-3


def test_without_the_setting_each_backward_pass_is_a_point_and_the_error_suggests_it(tmp_path: Path) -> None:
    done = run(tmp_path, "full,one,2", "parts,one,2", "--set", "weight_gradients=backward")
    assert done.code == 1
    assert "--set weight_gradients=optimizer_step" in done.output


def test_gradients_that_no_optimizer_used_are_told(tmp_path: Path) -> None:
    """A warning counts and names them; the run, in which nothing was compared, fails."""
    done = run(tmp_path, "full,none,2", "full,none,2")
    assert done.code == 1
    assert "4 gradients of weights (" in done.output
    assert "none has stepped since they came" in done.output


# Each weight has an optimizer, which steps within the backward pass; "own" is none of torch's.
STEPS_WITHIN = """
    import sys, torch, grafter
    torch.manual_seed(0)
    when = sys.argv[1]
    model = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.Linear(4, 2))
    optimizers = {p: torch.optim.SGD([p], lr=0.1) for p in model.parameters()}
    def use(parameter):
        if when != "own":
            optimizers[parameter].step()
        parameter.grad = None
    def register():
        for p in model.parameters():
            p.register_post_accumulate_grad_hook(use)
    if when in ("before", "own"):
        register()
    grafter.attach(model)
    if when == "after":
        register()
    for _ in range(2):
        model(torch.randn(3, 4)).sum().backward()
        if when == "end":
            for optimizer in optimizers.values():
                optimizer.step()
                optimizer.zero_grad()
        grafter.step()
"""
WEIGHTS = "phase == 'backward' and name.endswith(('weight', 'bias'))"


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("word", ["backward", "optimizer_step"])
def test_gradients_that_an_optimizer_uses_within_the_backward_pass_are_points(
    tmp_path: Path, when: str, word: str
) -> None:
    """Whether the program's hook came before grafter's or after; by default, against a job that steps at the end."""
    other = "end" if word == "backward" else when
    options = ("--set", "gradients=1", "--set", f"weight_gradients={word}", "--compare", WEIGHTS)
    done = run_program(tmp_path, STEPS_WITHIN, when, other, *options)
    assert done.code == 0, done.output
    assert len(done.rel) == 2 * 4, done.output
    assert set(done.rel.values()) == {0.0}


def test_gradients_that_are_cleared_within_the_backward_pass_are_counted_and_told(tmp_path: Path) -> None:
    """By a warning, and by a note on the run, with their names."""
    filters = ("--compare", f"{WEIGHTS} or name == 'root.out'")
    done = run_program(tmp_path, STEPS_WITHIN, "own", "own", "--set", "gradients=1", *filters)
    assert "8 gradients of weights (" in done.output
    assert "were gone when they were to be taken" in done.output
    assert "gradients of weights of target 0 that came and were gone before they could be points: " in done.output


def test_a_graft_of_a_gradient_that_was_used_already_is_refused(tmp_path: Path) -> None:
    """It would change nothing, and look as if it did."""
    done = run_program(tmp_path, STEPS_WITHIN, "end", "after", "--set", "gradients=1", "--b2t", WEIGHTS)
    assert done.code == 1
    assert "an optimizer has used it within the backward pass already" in done.output
