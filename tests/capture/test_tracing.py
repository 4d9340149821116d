"""Models that are traced, exported or scripted while they have hooks: as without grafter."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from attach_parts import Tower, attach, some_input
from pair_runs import run_program

from grafter.capture.passes import ForwardPasses

# What is made of the model computes what it does, and the model has its points as before.
PROGRAM = """
    import sys, torch
    torch.manual_seed(0)
    class Layer(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.up = torch.nn.Linear(8, 8)
        def forward(self, x):
            return torch.relu(self.up(x))
    class Model(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = torch.nn.ModuleList(Layer() for _ in range(2))
        def forward(self, x):
            for layer in self.layers:
                x = layer(x)
            return x
    model, x = Model().eval(), torch.randn(2, 8)
    with torch.no_grad():
        expected = model(x)
        for way in sys.argv[1].split(","):
            if way == "trace":
                made = torch.jit.trace(model, x, check_trace=False)
            elif way == "script":
                made = torch.jit.script(model)
            elif way == "fx":
                made = torch.fx.symbolic_trace(model)
            elif way in ("export", "strict"):
                made = torch.export.export(model, (x,), strict=way == "strict").graph_module
                assert "grafter" not in str(made.graph)
                continue
            elif way == "make_fx":
                from torch.fx.experimental.proxy_tensor import make_fx
                made = make_fx(model)(x)
                assert "grafter" not in str(made.graph) and len(made.graph.nodes) < 20, made.graph
            if way not in ("fx", "make_fx"):
                assert torch.equal(made(x), expected)
        assert torch.equal(model(x), expected)
    print("made", way)
"""


def test_a_model_with_hooks_is_traced_exported_and_scripted_as_without_grafter(tmp_path: Path) -> None:
    """Its points before and after are compared; calls that make a program of it have none and count no step."""
    ways = "strict,trace,make_fx,export,script,fx"
    options = ("--attach", "*", "--compare", "name.endswith('.out')")
    run = run_program(tmp_path, PROGRAM, ways, ways, *options)
    assert run.code == 0, run.output
    assert run.output.count("made fx") == 2
    assert run.output.count("a model is being traced") == 2
    assert len(run.rel) == 2 * 5
    assert {point.split(" ")[0] for point in run.rel} == {"0", "1"}
    assert set(run.rel.values()) == {0.0}


def test_a_scripted_model_leaves_the_hooks_of_the_one_that_it_was_made_of() -> None:
    """Of parts that are hooked inside of others that are not, too."""
    model = torch.nn.Sequential(torch.nn.Sequential(torch.nn.Linear(4, 4)), torch.nn.Linear(4, 2))
    attachment, recorder = attach(model, "0.0")
    inside = model[0][0]
    scripted = torch.jit.script(model)
    assert model[0][0] is inside
    assert torch.equal(scripted(some_input()), model(some_input()))
    assert len(recorder.names) == 2
    attachment.detach()
    # torch leaves something of its own in what it has scripted.
    assert not any("grafter" in repr(value) for module in model.modules() for value in module.__dict__.values())


def test_a_script_that_a_module_prepares_itself_for_is_prepared_from_one_without_hooks() -> None:
    class Prepared(torch.nn.Linear):
        def __prepare_scriptable__(self) -> Any:
            plain = torch.nn.Linear(4, 4)
            plain.weight, plain.bias = self.weight, self.bias
            return plain

    model = torch.nn.Sequential(Prepared(4, 4))
    attach(model)
    assert torch.equal(torch.jit.script(model)(some_input()), model(some_input()))


@pytest.mark.parametrize("way", ["copy", "script"])
def test_a_model_whose_calls_are_counted_is_copied_and_scripted_without_the_count(way: str) -> None:
    model, passes = torch.nn.Sequential(torch.nn.Linear(4, 4)), ForwardPasses(0)
    attach(model, "0")
    passes.wrap(model)
    made = copy.deepcopy(model) if way == "copy" else torch.jit.script(model)
    assert torch.equal(made(some_input()), model(some_input()))
    assert passes.begun == 1


def test_tracing_counts_no_pass() -> None:
    model, passes = Tower(1), ForwardPasses(0)
    passes.wrap(model)
    torch.jit.trace(model, some_input(), check_trace=False)
    assert passes.begun == 0
