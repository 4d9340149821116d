"""A hook's points in code that is being compiled: operators in the graph, so that the hook does not break it.

What is here runs while the compiler traces it, so it keeps to what that follows. What needs more is worked out by
functions that the compiler calls, and takes the result of for a constant. They must give the same for all modules that
share a graph, as the layers of a model do where each is compiled by itself. Such modules are a family: their points
have the same names, and differ by tags alone. Traced code knows a family by a text, so that no graph serves two.
"""

from __future__ import annotations

import collections
import dataclasses
import itertools
import logging
import sys
import weakref
from collections.abc import Callable
from types import CodeType
from typing import Any, Protocol

import torch

from grafter._process import hint_once
from grafter.capture.compiled import BREAK, NOTHING, offer_traced
from grafter.capture.containers import Arguments, is_looked_into


class HookedPoints(Protocol):
    """The points of one module: `grafter.capture.attachment.ModulePoints`."""

    family: Family
    hook: torch.Tensor
    arguments: Arguments

    def find_sites(self, suffixes: tuple[str, ...], differentiated: tuple[bool, ...]) -> list[tuple[int, int]]: ...


# What cannot be traced, and what the compiler says to it.
_UNKNOWN = "unknown"

_family_numbers = itertools.count()
_families: weakref.WeakValueDictionary[str, Family] = weakref.WeakValueDictionary()
_codes: set[CodeType] = set()


class Family:
    """Modules of one attachment whose points have the same names."""

    def __init__(self) -> None:
        self.text = str(next(_family_numbers))
        self.members: weakref.WeakSet[HookedPoints] = weakref.WeakSet()
        self._is_traced = self._has_operators = False
        _families[self.text] = self

    def settle(self, suffixes: tuple[str, ...], differentiated: tuple[bool, ...]) -> tuple[tuple[int, int], ...] | None:
        """Of tensors with these paths, which autograd may differentiate: (place, site) of each that is a point, in the
        order in which they are offered. None: one of them can't be in a graph."""
        sites: list[tuple[int, int]] = []
        for place, site in next(iter(self.members)).find_sites(suffixes, differentiated):
            if site == BREAK:
                return None
            if site != NOTHING:
                sites.append((place, site))
        self._is_traced, self._has_operators = True, self._has_operators or bool(sites)
        return tuple(sites)

    @property
    def is_silent(self) -> bool:
        """Whether their hooks are in compiled code, and none left an operator, which would tell who is called."""
        return self._is_traced and not self._has_operators


def followed(hook: Callable[..., Any]) -> Callable[..., Any]:
    """The compiler is to follow a hook where it is called, and not to compile it by itself."""
    _codes.add(hook.__code__)
    return hook


