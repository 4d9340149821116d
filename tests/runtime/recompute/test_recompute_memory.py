"""Recomputed regions: how long it is kept what their points have written, and what is left in torch."""

from __future__ import annotations

import gc
from pathlib import Path
from typing import Any

import pytest
import torch
from jobs import Rank
from recompute_parts import both_kinds, kept_tensors, own_value, run_both
from torch.utils.checkpoint import CheckpointFunction, _checkpoint_hook, checkpoint

import grafter
from grafter.runtime.recompute import kept_writes
from grafter.runtime.recompute.kept_writes import KeptTensor


def look_at_memory(rank: Rank) -> Any:
    (use_reentrant,) = rank.arguments
    weight = torch.full((4,), own_value(rank), requires_grad=True)
    gc.disable()

    def block(x: torch.Tensor) -> torch.Tensor:
        return (grafter.dump("h", x * 1, write="return") * weight).sin()

    def forward() -> torch.Tensor:
        result: torch.Tensor = checkpoint(block, weight * 1, use_reentrant=use_reentrant)
        return result.sum()

    found = {}
    with torch.no_grad():
        checkpoint(block, weight * 1, use_reentrant=use_reentrant)
    grafter.dump("outside", torch.ones(1))
    found["without grad"] = kept_tensors()
    losses = [forward() for _ in range(3)]
    found["three in flight"] = kept_tensors()
    losses[1].backward()
    found["one backward"] = kept_tensors()
    losses[2].backward(retain_graph=True)
    found["retained"] = kept_tensors()
    losses.clear()
    found["dropped"] = kept_tensors()
    return found


@both_kinds
def test_what_is_kept_goes_with_the_graph(tmp_path: Path, use_reentrant: bool) -> None:
    """After backward while the loss is still held, and with a graph that is dropped without backward; without a
    garbage collection."""
    found, _ = run_both(tmp_path, look_at_memory, use_reentrant)
    assert found == {"without grad": 0, "three in flight": 3, "one backward": 2, "retained": 2, "dropped": 0}


class _OnDevice:
    """A tensor that says it is on an accelerator; there is none here."""

    def __init__(self) -> None:
        self.tensor, self.device = torch.ones(4), torch.device("cuda")
        self.went_to: list[str] = []

    def __getattr__(self, name: str) -> Any:
        return getattr(self.tensor, name)

    def detach(self) -> _OnDevice:
        return self

    def clone(self) -> str:
        return "device"

    def to(self, device: str) -> str:
        return device


def test_above_the_limit_it_is_kept_on_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """16 bytes each, a limit of 40: two stay on the device, the third does not, until one of the two is freed."""
    monkeypatch.setattr(kept_writes, "MAX_KEPT_ON_DEVICE_BYTES", 40)
    keep: Any = KeptTensor
    first, second, third = keep(_OnDevice()), keep(_OnDevice()), keep(_OnDevice())
    assert [first.tensor, second.tensor, third.tensor] == ["device", "device", "cpu"]
    del first, third
    assert keep(_OnDevice()).tensor == "device"


def close_before_backward(rank: Rank) -> Any:
    (use_reentrant,) = rank.arguments
    plain = CheckpointFunction.forward, _checkpoint_hook.__init__, _checkpoint_hook.__enter__
    weight = torch.tensor(own_value(rank), requires_grad=True)

    def inner(x: torch.Tensor) -> torch.Tensor:
        y = grafter.dump("h", x * 1, write="return")
        return y * y

    def outer(x: torch.Tensor) -> torch.Tensor:
        result: torch.Tensor = checkpoint(inner, x * 1, use_reentrant=use_reentrant)
        return result

    grafter.step()
    wrapped = CheckpointFunction.forward, _checkpoint_hook.__init__, _checkpoint_hook.__enter__
    out = checkpoint(outer, weight * 1, use_reentrant=use_reentrant)
    grafter.close()
    restored = [CheckpointFunction.forward, _checkpoint_hook.__init__, _checkpoint_hook.__enter__] == [*plain]
    out.backward()
    own = "__enter__" in vars(_checkpoint_hook)
    return float(weight.grad), wrapped != plain, restored, own


@both_kinds
def test_torch_is_as_it_was_after_close_and_open_graphs_still_work(tmp_path: Path, use_reentrant: bool) -> None:
    found, _ = run_both(tmp_path, close_before_backward, use_reentrant)
    assert found == (2.0, True, True, False)
