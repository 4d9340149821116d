"""torch.compile with grafting on: a graph break, told once, and the same grafts as in eager code. Off: test_off.py."""

from __future__ import annotations

import importlib
import logging
from pathlib import Path
from typing import Any

import torch
from jobs import Rank, succeed, two_jobs

import grafter


class Layer(torch.nn.Module):
    layer_id = 3

    @grafter.context(lambda self: {"layer_id": self.layer_id})
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = grafter.dump("h", x * 2, kind="mlp")  # the line of h
        with grafter.context(part=1):
            z = grafter.dump("z", y + 1)
        grafter.step()
        return z * 10


def line_of(text: str) -> int:
    """The number of the one line of this file that ends with a comment."""
    lines = Path(__file__).read_text().splitlines()
    (number,) = [i for i, line in enumerate(lines, start=1) if line.endswith(f"# {text}")]
    return number


def run_compiled(rank: Rank) -> Any:
    """Three calls of a compiled module; what it returned, and what the user was told."""
    told: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: told.append(record.getMessage())  # type: ignore[method-assign]
    logging.getLogger("grafter").addHandler(handler)
    from torch._dynamo.utils import counters

    layer = torch.compile(Layer(), backend="eager")
    values = [layer(torch.full((2,), 1.0 if rank.is_baseline else 9.0)).tolist() for _ in range(3)]
    reasons = " ".join(counters["graph_break"])
    return values, [text for text in told if "graph" in text], reasons


def test_compiled_code_grafts_with_tags_and_lines_of_the_user(tmp_path: Path) -> None:
    with two_jobs(tmp_path, run_compiled, run_compiled, compiler=True, b2t_filter="True") as jobs:
        (_, _, _), (values, told, reasons) = succeed(jobs.wait())
        ledger = jobs.ledgers()["target", 0]
    assert values == [[30.0, 30.0]] * 3, "the target goes on with the baseline's values"
    expected = [{"layer_id": 3, "kind": "mlp"}, {"layer_id": 3, "part": 1}] * 3
    assert [record.tags for record in ledger] == expected
    assert [record.step for record in ledger] == [0, 0, 1, 1, 2, 2]
    assert {record.outcome for record in ledger} == {"grafted"}
    assert ledger[0].call_site.startswith(f"{__file__}:{line_of('the line of h')} in forward")
    assert ledger[1].call_site.startswith(f"{__file__}:{line_of('the line of h') + 2} in ")
    assert len(told) == 1, "told once"
    assert "breaks the compiled graph" in told[0] and "TORCH_LOGS=graph_breaks" in told[0]
    assert "grafter is on: each of its calls breaks the compiled graph" in reasons
    assert "report an issue" not in reasons and "pydantic" not in reasons, "grafter itself is not traced"


def run_whole(rank: Rank) -> Any:
    def function(x: torch.Tensor) -> torch.Tensor:
        return grafter.dump("h", x * 2) + 1

    try:
        torch.compile(function, backend="eager", fullgraph=True)(torch.ones(2))
    except Exception as error:
        return str(error)
    return None


def test_a_whole_graph_is_refused_with_the_reason_and_the_users_line(tmp_path: Path) -> None:
    """fullgraph=True and grafting on: torch's error says why and where, on both sides."""
    with two_jobs(tmp_path, run_whole, run_whole, compiler=True, b2t_filter="True") as jobs:
        for text in succeed(jobs.wait()):
            assert "grafter is on: each of its calls breaks the compiled graph" in text
            assert 'grafter.dump("h", x * 2) + 1' in text


def run_eager_then_compiled(rank: Rank) -> Any:
    """Grafting is decided, and used, before the compiler is imported; and eager code is not called compiled."""
    told: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: told.append(record.getMessage())  # type: ignore[method-assign]
    logging.getLogger("grafter").addHandler(handler)
    value = 1.0 if rank.is_baseline else 9.0
    with grafter.context(layer_id=1):
        eager = grafter.dump("h", torch.full((2,), value)).tolist()
    importlib.import_module("torch._dynamo")
    with grafter.context(layer_id=2):
        later = grafter.dump("h", torch.full((2,), value)).tolist()
    before = [text for text in told if "graph" in text]

    def function(x: torch.Tensor) -> torch.Tensor:
        with grafter.context(layer_id=3):
            return grafter.dump("h", x) + 1

    compiled = torch.compile(function, backend="eager")(torch.full((2,), value)).tolist()
    return eager, later, compiled, before, len([text for text in told if "graph" in text])


def test_the_compiler_may_come_after_grafting_was_decided(tmp_path: Path) -> None:
    with two_jobs(tmp_path, run_eager_then_compiled, run_eager_then_compiled, b2t_filter="True") as jobs:
        _, target = succeed(jobs.wait())
        ledger = jobs.ledgers()["target", 0]
    assert target == ([1.0, 1.0], [1.0, 1.0], [2.0, 2.0], [], 1)
    assert [record.tags for record in ledger] == [{"layer_id": i} for i in (1, 2, 3)]


def train_compiled(rank: Rank) -> Any:
    """A training step through a compiled function, with `write=return`, whose gradients are exact."""
    weight = torch.zeros(1, requires_grad=True)

    def function(w: torch.Tensor) -> torch.Tensor:
        y = grafter.dump("y", w.exp() if not rank.is_baseline else w.exp() + 4, write="return")
        return 2 * y * y

    torch.compile(function, backend="aot_eager")(weight).sum().backward()
    assert weight.grad is not None
    return float(weight.grad)


def test_gradients_flow_through_the_break(tmp_path: Path) -> None:
    """y is 5 for the consumer, exp differentiates at its own 0: 2 * 2 * 5 * exp(0) = 20."""
    with two_jobs(tmp_path, train_compiled, train_compiled, compiler=True, b2t_filter="True") as jobs:
        assert succeed(jobs.wait())[1] == 20.0
