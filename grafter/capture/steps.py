"""Steps of a program that never calls `grafter.step()`, from what it does anyway.

optimizer    a step ends where an optimizer has stepped; several that step one after the other end one
forward      a step ends with each outermost call of an attached model: `generate` has one for each token
auto         as `optimizer` where gradients are on and the program has an optimizer, else as `forward`
manual       only `grafter.step()` ends one

The boundary is drawn when the next outermost call begins, so that what follows a call (backward, the parameters'
gradients) still belongs to its step. Once the program calls `grafter.step()` itself, no boundary is drawn any more.
"""

from __future__ import annotations

import functools
import gc
import threading
import types
from functools import partial
from typing import Any

import torch
from torch.optim.optimizer import register_optimizer_step_post_hook

from grafter.capture.untraced import untraced
from grafter.compiled import notice_in_graph
from grafter.grafter import Grafter


class AutomaticSteps:
    """Counts the steps of one Grafter. `wrap(model)` makes a model's calls count."""

    def __init__(self, grafter: Grafter, mode: str) -> None:
        self._grafter = grafter
        self._by_optimizer, self._by_forward = mode in ("auto", "optimizer"), mode in ("auto", "forward")
        self._expected = grafter.steps.step
        self._due = False
        self._has_optimizer = mode == "auto" and _finds_optimizer()
        self._around = threading.local()
        self._forwards: dict[int, CountedForward] = {}
        self._handle = register_optimizer_step_post_hook(self._after_optimizer) if self._by_optimizer else None

    def wrap(self, model: torch.nn.Module) -> None:
        """Let outermost calls of this model count, those of `model.forward` among them."""
        if self._by_optimizer or self._by_forward:
            self._forwards[id(model)] = model.forward = CountedForward(model, self)

    def unwrap(self, model: torch.nn.Module) -> None:
        forward = self._forwards.pop(id(model), None)
        if forward is not None:
            forward.take_away()

    def stop(self) -> None:
        """Leave models and optimizers as they were; nothing is counted any more."""
        self._by_optimizer = self._by_forward = False
        for forward in self._forwards.values():
            forward.take_away()
        self._forwards.clear()
        if self._handle is not None:
            self._handle.remove()
            self._handle = None

    def enter(self, model: int) -> None:
        """`model`: which one is called. No model calls itself: where it was not left, an error has ended its call."""
        around: list[int] = self._around.__dict__.setdefault("models", [])
        del around[around.index(model) if model in around else len(around) :]
        around.append(model)
        if len(around) == 1 and self._due:
            self._due = False
            self._draw_boundary()

    def leave(self, model: int, has_gradients: bool) -> None:
        around: list[int] = self._around.models
        if model in around:
            del around[around.index(model) :]
        if not around and self._by_forward and not (has_gradients and self._has_optimizer):
            self._due = True

    def _after_optimizer(self, optimizer: Any, args: Any, kwargs: Any) -> None:
        self._has_optimizer = self._due = True

    def _draw_boundary(self) -> None:
        if self._grafter.steps.step != self._expected:
            self.stop()  # the program counts for itself
            return
        self._grafter.step()
        self._expected = self._grafter.steps.step


class CountedForward:
    """A model's `forward` with a count around it. A copy or pickle of the model has the model's own in its place."""

    def __init__(self, model: torch.nn.Module, steps: AutomaticSteps) -> None:
        self._model = model
        called = id(model)
        self._enter, self._leave = untraced(partial(steps.enter, called)), untraced(partial(steps.leave, called))
        # No gradients are recorded while a graph runs; whether they are, is settled when it is made.
        self._enter_in_graph = notice_in_graph(partial(steps.enter, called))
        self._leave_in_graph = {told: notice_in_graph(partial(steps.leave, called, told)) for told in (False, True)}
        self._had_own = "forward" in model.__dict__
        self._inner = model.forward
        functools.update_wrapper(self, self._inner)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if torch.compiler.is_dynamo_compiling():
            self._enter_in_graph()
            output = self._inner(*args, **kwargs)
            self._leave_in_graph[torch.is_grad_enabled()]()
            return output
        self._enter()
        try:
            return self._inner(*args, **kwargs)
        finally:
            self._leave(torch.is_grad_enabled())

    def take_away(self) -> None:
        if self._model.__dict__.get("forward") is self:
            if self._had_own:
                self._model.forward = self._inner
            else:
                del self._model.forward

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        return _own_forward(memo.get(id(self._model), self._model))

    def __reduce__(self) -> Any:
        return _own_forward, (self._model,)


def _own_forward(model: torch.nn.Module) -> Any:
    return types.MethodType(type(model).forward, model)


def _finds_optimizer() -> bool:
    """By type alone: looking at an object's attributes may run code of its own."""
    return any(issubclass(type(thing), torch.optim.Optimizer) for thing in gc.get_objects())
