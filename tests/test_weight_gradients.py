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
