"""The wrapped `forward` of a model: programs also call `model.forward(...)`, which runs no hooks."""

from __future__ import annotations

import functools
import logging
import types
import weakref
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch

logger = logging.getLogger("grafter")

_MARK = "_grafter_watched"


class ForwardWatcher(Protocol):
    """Sees each call of the model, and may replace its inputs and its output; None: it does not."""

    @property
    def inputs(self) -> Callable[[tuple[Any, ...], dict[str, Any]], tuple[tuple[Any, ...], dict[str, Any]]] | None: ...

    @property
    def output(self) -> Callable[[Any], Any] | None: ...


@dataclass(eq=False)
class WrappedForward:
    """A wrapped `forward`. own: the instance's `forward` before, if it had one."""

    own: Callable[..., Any] | None
    watchers: list[ForwardWatcher] = field(default_factory=list)


def watch_forward(module: torch.nn.Module, watcher: ForwardWatcher) -> Callable[[], None]:
    """Let the watcher see all calls until the returned function is called. Several share one wrapper, in order."""
    watched = watch_on(module)
    if watched is None:
        watched = WrappedForward(module.__dict__.get("forward"))
        module.__dict__["forward"] = _wrapper(module, watched)
    watched.watchers.append(watcher)
    # Weakly, since an attachment may outlive its model.
    return functools.partial(_stop, weakref.ref(module), watched, watcher)


def watch_on(module: torch.nn.Module) -> WrappedForward | None:
    """The wrapped `forward` of a module, if there is one."""
    watched: WrappedForward | None = getattr(module.__dict__.get("forward"), _MARK, None)
    return watched


def _wrapper(module: torch.nn.Module, watched: WrappedForward) -> Callable[..., Any]:
    watchers, own = watched.watchers, watched.own

    def run(inner: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        for watcher in watchers:
            if watcher.inputs is not None:
                args, kwargs = watcher.inputs(args, kwargs)
        output = inner(*args, **kwargs)
        for watcher in watchers:
            if watcher.output is not None:
                output = watcher.output(output)
        return output

    if own is not None:

        @functools.wraps(own)
        def own_forward(*args: Any, **kwargs: Any) -> Any:
            return run(own, args, kwargs)

        setattr(own_forward, _MARK, watched)
        return own_forward

    @functools.wraps(type(module).forward)
    def forward(self: torch.nn.Module, *args: Any, **kwargs: Any) -> Any:
        return run(functools.partial(type(self).forward, self), args, kwargs)

    setattr(forward, _MARK, watched)
    # A method, so that a deep copy of the model gets one bound to the copy.
    return types.MethodType(forward, module)


def _stop(reference: weakref.ref[torch.nn.Module], watched: WrappedForward, watcher: ForwardWatcher) -> None:
    watched.watchers.remove(watcher)
    module = reference()
    if watched.watchers or module is None:
        return
    if watch_on(module) is not watched:
        logger.warning("grafter: the model's forward was replaced since attach; it is left as it is")
    elif watched.own is None:
        del module.__dict__["forward"]
    else:
        module.__dict__["forward"] = watched.own
