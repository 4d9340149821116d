"""Which variables of the program hold a model, and what else distinguishes it from others of its class.

Both jobs' programs usually hold the same model in a variable of the same name: a global, a local of a function that
runs, an attribute, a key of a dict, a place in a list (`models.1`).
"""

from __future__ import annotations

import gc
import hashlib
import inspect
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from types import FrameType
from typing import Any

import torch

from grafter.capture.selection import unwrapped
from grafter.core.points import is_passed_over
from grafter.core.processes import is_from_signal_handler
from grafter.core.tensor_access import local_tensor

# How many values at either end of each weight are read.
_VALUES = 64
# How much a kind of name says, the most first.
_PLACE, _VARIABLE, _ATTRIBUTE, _ARGUMENT = 0, 1, 2, 3
# Names that say nothing about what they hold.
_SAYS_NOTHING = frozenset({"_", "self", "cls", "module", "modules"})


@dataclass(frozen=True)
class ModelFacts:
    """The facts that distinguish a model. given_name: the user's name for it, which begins the names of its points."""

    class_name: str
    variables: list[str]
    first_call: str = ""
    given_name: str | None = None


def class_name_of(model: torch.nn.Module) -> str:
    """The name of the model's class, without wrappers and without the subclass that FSDP2 makes."""
    cls = type(unwrapped(model))
    if any(base.__name__ == "FSDPModule" for base in cls.__bases__):
        cls = cls.__bases__[-1]
    return cls.__name__


def variables_of(model: torch.nn.Module) -> tuple[list[str], list[str]]:
    """(names that hold the model, the most telling first; names of arguments that hold it).

    The names are its place in a list, globals and locals, attributes and keys. Names of arguments are the words of the
    called functions for any model. Called while the program calls a model: locals and arguments are those of the
    functions that run.
    """
    found: dict[str, int] = {}
    for thing in dict.fromkeys((model, unwrapped(model))):
        for name, rank in _names_of(thing, with_containers=True):
            if name not in _SAYS_NOTHING:
                found[name] = min(rank, found.get(name, rank))
    names = sorted(found, key=lambda name: (found[name], name))
    return [n for n in names if found[n] < _ARGUMENT], [n for n in names if found[n] == _ARGUMENT]


def _names_of(thing: Any, *, with_containers: bool) -> Iterator[tuple[str, int]]:
    frames = [(_arguments(frame), _locals_of(frame)) for frame in _users_frames()]
    for arguments, variables in frames:
        for name, value in variables.items():
            if value is thing:
                yield name, _ARGUMENT if name in arguments else _VARIABLE
    passed_over = {id(found) for found in (frames, *(variables for _, variables in frames))}
    for holder in gc.get_referrers(thing):
        if id(holder) in passed_over:
            continue
        if isinstance(holder, dict):
            rank = _VARIABLE if "__name__" in holder and "__builtins__" in holder else _ATTRIBUTE
            yield from ((name, rank) for name, value in list(holder.items()) if value is thing and _is_name(name))
        elif isinstance(holder, (list, tuple)) and with_containers:
            places = [place for place, value in enumerate(holder) if value is thing]
            for name, rank in _names_of(holder, with_containers=False) if places else ():
                # The variable of a loop over the list would hold each model in turn.
                yield f"{name}.{places[0]}", _ARGUMENT if rank == _ARGUMENT else _PLACE
        elif isinstance(holder, torch.nn.Module) or type(holder).__module__.startswith("grafter."):
            continue
        else:
            yield from ((name, _ATTRIBUTE) for name, value in _attributes(holder).items() if value is thing)


def _is_name(name: Any) -> bool:
    return isinstance(name, str) and name.isidentifier()


def _attributes(holder: Any) -> dict[str, Any]:
    """The attributes of an object, read without running its code."""
    try:
        return dict(object.__getattribute__(holder, "__dict__"))
    except (AttributeError, TypeError):
        return {}


def _users_frames() -> Iterator[FrameType]:
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        if not is_passed_over(frame.f_code.co_filename):
            yield frame
        frame = frame.f_back


def _locals_of(frame: FrameType) -> dict[str, Any]:
    """A copy of a function's variables. Python's cache of them, which would keep deleted values alive, is cleared."""
    variables = frame.f_locals
    found = dict(variables)
    # With three references (the frame, `variables`, the call), it is not a dict that the function got from `locals()`.
    if frame.f_code.co_flags & inspect.CO_OPTIMIZED and type(variables) is dict and sys.getrefcount(variables) <= 3:
        variables.clear()
    return found


def _arguments(frame: FrameType) -> tuple[str, ...]:
    code = frame.f_code
    return code.co_varnames[: code.co_argcount + code.co_kwonlyargcount]


def digest_of(model: torch.nn.Module) -> str:
    """A digest of some values of each weight, bit by bit, as this rank holds it; empty if they cannot be read."""
    digest = hashlib.blake2b(digest_size=12)
    try:
        for parameter in unwrapped(model).parameters():
            local = local_tensor(parameter.detach()).reshape(-1)
            digest.update(f"{tuple(parameter.shape)} {parameter.dtype} {local.numel()}".encode())
            some = torch.cat([local[:_VALUES], local[-_VALUES:]]).contiguous().view(torch.uint8)
            digest.update(bytes(some.tolist()))
    except (RuntimeError, ValueError, TypeError, AttributeError) as error:
        if is_from_signal_handler(error):
            raise
        # Weights without values yet (lazy, on meta), or of a kind that has none.
        return ""
    return digest.hexdigest()
