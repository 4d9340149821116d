"""Off means off: without GRAFTER_ENABLE nothing is imported, opened, started or configured, and nothing changes."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def run_python(code: str, **environ: str) -> str:
    """The output of a fresh interpreter in which grafting is off."""
    clean = {name: value for name, value in os.environ.items() if not name.startswith(("GRAFTER_", "DUMPER_GRAFTER_"))}
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={**clean, "PYTHONPATH": str(ROOT), **environ},
        capture_output=True,
        text=True,
        timeout=250,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout + done.stderr


USE_EVERYTHING = """
import grafter

class Layer:
    layer_id = 3

    @grafter.context(lambda self: {"layer_id": self.layer_id})
    def forward(self, x):
        "Its docstring."
        return grafter.dump("h", x, kind="mlp")

    @classmethod
    @grafter.context(kind="class")
    def of_class(cls, x):
        return grafter.dump("h", x)

def never():
    raise AssertionError("a function that is not needed was called")

value = object()
assert grafter.dump("h", value) is value
assert grafter.dump("h", value, extras={"f": print}, ranks="nonsense", value=1) is value, "nothing is looked at"
assert grafter.dump("h", never) is never
assert Layer().forward(value) is value
assert Layer.of_class(value) is value
assert (Layer.forward.__name__, Layer.forward.__doc__) == ("forward", "Its docstring.")
with grafter.context(layer_id=3) as nothing:
    assert nothing is None
    assert grafter.dump("h", value) is value
try:
    with grafter.context(layer_id=3):
        raise KeyError
except KeyError:
    pass
grafter.step()
grafter.close()
grafter.step()
assert grafter.dump("h", value) is value
"""


def test_off_imports_and_opens_and_starts_nothing() -> None:
    """No torch, no pydantic, no file descriptor, no thread, no logger, no change of the environment."""
    print_state = """
import logging, os, sys, threading
before = (sorted(os.listdir("/proc/self/fd")), dict(os.environ), logging.getLogger().handlers[:])
modules = set(sys.modules)
%s
assert (sorted(os.listdir("/proc/self/fd")), dict(os.environ), logging.getLogger().handlers) == before
assert threading.enumerate() == [threading.main_thread()]
assert "grafter" not in logging.root.manager.loggerDict
new = set(sys.modules) - modules
print(*sorted({name.partition(".")[0] for name in new} & {"torch", "numpy", "pydantic", "ruamel", "rich", "typer"}))
print(*sorted(name for name in new if name.startswith("grafter")))
"""
    heavy, own = run_python(print_state % USE_EVERYTHING).split("\n")[:2]
    assert heavy == ""
    modules = [
        "_calls", "_process", "config", "config.switch", "core", "core.layout", "core.layout.axes", "core.points",
        "errors",
    ]  # fmt: skip
    assert own.split() == ["grafter", *(f"grafter.{name}" for name in modules)]


def test_off_adds_no_module_to_a_program_that_has_torch() -> None:
    """torch.distributed's parts that torch itself does not import stay unimported, and so does the compiler."""
    code = f"import sys, torch\nbefore = set(sys.modules)\n{USE_EVERYTHING}\nprint(*sorted(set(sys.modules) - before))"
    added = run_python(code).split()
    assert not [name for name in added if name.startswith(("torch", "pydantic"))]


@pytest.mark.parametrize("variable", ["GRAFTER_ENABLE", "DUMPER_GRAFTER_ENABLE"])
@pytest.mark.parametrize("text", ["0", "false", " ", "off"])
def test_words_for_off_are_off_whatever_else_is_set(variable: str, text: str) -> None:
    """A misspelt or illegal other variable is not even read."""
    environ = {variable: text, "GRAFTER_ROLE": "nonsense", "GRAFTER_B2T_FLITER": "("}
    assert run_python(USE_EVERYTHING, **environ) == ""


def test_nothing_is_said_at_exit() -> None:
    assert run_python("import grafter\ngrafter.dump('h', 1)") == ""


def test_a_setting_that_is_wrong_raises_at_the_first_call_and_names_its_variable() -> None:
    code = """
import grafter
for call in (lambda: grafter.dump("h", 1), grafter.step, lambda: grafter.context(a=1).__enter__()):
    try:
        call()
    except grafter.GrafterError as error:
        print(type(error).__name__, str(error).splitlines()[0])
"""
    assert "GRAFTER_ENABLE='maybe' is neither on nor off" in run_python(code, GRAFTER_ENABLE="maybe")
    lines = run_python(code, GRAFTER_ENABLE="1").splitlines()
    assert lines[0] == "ConfigError grafting is on, but something that it needs is missing:"


def test_a_graph_break_of_the_users_own_does_not_disturb_code_that_is_undecided() -> None:
    """The compiler traces such a function twice, and must meet the same code both times."""
    code = """
import torch, grafter

@grafter.context(a=1)
def function(x):
    y = grafter.dump("h", x * 2)
    torch._dynamo.graph_break()
    with grafter.context(b=2):
        return grafter.dump("z", y + 1)

compiled = torch.compile(lambda x: function(x) * 2, backend="eager")
for _ in range(2):
    assert compiled(torch.ones(2)).tolist() == [6.0, 6.0]
grafter.step()
assert compiled(torch.ones(2)).tolist() == [6.0, 6.0]
"""
    assert run_python(code) == ""


def test_code_compiles_whole_with_grafting_off_from_the_first_call_on() -> None:
    """fullgraph=True allows no graph break: not while it is undecided whether grafting is on, and not later.

    One graph, no recompilation between the first call and the later ones; one more where eager code decides meanwhile.
    """
    code = """
import torch, grafter
from torch._dynamo.utils import counters

class Layer(torch.nn.Module):
    layer_id = 3

    @grafter.context(lambda self: {"layer_id": self.layer_id})
    def forward(self, x):
        with grafter.context(part="mlp"):
            y = grafter.dump("h", x * 2, kind="mlp", extras={"a": 1})
        grafter.step()
        return grafter.dump("out", lambda: y)() + grafter.dump("tree", {"y": y})["y"]

@grafter.context(a=1)
def function(x):
    return grafter.dump("f", x + 1)

layer = Layer()
compiled = torch.compile(lambda x: layer(function(x)), fullgraph=True, backend="eager")
assert grafter._calls._off is None
for _ in range(3):
    assert compiled(torch.ones(2)).tolist() == [8.0, 8.0]
assert counters["stats"]["unique_graphs"] == 1
grafter.step()
assert grafter._calls._off is True
later = torch.compile(lambda x: layer(function(x)), fullgraph=True, backend="eager")
assert later(torch.ones(2)).tolist() == [8.0, 8.0]
assert not counters["graph_break"], counters["graph_break"]
print(counters["stats"]["unique_graphs"])
"""
    assert run_python(code).strip() == "2"
