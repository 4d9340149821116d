"""Recomputation by other means than torch.utils.checkpoint, and what cannot be matched."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from jobs import Jobs, Rank
from recompute_parts import kept_tensors, own_value, run_both
from torch.utils.checkpoint import checkpoint

import grafter


class RunsAgain(torch.autograd.Function):
    """As frameworks with a checkpointing of their own do it."""

    @staticmethod
    def forward(ctx: Any, run_function: Any, x: torch.Tensor) -> Any:
        ctx.run_function = run_function
        ctx.save_for_backward(x)
        with torch.no_grad():
            return run_function(x)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> Any:
        x = ctx.saved_tensors[0].detach().requires_grad_()
        with torch.enable_grad():
            out = ctx.run_function(x)
        torch.autograd.backward(out, gradient)
        return None, x.grad


class HidesItsForward(torch.autograd.Function):
    """The same with `setup_context`: nothing that runs in its forward can be told from its graph."""

    @staticmethod
    def forward(run_function: Any, x: torch.Tensor) -> Any:
        return run_function(x)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        ctx.run_function = inputs[0]
        ctx.save_for_backward(inputs[1])

    backward = RunsAgain.backward


def by_own_function(rank: Rank) -> Any:
    function, step_between, same_name = rank.arguments
    weight = torch.tensor(own_value(rank), requires_grad=True)

    def block(x: torch.Tensor, tag: int) -> torch.Tensor:
        y = grafter.dump("h", x * 1, write="return", **({} if same_name else {"part": tag}))
        return y * y

    def blocks(x: torch.Tensor) -> torch.Tensor:
        return block(x, 0) * block(x, 1)

    out = weight * 1
    for layer in range(2):
        with grafter.context(layer_id=layer):
            out = function.apply(blocks, out)
    if step_between:
        grafter.step()
    out.backward()
    kept = kept_tensors()
    return float(weight.grad), kept


@pytest.mark.parametrize("step_between", [False, True])
@pytest.mark.parametrize("same_name", [False, True])
def test_a_function_that_runs_its_forward_again_is_recognised(
    tmp_path: Path, step_between: bool, same_name: bool
) -> None:
    """Its points are told by their own tags and their order; the context around it is not needed."""
    found, ledger = run_both(tmp_path, by_own_function, RunsAgain, step_between, same_name)
    # At each of two layers y0^2 y1^2 with both y grafted to 1: 4.
    assert found == (16.0, 0)
    assert len(ledger) == 4


def ambiguous(rank: Rank) -> Any:
    weight = torch.tensor(own_value(rank), requires_grad=True)

    def point(x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = grafter.dump("h", x * 1, write="return")
        return y

    def block(x: torch.Tensor) -> torch.Tensor:
        if torch.is_grad_enabled():
            return point(x)
        for part in range(2):
            with grafter.context(part=part):
                x = point(x)
        return x

    RunsAgain.apply(block, weight * 1).backward()


def only_with_grad(rank: Rank) -> Any:
    weight = torch.tensor(own_value(rank), requires_grad=True)

    def block(x: torch.Tensor) -> torch.Tensor:
        grafter.dump("other", x * 1)
        return grafter.dump("h", x * 1) if torch.is_grad_enabled() else x * 1  # type: ignore[no-any-return]

    checkpoint(block, weight * 1, use_reentrant=True).backward()


def refused_again(rank: Rank) -> Any:
    weight = torch.tensor(own_value(rank), requires_grad=True)

    def block(x: torch.Tensor) -> torch.Tensor:
        half = grafter.dump("h", (x * torch.ones(4)).chunk(2)[0], gradient="cut")
        return half * half

    checkpoint(block, weight * 1, use_reentrant=True).sum().backward()


@pytest.mark.parametrize(
    ("function", "arguments", "texts"),
    [
        (by_own_function, (HidesItsForward, False, False), ["'h' at", "has not seen the forward pass", "Dump outside"]),
        (ambiguous, (), ["'h' fires in a recomputation", "2 points", "part=0", "part=1", "Give the call itself tags"]),
        (only_with_grad, (), ["'h' at", "did not fire", "where these did: 'other'", "must do the same both times"]),
        (refused_again, (), ["'h'", "cannot be written again", "chunk, split or unbind", "Use write=return"]),
    ],
    ids=["forward unseen", "ambiguous", "not in the forward pass", "refused"],
)
def test_what_cannot_be_matched_or_written_says_why(
    tmp_path: Path, function: Any, arguments: tuple[Any, ...], texts: list[str]
) -> None:
    with Jobs(tmp_path, compiler=True, b2t_filter="True") as jobs:
        for role in ("baseline", "target"):
            jobs.start(role, 1, function, *arguments)
        results = jobs.wait()
    # The sender of what only the receiver cannot write is content.
    for result in results[1:] if function is refused_again else results:
        assert result.error_kind == "UsageError"
        for text in texts:
            assert text in result.error