def input_hook(points: HookedPoints, apart: Callable[..., Any]) -> Callable[..., Any]:
    """A function of (args, kwargs) that gives what the module gets instead. `apart` does it where this is not traced,
    or cannot be."""
    family, hook, names = points.family.text, points.hook, points.arguments

    @followed
    def before(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if is_exporting():
            return args, kwargs
        if not torch.compiler.is_dynamo_compiling():
            return apart(args, kwargs)
        found: list[tuple[str, torch.Tensor]] = []
        told = True
        for place, value in enumerate(args):
            told = _find(value, names.name_of(place), found) and told
        for name, value in kwargs.items():
            told = _find(value, f".in.{name}", found) and told
        offered = _offer(family, hook, found) if told else None
        if offered is None:
            _tell_of_break()
            return apart(args, kwargs)
        if not offered:
            return args, kwargs
        new = iter(offered)
        return tuple([_rebuilt(value, new) for value in args]), {k: _rebuilt(value, new) for k, value in kwargs.items()}

    return before


def output_hook(points: HookedPoints, apart: Callable[..., Any]) -> Callable[..., Any]:
    """The same for what the module gives."""
    family, hook = points.family.text, points.hook

    @followed
    def after(output: Any) -> Any:
        if is_exporting():
            return output
        if not torch.compiler.is_dynamo_compiling():
            return apart(output)
        found: list[tuple[str, torch.Tensor]] = []
        offered = _offer(family, hook, found) if _find(output, ".out", found) else None
        if offered is None:
            _tell_of_break()
            return apart(output)
        return _rebuilt(output, iter(offered)) if offered else output

    return after


def _offer(family: str, hook: torch.Tensor, found: list[tuple[str, torch.Tensor]]) -> list[torch.Tensor] | None:
    """What takes the places of all of them: none where all stay. None: this call has to break the graph."""
    suffixes = tuple([suffix for suffix, _ in found])
    differentiated = tuple([torch.is_grad_enabled() and tensor.requires_grad for _, tensor in found])
    sites = _settle(family, suffixes, differentiated)
    if sites is None:
        return None
    replacements = [tensor for _, tensor in found]
    changed = False
    for place, site in sites:
        replacements[place] = offer_traced(found[place][1], site, hook)
        changed = changed or replacements[place] is not found[place][1]
    return replacements if changed else []


def _settle(
    family: str, suffixes: tuple[str, ...], differentiated: tuple[bool, ...]
) -> tuple[tuple[int, int], ...] | None:
    compiler: Any = sys.modules["torch._dynamo"]
    for code in _codes:
        compiler.eval_frame.skip_code(code)
    return _families[family].settle(suffixes, differentiated)


def _tell_of_break() -> None:
    hint_once()


def _kind_of(cls: type) -> str:
    """How a container of this class is taken apart and put together in traced code."""
    if cls in (tuple, list, dict, collections.OrderedDict):
        return cls.__name__
    if issubclass(cls, tuple) and hasattr(cls, "_fields"):
        return "named tuple"
    if not is_looked_into(cls):
        return "whole"
    if dataclasses.is_dataclass(cls) and all(field.init for field in dataclasses.fields(cls)):
        return "mapping" if issubclass(cls, dict) else "dataclass"
    return _UNKNOWN


def _fields_of(cls: type) -> tuple[str, ...]:
    if dataclasses.is_dataclass(cls):
        return tuple(field.name for field in dataclasses.fields(cls))
    return tuple(cls._fields)  # type: ignore[attr-defined]


_constant: list[Any] = [_settle, _tell_of_break, _kind_of, _fields_of]
for _function in _constant:
    _function._dynamo_marked_constant = True


def _parts(value: Any, kind: str) -> list[tuple[str, Any]]:
    if kind in ("tuple", "list"):
        return [(str(number), child) for number, child in enumerate(value)]
    if kind in ("dict", "OrderedDict", "mapping"):
        return [(str(key), child) for key, child in value.items()]
    if kind in ("named tuple", "dataclass"):
        return [(name, getattr(value, name)) for name in _fields_of(type(value))]
    return []


def _find(value: Any, suffix: str, found: list[tuple[str, torch.Tensor]]) -> bool:
    """Append the tensors of `value`. False where there may be others that traced code cannot get at."""
    if isinstance(value, torch.Tensor):
        found.append((suffix, value))
        return type(value) is torch.Tensor or type(value) is torch.nn.Parameter
    if value is None or isinstance(value, (bool, int, float, str)):
        return True
    kind = _kind_of(type(value))
    told = kind != _UNKNOWN
    for name, child in _parts(value, kind):
        told = _find(child, f"{suffix}.{name}", found) and told
    return told


def _rebuilt(value: Any, replacements: Any) -> Any:
    """The value with each of its tensors replaced by the next of `replacements`, in the order of `_find`."""
    if isinstance(value, torch.Tensor):
        return next(replacements)
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    kind = _kind_of(type(value))
    if kind == "whole":
        return value
    new = [(name, _rebuilt(child, replacements)) for name, child in _parts(value, kind)]
    children = [child for _, child in new]
    if kind == "tuple":
        return tuple(children)
    if kind == "list":
        return children
    if kind == "named tuple":
        return type(value)(*children)
    if kind == "dataclass" or kind == "mapping":
        return type(value)(**dict(new))
    if kind == "OrderedDict":
        return collections.OrderedDict(zip(value.keys(), children, strict=True))
    return dict(zip(value.keys(), children, strict=True))


# Tracing: a call of a model that makes a program out of it (torch.jit.trace, torch.export, make_fx).
#
# Its values stand for others, so a point of it would mean nothing, and what a point does would become part of the
# program. Hooks are silent there. torch.compile is none of these: its code is run in the model's place.

logger = logging.getLogger("grafter")

_is_jit_tracing = torch._C._is_tracing
_count_modes = torch._C._len_torch_dispatch_stack
_is_key_included = torch._C._dispatch_tls_is_dispatch_key_included
# Where modes act that make_fx(pre_dispatch=True) and torch.export set.
_PRE_DISPATCH = torch._C.DispatchKey.PreDispatch
# Whether torch.export makes a program, by either of its ways. Code that the compiler traces may ask it.
is_exporting: Any = getattr(torch.compiler, "is_exporting", lambda: False)
_told = False


def is_being_traced() -> bool:
    """Whether the call that runs now is one of those."""
    if torch.compiler.is_dynamo_compiling():
        return bool(is_exporting())
    return _is_traced_now()


def _is_traced_now() -> bool:
    if not (_is_jit_tracing() or is_exporting()):
        # Nearly every call runs under no mode at all, which costs less to ask than whether one of them traces.
        if not _count_modes() and not _is_key_included(_PRE_DISPATCH):
            return False
        proxies = sys.modules.get("torch.fx.experimental.proxy_tensor")
        if proxies is None or proxies.get_proxy_mode() is None:
            return False
    _tell_once()
    return True


def _tell_once() -> None:
    global _told
    if not _told:
        _told = True
        logger.info(
            "grafter: a model is being traced (torch.jit.trace, torch.export or make_fx): this call of it has no points"
        )
