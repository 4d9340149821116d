"""Warm-up: first forward passes of a job that are left out."""

from __future__ import annotations

from pathlib import Path

import torch
from attach_parts import Tower, some_input
from pair_runs import run_program

from grafter.capture.passes import ForwardPasses

PROGRAM = """
    import sys, torch
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.Tanh(), torch.nn.Linear(8, 8))
    x = torch.randn(4, 8)
    with torch.no_grad():
        for _ in range(int(sys.argv[1])):
            model(torch.zeros(4, 8))
        model(x)
"""
OUTPUTS = ("--attach", "*", "--compare", "name.endswith('.out')")
# It attaches and counts by itself, and has a point outside of its model, and gradients.
ATTACHING = """
    import sys, torch, grafter
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.Tanh(), torch.nn.Linear(8, 8))
    grafter.attach(model)
    batches = torch.randn(2, 4, 8)
    for batch in [torch.zeros(4, 8)] * int(sys.argv[1]) + list(batches):
        loss = model(batch).square().sum()
        grafter.dump("loss", loss)
        loss.backward()
        model.zero_grad()
        grafter.step()
"""


def test_outermost_passes_count_and_the_first_ones_warm_up() -> None:
    """Calls of a model within another one's, and those that an error ended, count as one each."""
    outer, inner = Tower(1), Tower(1)
    passes = ForwardPasses(2)
    warm: list[int] = []

    def call_inner(*_: object) -> None:
        inner(some_input())

    passes.on_warm = lambda: warm.append(passes.begun)
    passes.wrap(outer)
    passes.wrap(inner)
    outer.layers[0].up.register_forward_hook(call_inner)
    outer(some_input())
    assert passes.is_warming_up
    try:
        inner(torch.ones(1))
    except RuntimeError:
        assert passes.begun == 2
    assert passes.is_warming_up
    inner(some_input())
    assert not passes.is_warming_up
    assert warm == [3]
    passes.stop()
    assert "forward" not in outer.__dict__


def test_passes_that_only_one_job_makes_first_are_left_out_on_request(tmp_path: Path) -> None:
    """Without the setting the error suggests it; with it all points of the real pass are compared, in step 0."""
    part = run_program(tmp_path, PROGRAM, "0", "2", *OUTPUTS)
    assert part.code == 1
    assert "--set target_warm_up=N (GRAFTER_TARGET_WARM_UP)" in part.output
    run = run_program(tmp_path, PROGRAM, "0", "2", *OUTPUTS, "--set", "target_warm_up=2")
    assert run.code == 0, run.output
    assert len(run.rel) == 4
    assert all(point.startswith("0 ") for point in run.rel)
    assert set(run.rel.values()) == {0.0}


def test_points_and_steps_of_the_program_are_left_out_with_the_pass(tmp_path: Path) -> None:
    """Those of `dump`, of gradients, and `grafter.step()`."""
    settings = ("--set", "gradients=1", "--set", "baseline_warm_up=1", "--compare", "True")
    run = run_program(tmp_path, ATTACHING, "1", "0", *settings)
    assert run.code == 0, run.output
    assert set(run.rel.values()) == {0.0}
    assert {point.split(" ")[0] for point in run.rel} == {"0", "1"}
    assert sum("loss" in point for point in run.rel) >= 2


def test_a_rank_that_is_never_warm_says_so(tmp_path: Path) -> None:
    run = run_program(tmp_path, PROGRAM, "2", "0", *OUTPUTS, "--set", "baseline_warm_up=5", "--set", "target_warm_up=5")
    assert run.code == 1
    assert "GRAFTER_BASELINE_WARM_UP=5 leaves out as many forward passes" in run.output
    assert "were called 3 times" in run.output
