"""Recomputed regions: the receiver's gradients are those of the same program without checkpointing, in every kind."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from jobs import Jobs, Rank, succeed
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts
from torch.utils.checkpoint import set_checkpoint_early_stop as early_stop

import grafter

Function = Callable[..., torch.Tensor]
LAYERS = 3
MODES = list(itertools.product(("in_place", "return"), ("straight_through", "cut", "strict")))


def keep_products(context: Any, operation: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    """Products are kept, and all that statistics, transforms and copies of ours could be mistaken for."""
    kept = (torch.ops.aten.mul.Tensor, torch.ops.aten.copy_.default, torch.ops.aten.sub.Tensor)
    return CheckpointPolicy.MUST_SAVE if operation in kept else CheckpointPolicy.PREFER_RECOMPUTE


def plain(function: Function, *args: Any) -> torch.Tensor:
    return function(*args)


def nested(inner: bool, outer: bool) -> Callable[..., torch.Tensor]:
    def run(function: Function, *args: Any) -> torch.Tensor:
        def around(*inner_args: Any) -> torch.Tensor:
            result: torch.Tensor = checkpoint(function, *inner_args, use_reentrant=inner)
            return result.sin()

        result: torch.Tensor = checkpoint(around, *args, use_reentrant=outer)
        return result

    return run


def without_early_stop(function: Function, *args: Any) -> torch.Tensor:
    with early_stop(False):
        result: torch.Tensor = checkpoint(function, *args, use_reentrant=False)
    return result


KINDS: dict[str, tuple[Callable[..., torch.Tensor], bool]] = {
    # How a block is run, and whether a sine is around it (nested regions do something of their own).
    "reentrant": (partial(checkpoint, use_reentrant=True), False),
    "other": (partial(checkpoint, use_reentrant=False), False),
    "no early stop": (without_early_stop, False),
    "no check": (partial(checkpoint, use_reentrant=False, determinism_check="none"), False),
    "no random state": (partial(checkpoint, use_reentrant=True, preserve_rng_state=False), False),
    "selective": (
        partial(
            checkpoint,
            use_reentrant=False,
            context_fn=partial(create_selective_checkpoint_contexts, keep_products),
        ),
        False,
    ),
    **{
        f"nested {name_in} in {name_out}": (nested(inner, outer), True)
        for (name_in, inner), (name_out, outer) in itertools.product(
            {"reentrant": True, "other": False}.items(), repeat=2
        )
    },
}


def train(
    rank: Rank, run: Callable[..., torch.Tensor], sine: bool, mode: tuple[str, str], seed: int
) -> tuple[list[Any], list[Any]]:
    """Two microbatches of three layers before one backward pass; (gradients, what the layers handed on)."""
    write, gradient = mode
    generator = torch.Generator().manual_seed(seed)
    weights = [torch.rand(4, generator=generator, requires_grad=True) for _ in range(2 * LAYERS)]
    inputs = [torch.rand(2, 4, generator=generator, requires_grad=True) for _ in range(2)]
    seen = []

    def block(x: torch.Tensor, first: torch.Tensor, second: torch.Tensor) -> torch.Tensor:
        # Additions and products do not save their output, so that writing in place is exact, too.
        y = x * first + 1
        with grafter.context(inside="yes"):
            z = grafter.dump("h", y, write=write, gradient=gradient)
        return (z * z * second).sin()

    losses = []
    for batch in inputs:
        x = batch * 1
        for layer in range(LAYERS):
            with grafter.context(layer_id=layer):
                x = run(block, x, weights[2 * layer], weights[2 * layer + 1])
            x = x.sin() if sine and run is plain else x
        seen.append(x.detach().clone())
        losses.append(x.sum())
    grafter.step()
    torch.stack(losses).sum().backward()
    # Where nothing comes through, reentrant checkpointing gives zeros, and the plain program None.
    gradients = [
        (tensor.new_zeros(tensor.shape) if tensor.grad is None else tensor.grad).tolist() for tensor in weights + inputs
    ]
    return gradients, [value.tolist() for value in seen]


def train_in_every_way(rank: Rank) -> Any:
    kinds, modes = rank.arguments
    found = {}
    for kind, mode in itertools.product(kinds, modes):
        run, sine = KINDS[kind]
        for way in (plain, run):
            found[kind, mode, way is plain] = train(rank, way, sine, mode, seed=1 if rank.is_baseline else 2)
    return found


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_are_those_without_checkpointing(tmp_path: Path, kind: str) -> None:
    """In every write mode: the same values, and the same gradients to the last bit, on receiver and sender."""
    with Jobs(tmp_path, compiler=True, b2t_filter="name == 'h'") as jobs:
        for role in ("baseline", "target"):
            jobs.start(role, 1, train_in_every_way, [kind], MODES)
        baseline, target = succeed(jobs.wait())
        ledgers = jobs.ledgers()
    for found in (baseline, target):
        for mode in MODES:
            assert found[kind, mode, False] == found[kind, mode, True], mode
    # Grafted values and gradients, not this side's own; and a sender's are its own.
    assert target[kind, MODES[0], True][1] != baseline[kind, MODES[0], True][1]
    assert all(found == baseline[kind, MODES[0], True] for found in baseline.values())
    first, *_, last = target[kind, ("return", "cut"), False][0][: 2 * LAYERS]
    assert not any(first) and all(last)
    for ledger, outcome in ((ledgers["target", 0], "grafted"), (ledgers["baseline", 0], "sent")):
        assert [record.outcome for record in ledger] == [outcome] * (len(MODES) * 2 * 2 * LAYERS)
        assert [record.occurrence for record in ledger[: 2 * LAYERS]] == [0] * LAYERS + [1] * LAYERS
