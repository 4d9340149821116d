"""Containers: the tensors in a module's inputs or outputs, each with its path, and the same containers with others."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch.utils import _pytree as pytree

# Of one tensor: its path below the module (`.0`, `.hidden_states`), and itself. It returns what takes its place.
Visit = Callable[[str, torch.Tensor], torch.Tensor]


def replace_tensors(value: Any, suffix: str, visit: Visit) -> Any:
    """The value with each of its tensors replaced by what `visit` gives; the value itself where none changed.

    Tuples (named ones, too), lists, dicts, dataclasses and whatever torch knows as a pytree are looked into.
    """
    if isinstance(value, torch.Tensor):
        return visit(suffix, value)
    if dataclasses.is_dataclass(value) and not isinstance(value, type) and not _is_node(value):
        return _replace_in_dataclass(value, suffix, visit)
    if not _is_node(value):
        return value
    children, context = pytree.SUPPORTED_NODES[pytree._get_node_type(value)].flatten_fn(value)
    names = _child_names(value, len(children))
    replaced = [replace_tensors(child, f"{suffix}.{name}", visit) for name, child in zip(names, children, strict=True)]
    if all(new is old for new, old in zip(replaced, children, strict=True)):
        return value
    return pytree.SUPPORTED_NODES[pytree._get_node_type(value)].unflatten_fn(replaced, context)


def _is_node(value: Any) -> bool:
    return pytree._get_node_type(value) in pytree.SUPPORTED_NODES


def _child_names(value: Any, count: int) -> list[str]:
    flatten = pytree.SUPPORTED_NODES[pytree._get_node_type(value)].flatten_with_keys_fn
    if flatten is not None:
        try:
            return [_key_text(key) for key, _ in flatten(value)[0]]
        except (TypeError, ValueError):
            pass
    if hasattr(value, "keys") and len(value) == count:
        return [str(key) for key in value.keys()]  # noqa: SIM118 - a model's output class is no real dict
    return [str(number) for number in range(count)]


def _key_text(key: Any) -> str:
    for attribute in ("key", "idx", "name"):
        if hasattr(key, attribute):
            return str(getattr(key, attribute))
    return str(key)


def _replace_in_dataclass(value: Any, suffix: str, visit: Visit) -> Any:
    changed = {}
    for field in dataclasses.fields(value):
        child = getattr(value, field.name, None)
        new = replace_tensors(child, f"{suffix}.{field.name}", visit)
        if new is not child:
            changed[field.name] = new
    return dataclasses.replace(value, **changed) if changed else value


class Arguments:
    """Names for a module's inputs: those of its `forward`, whether they come by position or by name."""

    def __init__(self, module: torch.nn.Module) -> None:
        self._positional: list[str] = []
        self._rest = "args"
        try:
            parameters = inspect.signature(module.forward).parameters.values()
        except (TypeError, ValueError):
            return
        for parameter in parameters:
            if parameter.kind in (parameter.POSITIONAL_ONLY, parameter.POSITIONAL_OR_KEYWORD):
                self._positional.append(parameter.name)
            elif parameter.kind is parameter.VAR_POSITIONAL:
                self._rest = parameter.name

    def replace(
        self, args: tuple[Any, ...], kwargs: dict[str, Any], visit: Visit
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Both with their tensors replaced; the same objects where nothing changed."""
        new_args = tuple(
            replace_tensors(value, f".in.{self._name_of(number)}", visit) for number, value in enumerate(args)
        )
        new_kwargs = {name: replace_tensors(value, f".in.{name}", visit) for name, value in kwargs.items()}
        same = all(new is old for new, old in zip(new_args, args, strict=True)) and all(
            new_kwargs[name] is kwargs[name] for name in kwargs
        )
        return (args, kwargs) if same else (new_args, new_kwargs)

    def _name_of(self, number: int) -> str:
        if number < len(self._positional):
            return self._positional[number]
        return f"{self._rest}.{number - len(self._positional)}"
