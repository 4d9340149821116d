"""Which variables of the program hold a model, and what else tells it from others of its class.

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

# Values looked at of each weight.
_VALUES = 64
# How much a name says, the most first.
_PLACE, _VARIABLE, _ATTRIBUTE, _ARGUMENT = 0, 1, 2, 3
# What holds everything, and says nothing of what it is.
_SAYS_NOTHING = frozenset({"_", "self", "cls", "module", "modules"})


@dataclass(frozen=True)
class ModelFacts:
    """What tells a model from others. given_name: the user's, with which its points begin; None where there is none."""

    class_name: str
    variables: list[str]
    first_call: str = ""
    given_name: str | None = None


def class_name_of(model: torch.nn.Module) -> str:
    """The class of the model without wrappers; FSDP2 makes one of its own of each."""
    cls = type(unwrapped(model))
    if any(base.__name__ == "FSDPModule" for base in cls.__bases__):
        cls = cls.__bases__[-1]
    return cls.__name__


def variables_of(model: torch.nn.Module) -> tuple[list[str], list[str]]:
    """Names that hold the model now, the best first: its place in a list, globals and locals, attributes and keys. And
    the arguments that do, which are the called functions' words for whatever they are given.

    Called where the program calls a model: locals and arguments are those of the functions that run.
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
                # A loop over the list has a variable for each in turn.
                yield f"{name}.{places[0]}", _ARGUMENT if rank == _ARGUMENT else _PLACE
        elif isinstance(holder, torch.nn.Module) or type(holder).__module__.startswith("grafter."):
            continue
        else:
            yield from ((name, _ATTRIBUTE) for name, value in _attributes(holder).items() if value is thing)


def _is_name(name: Any) -> bool:
    return isinstance(name, str) and name.isidentifier()


def _attributes(holder: Any) -> dict[str, Any]:
    """Without running code of the object's own."""
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
    """A function's variables, copied. What Python remembers of them would keep alive what the function deletes."""
    variables = frame.f_locals
    found = dict(variables)
    # Held by the frame, by `variables`, and by the call: then it is not what the function itself got from `locals()`.
    if frame.f_code.co_flags & inspect.CO_OPTIMIZED and type(variables) is dict and sys.getrefcount(variables) <= 3:
        variables.clear()
    return found


def _arguments(frame: FrameType) -> tuple[str, ...]:
    code = frame.f_code
    return code.co_varnames[: code.co_argcount + code.co_kwonlyargcount]


def digest_of(model: torch.nn.Module) -> str:
    """Of some values of each weight as this rank holds it, bit by bit; empty where they cannot be read."""
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
        # Weights that are not there yet (lazy, on meta), or of a kind that has no values.
        return ""
    return digest.hexdigest()
