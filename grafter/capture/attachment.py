"""An attachment: hooks on the selected modules of one model, which turn their inputs and outputs into points.

Only what is selected gets hooks, and a module without one costs nothing. The model that was given is called in many
ways (`model.forward(x)` among them, which runs no hooks), so its own `forward` is wrapped instead.
"""

from __future__ import annotations

import functools
import logging
import sys
from collections.abc import Callable
from types import TracebackType
from typing import Any

import torch
from torch.utils.hooks import RemovableHandle

from grafter.capture.containers import Arguments, replace_tensors
from grafter.capture.naming import Naming
from grafter.capture.selection import Pattern, select_modules
from grafter.names import PointName

logger = logging.getLogger("grafter")

# Offers one tensor as a point: (name and tags, module's key, tensor) -> what takes its place.
Offer = Callable[[PointName, str, torch.Tensor], torch.Tensor]


class ModulePoints:
    """The points of one module. Names of its tensors are worked out when they are first met."""

    def __init__(self, path: str, module: torch.nn.Module, name: PointName, naming: Naming, offer: Offer) -> None:
        self.path, self.name = path, name
        self.fired = False
        self._naming, self._offer = naming, offer
        self._arguments = Arguments(module)
        self._names: dict[str, PointName] = {}

    def inputs(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        return self._arguments.replace(args, kwargs, self._visit)

    def output(self, value: Any) -> Any:
        self.fired = True
        return replace_tensors(value, ".out", self._visit)

    def _visit(self, suffix: str, tensor: torch.Tensor) -> torch.Tensor:
        name = self._names.get(suffix)
        if name is None:
            name = self._names[suffix] = self._naming.of_tensor(self.name, self.path, suffix)
        return self._offer(name, self.name.key, tensor)


class Attachment:
    """What `grafter.attach` returns. `detach()` leaves the model as it was; so does the end of a `with` block."""

    def __init__(
        self,
        model: torch.nn.Module,
        patterns: tuple[Pattern, ...],
        naming: Naming,
        offer: Offer,
        *,
        inputs: bool = True,
        outputs: bool = True,
    ) -> None:
        self.points: list[ModulePoints] = []
        self._model = model
        self._handles: list[RemovableHandle] = []
        self._restore: Callable[[], None] | None = None
        for path, module in select_modules(model, patterns):
            points = ModulePoints(path, module, naming.of_module(model, path), naming, offer)
            self.points.append(points)
            if module is model:
                self._wrap_forward(module, points, inputs, outputs)
            else:
                self._hook(module, points, inputs, outputs)
        if any(_is_compiled(module) for module in model.modules()):
            # Code that was compiled without hooks never runs them.
            sys.modules["torch._dynamo"].reset()

    @property
    def keys(self) -> list[str]:
        """The modules, as a rank announces them."""
        return [points.name.key for points in self.points]

    @property
    def hook_count(self) -> int:
        return len(self._handles)

    def never_fired(self) -> list[str]:
        """Paths of selected modules that no call has reached."""
        return [points.path for points in self.points if not points.fired]

    def detach(self) -> None:
        """Take all hooks away. May be called twice."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        if self._restore is not None:
            self._restore()
            self._restore = None

    def __enter__(self) -> Attachment:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.detach()

    def _hook(self, module: torch.nn.Module, points: ModulePoints, inputs: bool, outputs: bool) -> None:
        if inputs:

            def before(_: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
                new_args, new_kwargs = points.inputs(args, kwargs)
                return None if new_args is args and new_kwargs is kwargs else (new_args, new_kwargs)

            self._handles.append(module.register_forward_pre_hook(before, with_kwargs=True))
        if outputs:

            def after(_: torch.nn.Module, args: tuple[Any, ...], output: Any) -> Any:
                new = points.output(output)
                return None if new is output else new

            self._handles.append(module.register_forward_hook(after))

    def _wrap_forward(self, module: torch.nn.Module, points: ModulePoints, inputs: bool, outputs: bool) -> None:
        inner = module.forward
        had_own = "forward" in module.__dict__

        @functools.wraps(inner)
        def forward(*args: Any, **kwargs: Any) -> Any:
            if inputs:
                args, kwargs = points.inputs(args, kwargs)
            output = inner(*args, **kwargs)
            return points.output(output) if outputs else output

        def restore() -> None:
            if module.__dict__.get("forward") is not forward:
                logger.warning("grafter: the model's forward was replaced since attach; it is left as it is")
            elif had_own:
                module.forward = inner
            else:
                del module.forward

        module.forward = forward
        self._restore = restore


def _is_compiled(module: torch.nn.Module) -> bool:
    return type(module).__name__ == "OptimizedModule" or getattr(module, "_compiled_call_impl", None) is not None
