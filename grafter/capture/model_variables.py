"""Which variables of the program hold a model, and what else tells it from others of its class.

Both jobs' programs usually hold the same model in a variable of the same name: a global, a local of a function that
runs, an attribute, a key of a dict, a place in a list (`models.1`).
"""

from __future__ import annotations

import gc
import hashlib
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from types import FrameType
from typing import Any

import torch

from grafter.capture.selection import unwrapped
from grafter.points import is_passed_over
from grafter.writing.tensor_access import local_tensor

# Values looked at of each weight.
_VALUES = 64
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


def variables_of(model: torch.nn.Module) -> list[str]:
    """Names that hold the model now, the best first: globals and locals, then attributes and keys, then arguments.

    Called where the program calls a model: locals are those of the functions that run.
    """
    found: dict[str, int] = {}
    for thing in dict.fromkeys((model, unwrapped(model))):
        for name, rank in _names_of(thing, with_containers=True):
            if name not in _SAYS_NOTHING:
                found[name] = min(rank, found.get(name, rank))
    best = min(found.values(), default=0)
    # An argument's name is the called function's word for whatever it is given.
    return sorted((name for name in found if found[name] < 2 or best == 2), key=lambda name: (found[name], name))


def _names_of(thing: Any, *, with_containers: bool) -> Iterator[tuple[str, int]]:
    frames = list(_users_frames())
    copies = [frame.f_locals for frame in frames if frame.f_locals is not frame.f_globals]
    for frame in frames:
        arguments = _arguments(frame)
        for name, value in list(frame.f_locals.items()):
            if value is thing:
                yield name, 2 if name in arguments else 0
    passed_over = {id(found) for found in (copies, frames, *copies)}
    for holder in gc.get_referrers(thing):
        if id(holder) in passed_over:
            continue
        if isinstance(holder, dict):
            rank = 0 if "__name__" in holder and "__builtins__" in holder else 1
            yield from ((name, rank) for name, value in list(holder.items()) if value is thing and _is_name(name))
        elif isinstance(holder, (list, tuple)) and with_containers:
            places = [place for place, value in enumerate(holder) if value is thing]
            for name, rank in _names_of(holder, with_containers=False) if places else ():
                yield f"{name}.{places[0]}", rank
        elif isinstance(holder, torch.nn.Module) or type(holder).__module__.startswith("grafter."):
            continue
        else:
            yield from ((name, 1) for name, value in _attributes(holder).items() if value is thing)


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
    except (RuntimeError, ValueError, TypeError, AttributeError):
        # Weights that are not there yet (lazy, on meta), or of a kind that has no values.
        return ""
    return digest.hexdigest()
