"""Containers: the tensors in a module's inputs or outputs, each with its path, and the same containers with others.

Tuples (named ones, too), lists, dicts, dataclasses, a library's output classes and whatever torch knows as a pytree are
looked into. Anything else is passed on as it is.
"""

from __future__ import annotations

import collections
import copy
import dataclasses
import inspect
from collections.abc import Callable, Iterator
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch.utils import _pytree as pytree

from grafter.core.processes import is_from_signal_handler

# A tensor, and its path below the module: `.out`, `.out.0`, `.in.hidden_states`.
Found = list[tuple[str, torch.Tensor]]


def find_tensors(value: Any, suffix: str, found: Found, within: tuple[int, ...] = ()) -> None:
    """Append the tensors of `value`, whose own path is `suffix`. `within`: the containers around it."""
    if isinstance(value, torch.Tensor):
        found.append((suffix, value))
        return
    form = _form_of(value)
    if form is None or id(value) in within:
        return
    for name, child in form.parts(value):
        find_tensors(child, f"{suffix}.{name}", found, (*within, id(value)))


def replace_tensors(value: Any, replacements: Iterator[torch.Tensor], within: tuple[int, ...] = ()) -> Any:
    """The value with each of its tensors replaced by the next of `replacements`, in the order of `find_tensors`.

    Containers in which nothing changed are the same objects; the others are copies of the same class.
    """
    if isinstance(value, torch.Tensor):
        return next(replacements)
    form = _form_of(value)
    if form is None or id(value) in within:
        return value
    old = [child for _, child in form.parts(value)]
    new = [replace_tensors(child, replacements, (*within, id(value))) for child in old]
    return value if all(a is b for a, b in zip(new, old, strict=True)) else form.rebuilt(value, new)


class _Form(NamedTuple):
    """How one class of containers is taken apart, and put together with other parts."""

    parts: Callable[[Any], list[tuple[str, Any]]]
    rebuilt: Callable[[Any, list[Any]], Any]


def is_looked_into(cls: type) -> bool:
    """Whether instances of a class are containers, whose tensors are found."""
    return _form_of_class(cls) is not None or cls in pytree.SUPPORTED_NODES


def _form_of(value: Any) -> _Form | None:
    form = _form_of_class(type(value))  # type: ignore[arg-type]
    if form is None and type(value) in pytree.SUPPORTED_NODES:
        return _REGISTERED
    return form


@lru_cache(maxsize=4096)
def _form_of_class(cls: type) -> _Form | None:
    if cls is tuple:
        return _Form(_numbered, lambda value, new: tuple(new))
    if issubclass(cls, tuple) and hasattr(cls, "_fields"):
        return _Form(lambda value: list(zip(value._fields, value, strict=True)), lambda value, new: value._make(new))
    if issubclass(cls, (list, collections.deque)):
        return _Form(_numbered, _sequence_with)
    if issubclass(cls, (dict, collections.UserDict)):
        return _Form(lambda value: [(str(key), child) for key, child in value.items()], _mapping_with)
    if dataclasses.is_dataclass(cls):
        return _Form(_fields, _dataclass_with)
    return None


def _numbered(value: Any) -> list[tuple[str, Any]]:
    return [(str(number), child) for number, child in enumerate(value)]


def _sequence_with(value: Any, new: list[Any]) -> Any:
    copied = copy.copy(value)
    for number, child in enumerate(new):
        copied[number] = child
    return copied


def _mapping_with(value: Any, new: list[Any]) -> Any:
    copied = copy.copy(value)
    for key, child in zip(list(value), new, strict=True):
        if child is not value[key]:
            copied[key] = child
    return copied


def _fields(value: Any) -> list[tuple[str, Any]]:
    return [(field.name, getattr(value, field.name, None)) for field in dataclasses.fields(value)]


def _dataclass_with(value: Any, new: list[Any]) -> Any:
    # `dataclasses.replace` would run `__post_init__` again, and refuse fields that are no arguments.
    copied = copy.copy(value)
    for (name, old), child in zip(_fields(value), new, strict=True):
        if child is not old:
            object.__setattr__(copied, name, child)
    return copied


def _registered_parts(value: Any) -> list[tuple[str, Any]]:
    try:
        flat, _ = pytree.tree_flatten_with_path(value, is_leaf=lambda part: part is not value)
    except ValueError as error:
        if is_from_signal_handler(error):
            raise
        # Registered without names for its parts: they are numbered.
        return _numbered(pytree.tree_flatten(value, is_leaf=lambda part: part is not value)[0])
    return [(_key_text(path[0]), child) for path, child in flat if path]


def _registered_with(value: Any, new: list[Any]) -> Any:
    return pytree.tree_unflatten(new, pytree.tree_flatten(value, is_leaf=lambda part: part is not value)[1])


def _key_text(key: Any) -> str:
    for attribute in ("key", "idx", "name"):
        if hasattr(key, attribute):
            return str(getattr(key, attribute))
    return str(key)


_REGISTERED = _Form(_registered_parts, _registered_with)


class Arguments:
    """Names for a module's inputs: those of its `forward`, whether they come by position or by name."""

    def __init__(self, module: torch.nn.Module) -> None:
        self._positional: list[str] = []
        self._rest = "args"
        try:
            parameters = inspect.signature(module.forward).parameters.values()
        except (TypeError, ValueError) as error:
            if is_from_signal_handler(error):
                raise
            return
        for parameter in parameters:
            if parameter.kind in (parameter.POSITIONAL_ONLY, parameter.POSITIONAL_OR_KEYWORD):
                self._positional.append(f".in.{parameter.name}")
            elif parameter.kind is parameter.VAR_POSITIONAL:
                self._rest = parameter.name

    def find(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Found:
        found: Found = []
        for number, value in enumerate(args):
            find_tensors(value, self.name_of(number), found)
        for name, value in kwargs.items():
            find_tensors(value, f".in.{name}", found)
        return found

    def replace(
        self, args: tuple[Any, ...], kwargs: dict[str, Any], replacements: Iterator[torch.Tensor]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Both with other tensors, in the order of `find`."""
        return (
            tuple(replace_tensors(value, replacements) for value in args),
            {name: replace_tensors(value, replacements) for name, value in kwargs.items()},
        )

    def name_of(self, number: int) -> str:
        """Of an argument by its position."""
        if number < len(self._positional):
            return self._positional[number]
        return f".in.{self._rest}.{number - len(self._positional)}"
