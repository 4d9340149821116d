"""Copies: what is pickled, saved, copied or scripted of an attached model has no hooks of grafter.

Hooks cannot be pickled, a file with them could not be loaded without grafter, and a copy with hooks would offer the
points of its original. So the state of an attached module, used by `torch.save`, `pickle` and `copy`, leaves them out.
"""

from __future__ import annotations

import functools
import weakref
from collections.abc import Collection
from typing import Any

import torch

from grafter.capture.model_forward import watch_on
from grafter.capture.passes import CountedForward

_GIVE_STATE = "__getstate__"
# The method that torch.jit.script calls.
_SCRIPT = "__prepare_scriptable__"
_OURS = "grafter.capture."
_HOOKS = ("_forward_pre_hooks", "_forward_hooks")
# Facts about hooks that torch keeps by the hooks' numbers.
_FACTS = (
    "_forward_pre_hooks_with_kwargs",
    "_forward_hooks_with_kwargs",
    "_forward_hooks_always_called",
)


# For how many attachments each module leaves its hooks out.
_left_out_for: weakref.WeakKeyDictionary[torch.nn.Module, int] = weakref.WeakKeyDictionary()


def leave_hooks_out(module: torch.nn.Module) -> None:
    """Leave our hooks out of the module's state from now on. Each attachment calls this once."""
    _left_out_for[module] = _left_out_for.get(module, 0) + 1
    # A weak reference, since a module that refers to itself is freed late.
    module.__dict__.setdefault(_GIVE_STATE, functools.partial(_state_of, weakref.ref(module)))
    module.__dict__.setdefault(_SCRIPT, functools.partial(_bare, weakref.ref(module)))


def modules_around(model: torch.nn.Module, hooked: Collection[torch.nn.Module]) -> list[torch.nn.Module]:
    """The modules of a model that contain hooked ones and have no hooks themselves.

    Hooks are left out of their states, too, since torch.jit.script replaces each part of a module.
    """
    return [m for m in model.modules() if m not in hooked and any(part in hooked for part in m.modules())]


def stop_leaving_out(module: torch.nn.Module) -> None:
    """Restore the module once no attachment is left. Each attachment calls this once."""
    _left_out_for[module] = _left_out_for.get(module, 1) - 1
    if not _left_out_for[module]:
        del _left_out_for[module]
        module.__dict__.pop(_GIVE_STATE, None)
        module.__dict__.pop(_SCRIPT, None)


def hooks_of_ours(hooks: dict[int, Any]) -> list[int]:
    """The numbers of grafter's hooks among these."""
    return [number for number, hook in hooks.items() if str(getattr(hook, "__module__", "")).startswith(_OURS)]


def take_hooks_away(module: torch.nn.Module) -> None:
    """Remove our hooks from a module that was not copied by its state."""
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
    state = {name: value for name, value in state.items() if name not in (_GIVE_STATE, _SCRIPT)}
    ours = {number for kind in _HOOKS for number in hooks_of_ours(module.__dict__.get(kind, {}))}
    for kind in (*_HOOKS, *_FACTS):
        if isinstance(state.get(kind), dict):
            state[kind] = type(state[kind])((n, hook) for n, hook in state[kind].items() if n not in ours)
    watched = watch_on(module)
    if watched is not None and "forward" in state:
        del state["forward"]
        if watched.own is not None:
            state["forward"] = watched.own
    elif isinstance(state.get("forward"), CountedForward):
        own = state.pop("forward").own
        if own is not None:
            state["forward"] = own
    return state


def _bare(reference: weakref.ref[torch.nn.Module]) -> torch.nn.Module:
    """A module with the same weights and parts, and without hooks, for torch.jit.script."""
    module = reference()
    assert module is not None
    bare: torch.nn.Module = object.__new__(type(module))
    bare.__dict__.update(_state_of(reference))
    bare.__dict__["_modules"] = dict(module._modules)
    prepare = getattr(type(module), _SCRIPT, None)
    return bare if prepare is None else prepare(bare)
