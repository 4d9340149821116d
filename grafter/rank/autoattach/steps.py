"""Steps of a program that never calls `grafter.step()`, from what it does anyway.

optimizer    a step ends where an optimizer has stepped; several that step one after the other end one
forward      a step ends with each outermost call of an attached model: `generate` has one for each token
auto         as `optimizer` where gradients are on and the program has an optimizer, else as `forward`
manual       only `grafter.step()` ends one

The boundary is drawn when the next outermost call begins, so that what follows a call (backward, the parameters'
gradients) still belongs to its step. Once the program calls `grafter.step()` itself, no boundary is drawn any more.
"""

from __future__ import annotations

import gc
from typing import Any

import torch
from torch.optim.optimizer import register_optimizer_step_post_hook

from grafter.rank.grafter import Grafter


class AutomaticSteps:
    """Counts the steps of one Grafter, by its models' forward passes and its optimizers."""

    def __init__(self, grafter: Grafter, mode: str) -> None:
        self._grafter = grafter
        by_optimizer, self._by_forward = mode in ("auto", "optimizer"), mode in ("auto", "forward")
        self._expected = grafter.steps.step
        self._due = False
        self._has_optimizer = mode == "auto" and _finds_optimizer()
        self._passes = grafter.models.passes
        self._passes.on_begin.append(self._begin)
        self._passes.on_end.append(self._end)
        self._handle = register_optimizer_step_post_hook(self._after_optimizer) if by_optimizer else None

    def stop(self) -> None:
        """Nothing is counted any more."""
        if self._begin in self._passes.on_begin:
            self._passes.on_begin.remove(self._begin)
            self._passes.on_end.remove(self._end)
        if self._handle is not None:
            self._handle.remove()
            self._handle = None

    def _begin(self) -> None:
        if self._due:
            self._due = False
            self._draw_boundary()

    def _end(self, has_gradients: bool) -> None:
        if self._by_forward and not (has_gradients and self._has_optimizer):
            self._due = True

    def _after_optimizer(self, optimizer: Any, args: Any, kwargs: Any) -> None:
        self._has_optimizer = self._due = True

    def _draw_boundary(self) -> None:
        if self._grafter.steps.step != self._expected:
            self.stop()  # the program counts for itself
            return
        self._grafter.step()
        self._expected = self._grafter.steps.step


def _finds_optimizer() -> bool:
    """By type alone: looking at an object's attributes may run code of its own."""
    return any(issubclass(type(thing), torch.optim.Optimizer) for thing in gc.get_objects())
