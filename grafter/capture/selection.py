"""Selection: which modules of a model get hooks, by patterns over path and class; and paths without wrappers."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from grafter.core.patterns import Pattern

# Modules that wrap another one and are not part of the model.
_WRAPPER_CLASSES = frozenset(
    ("DistributedDataParallel", "DataParallel", "FullyShardedDataParallel", "OptimizedModule", "CheckpointWrapper")
    + ("Float16Module",)
)


def select_modules(model: torch.nn.Module, patterns: tuple[Pattern, ...]) -> list[tuple[str, torch.nn.Module]]:
    """(path without wrappers, module) of the selected modules, in the model's order.

    A path is selected if a positive pattern matches it, or if there is none, unless an excluding one matches it. A
    module with several paths is selected once, by its first selected path. Containers that cannot be called
    (ModuleList, ModuleDict) are left out.
    """
    positive = [pattern for pattern in patterns if not pattern.excludes]
    negative = [pattern for pattern in patterns if pattern.excludes]
    selected: dict[torch.nn.Module, str] = {}
    for path, module in walk(model):
        if module in selected or not _can_be_called(module):
            continue
        chosen = any(p.matches(path, module) for p in positive) if positive else True
        if chosen and not any(p.matches(path, module) for p in negative):
            selected[module] = path
    return [(path, module) for module, path in selected.items()]


def walk(model: torch.nn.Module) -> Iterator[tuple[str, torch.nn.Module]]:
    """(path, module) of all modules but wrappers, with the paths that they would have without wrappers.

    A module that occurs in several places is listed once for each.
    """
    pending = [("", model)]
    while pending:
        path, module = pending.pop()
        if is_wrapper(module):
            children = [(path, child) for child in module._modules.values() if child is not None]
        else:
            yield path, module
            children = [
                (f"{path}.{name}" if path else name, child)
                for name, child in module._modules.items()
                if child is not None
            ]
        pending += reversed(children)


def is_wrapper(module: torch.nn.Module) -> bool:
    """Whether a module is one of the known wrappers, such as DistributedDataParallel."""
    return type(module).__name__ in _WRAPPER_CLASSES


def _can_be_called(module: torch.nn.Module) -> bool:
    return "forward" in module.__dict__ or type(module).forward is not torch.nn.Module.forward


def module_at(model: torch.nn.Module, path: str) -> torch.nn.Module:
    """The module at a path without wrappers. Raises AttributeError if there is none."""
    here = unwrapped(model)
    for segment in path.split(".") if path else ():
        child = here._modules.get(segment)
        if child is None:
            raise AttributeError(f"{type(here).__name__} has no module {segment!r}")
        here = unwrapped(child)
    return here


def unwrapped(module: torch.nn.Module) -> torch.nn.Module:
    """The module inside all wrappers."""
    while is_wrapper(module):
        inner = next((child for child in module._modules.values() if child is not None), None)
        if inner is None:
            return module
        module = inner
    return module
