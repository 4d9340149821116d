"""Copies: what is pickled, saved or copied of an attached model is the model without grafter's hooks.

Hooks cannot be pickled, a file with them could not be loaded where there is no grafter, and a copy that had them would
offer the points of the model that it was made from. So an attached module gives its state without them, which is what
`torch.save`, `pickle` and `copy` ask a module for.
"""

from __future__ import annotations

import functools
import weakref
from typing import Any

import torch

from grafter.capture.model_forward import watch_on

_GIVE_STATE = "__getstate__"
_OURS = "grafter.capture."
_HOOKS = ("_forward_pre_hooks", "_forward_hooks")
# Beside the hooks, what torch knows of each, by the same numbers.
_FACTS = (
    "_forward_pre_hooks_with_kwargs",
    "_forward_hooks_with_kwargs",
    "_forward_hooks_always_called",
)


def leave_hooks_out(module: torch.nn.Module) -> None:
    """From now on the module's state has none of our hooks. May be called twice."""
    # By a weak reference: a module that refers to itself is freed late.
    module.__dict__.setdefault(_GIVE_STATE, functools.partial(_state_of, weakref.ref(module)))


def stop_leaving_out(module: torch.nn.Module) -> None:
    """Once none of our hooks is left, the module is as it was."""
    if watch_on(module) is None and not any(hooks_of_ours(getattr(module, hooks)) for hooks in _HOOKS):
        module.__dict__.pop(_GIVE_STATE, None)


def hooks_of_ours(hooks: dict[int, Any]) -> list[int]:
    """The numbers of our hooks among these."""
    return [number for number, hook in hooks.items() if str(getattr(hook, "__module__", "")).startswith(_OURS)]


def take_hooks_away(module: torch.nn.Module) -> None:
    """Of a module that came by them by other means than its state."""
    for kind in _HOOKS:
        hooks = getattr(module, kind)
        for number in hooks_of_ours(hooks):
            del hooks[number]


def _state_of(reference: weakref.ref[torch.nn.Module]) -> Any:
    module = reference()
    assert module is not None
    give = getattr(type(module), _GIVE_STATE, None)
    state = dict(module.__dict__) if give is None else give(module)
    if not isinstance(state, dict):
        return state
    state = {name: value for name, value in state.items() if name != _GIVE_STATE}
    ours = {number for kind in _HOOKS for number in hooks_of_ours(module.__dict__.get(kind, {}))}
    for kind in (*_HOOKS, *_FACTS):
        if isinstance(state.get(kind), dict):
            state[kind] = type(state[kind])((n, hook) for n, hook in state[kind].items() if n not in ours)
    watched = watch_on(module)
    if watched is not None and "forward" in state:
        del state["forward"]
        if watched.own is not None:
            state["forward"] = watched.own
    return state
