"""Forward passes: the outermost calls of a rank's models, counted; and the first ones, where they only warm them up.

While a rank warms up it has no points and counts no step, until the first pass begins that counts. What happens after
a pass that does not count (a loss, a backward pass, the program's own `grafter.step()`) belongs to it.
"""

from __future__ import annotations

import functools
import threading
import types
import weakref
from collections.abc import Callable
from functools import partial
from typing import Any

import torch

from grafter.capture.compiled import notice_in_graph
from grafter.capture.traced import is_being_traced
from grafter.core.untraced import untraced


class ForwardPasses:
    """Of one rank. `wrap(model)` makes a model's calls count, those of `model.forward` among them."""

    def __init__(self, warm_up: int) -> None:
        """warm_up: how many first passes do not count."""
        self.warm_up = warm_up
        self.begun = 0
        # Whether no pass has begun that counts.
        self.is_warming_up = warm_up > 0
        # Told when one begins, before it counts, and when it ends: whether gradients were on then.
        self.on_begin: list[Callable[[], None]] = []
        self.on_end: list[Callable[[bool], None]] = []
        # Called once it is warm.
        self.on_warm: Callable[[], None] = lambda: None
        self._around = threading.local()
        # Weakly: the model has it.
        self._forwards: weakref.WeakValueDictionary[int, CountedForward] = weakref.WeakValueDictionary()

    def wrap(self, model: torch.nn.Module) -> None:
        """Count from now on. A model is wrapped once."""
        if id(model) not in self._forwards:
            self._forwards[id(model)] = model.forward = CountedForward(model, self)

    def unwrap(self, model: torch.nn.Module) -> None:
        forward = self._forwards.pop(id(model), None)
        if forward is not None:
            forward.take_away()

    def stop(self) -> None:
        """Leave all models as they were."""
        for forward in list(self._forwards.values()):
            forward.take_away()
        self._forwards.clear()

    def enter(self, model: int) -> None:
        """`model`: which one is called. No model calls itself: where it was not left, an error has ended its call."""
        around: list[int] = self._around.__dict__.setdefault("models", [])
        del around[around.index(model) if model in around else len(around) :]
        around.append(model)
        if len(around) == 1:
            for tell in self.on_begin:
                tell()
            self.begun += 1
            if self.is_warming_up and self.begun > self.warm_up:
                self.is_warming_up = False
                self.on_warm()

    def leave(self, model: int, has_gradients: bool) -> None:
        around: list[int] = self._around.models
        if model in around:
            del around[around.index(model) :]
        if not around:
            for tell in self.on_end:
                tell(has_gradients)


class CountedForward:
    """A model's `forward` with a count around it. A copy or pickle of the model has the model's own in its place."""

    def __init__(self, model: torch.nn.Module, passes: ForwardPasses) -> None:
        self._model = model
        called = id(model)
        self._enter, self._leave = untraced(partial(passes.enter, called)), untraced(partial(passes.leave, called))
        # No gradients are recorded while a graph runs; whether they are, is settled when it is made.
        self._enter_in_graph = notice_in_graph(partial(passes.enter, called))
        self._leave_in_graph = {told: notice_in_graph(partial(passes.leave, called, told)) for told in (False, True)}
        self._had_own = "forward" in model.__dict__
        self._inner = model.forward
        functools.update_wrapper(self, self._inner)
        # Of a function that is to be exported, torch looks at these, too.
        self.__code__ = getattr(self._inner, "__code__", None)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if is_being_traced():
            return self._inner(*args, **kwargs)
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

    @property
    def own(self) -> Any:
        """The instance's own `forward` that the model had, if it had one."""
        return self._inner if self._had_own else None

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
