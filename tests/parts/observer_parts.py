"""What the tests that looking changes nothing share: one program with grafter against the same without, bit by bit."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from jobs import Jobs, Rank, succeed
from torch import nn

import grafter

# Outputs and gradients of one program, without grafter's own tensors in them.
Results = dict[str, torch.Tensor]
# A model, and its forward pass over a batch.
Program = Callable[[], tuple[nn.Module, Callable[[], torch.Tensor]]]

each_setting = pytest.mark.parametrize(
    "settings",
    [
        {"compare_filter": "name == 'nothing'"},
        {"compare_filter": "True"},
        {"b2t_filter": "True"},
        {"b2t_filter": "name.endswith('.out')", "stats": "off"},
    ],
    ids=["no match", "compare", "self-graft", "self-graft of outputs"],
)


def make_tokens() -> torch.Tensor:
    return torch.arange(12).reshape(2, 6) % 11


def run_program(program: Program, attached: bool) -> Results:
    """Two training steps with dropout: what came out, all gradients, all weights, and where the random numbers are."""
    model, compute = program()
    if attached:
        assert grafter.attach(model) is not None
    torch.manual_seed(3)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    results: Results = {}
    for step in range(2):
        optimizer.zero_grad()
        out = compute()
        (out**2).sum().backward()
        results[f"out {step}"] = out.detach().clone()
        for path, parameter in model.named_parameters():
            if parameter.grad is not None:
                results[f"grad {step} {path}"] = parameter.grad.clone()
        optimizer.step()
        if attached:
            grafter.step()
    results |= {f"state {path}": tensor.clone() for path, tensor in model.state_dict().items()}
    results["random state"] = torch.get_rng_state()
    return results


def differing(a: Results, b: Results) -> list[str]:
    """Bitwise, NaN included."""
    assert a.keys() == b.keys() and len(a) > 20
    return [name for name in a if a[name].dtype != b[name].dtype or not bits_equal(a[name], b[name])]


def bits_equal(a: torch.Tensor, b: torch.Tensor) -> bool:
    left, right = (tensor.contiguous().reshape(-1).view(torch.uint8) for tensor in (a, b))
    return a.shape == b.shape and bool((left == right).all())


def run_beside_itself(rank: Rank) -> Any:
    """The program that is the rank's argument with grafter against the same without, in one process."""
    (program,) = rank.arguments
    attached = run_program(program, True)
    return differing(attached, run_program(program, False)), len(attached)


def check_that_nothing_changes(directory: Path, program: Program, settings: dict[str, str]) -> None:
    """Outputs, gradients, updated weights, buffers and the random state, with dropout, in both jobs."""
    with Jobs(directory, compiler=True, **settings) as jobs:
        for role in ("baseline", "target"):
            jobs.start(role, 1, run_beside_itself, program)
        for changed, count in succeed(jobs.wait()):
            assert changed == [] and count > 20
    records = jobs.ledgers()["target", 0]
    if "nothing" in str(settings):
        assert records == []
    else:
        wanted = "compared" if "compare_filter" in settings else "grafted"
        assert len(records) > 40 and {r.outcome for r in records} == {wanted}
