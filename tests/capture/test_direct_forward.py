"""Modules that are called by `.forward()`, which runs no hooks: they have no points, and are named."""

from __future__ import annotations

from pathlib import Path

import pytest
from attach_parts import Tower, attach, some_input
from pair_runs import run_program

PROGRAM = """
    import sys, torch
    torch.manual_seed(0)
    direct = sys.argv[1] == "direct"
    class Layer(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.up = torch.nn.Linear(8, 8)
        def forward(self, x):
            return torch.relu(self.up(x))
    class Model(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = torch.nn.ModuleList(Layer() for _ in range(3))
            self.unused = torch.nn.Linear(8, 8)
        def forward(self, x):
            for layer in self.layers:
                x = layer.forward(x) if direct else layer(x)
            return x
    model, x = Model(), torch.randn(2, 8)
    with torch.no_grad():
        model(x)
"""
OUTPUTS = ("--attach", "*", "--compare", "name.endswith('.out')")


def test_a_module_is_passed_by_if_its_parts_are_called_without_it() -> None:
    """Not one that nothing was called of, nor one that is being called."""
    model = Tower(2)
    attachment, _ = attach(model)
    seen: list[list[str]] = []
    model.layers[0].up.register_forward_hook(lambda *_: seen.append(attachment.bypassed()))
    model.layers[0].forward(some_input())
    assert attachment.bypassed() == ["root", "layers.0"]
    model(some_input())
    assert attachment.bypassed() == []
    assert seen == [["root", "layers.0"], []]


def test_where_inputs_are_no_points_nothing_is_said_of_calls_that_may_not_be_over() -> None:
    model = Tower(1)
    attachment, _ = attach(model, inputs=False)
    model.layers[0].forward(some_input())
    assert attachment.bypassed() == []


@pytest.mark.parametrize("target", ["direct", "call"])
def test_layers_called_by_forward_are_named(tmp_path: Path, target: str) -> None:
    """In the run's notes, and where the points of the two jobs part, in the error."""
    run = run_program(tmp_path, PROGRAM, "direct", target, *OUTPUTS)
    notes = "modules of the baseline that have no points though parts of them were called"
    assert run.output.count(notes) == 1
    assert ("modules of the target that have no points" in run.output) is (target == "direct")
    if target == "direct":
        assert run.code == 0
        assert len(run.rel) == 4
        assert "layers.0, layers.1, layers.2" in run.output
        assert "modules of the target with hooks that no call reached: unused" in run.output
    else:
        assert run.code == 1
        assert "These modules of the baseline have no points" in run.output
        assert "layers.0" in run.output.partition("These modules of the baseline")[2].partition("\n")[0]
