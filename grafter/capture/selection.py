"""Selection: which modules of a model get hooks, by patterns over path and class; and paths without wrappers."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from grafter.core.patterns import Pattern

# Modules that wrap another one and stand in its path without being part of the model.
WRAPPER_SEGMENTS = frozenset({"_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"})
_WRAPPER_CLASSES = frozenset(
    {
        "DistributedDataParallel",
        "DataParallel",
        "FullyShardedDataParallel",
        "OptimizedModule",
        "CheckpointWrapper",
        "Float16Module",
    }
)


def select_modules(model: torch.nn.Module, patterns: tuple[Pattern, ...]) -> list[tuple[str, torch.nn.Module]]:
    """(path without wrappers, module) of the selected ones, in the model's order.

    A path is selected that a positive pattern matches, or any where there is none, unless an excluding one matches it.
    A module with several paths is selected once, by the first of its selected paths. Containers that nothing can call
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
    """All modules but wrappers, with their paths as the model without wrappers would have them.

    A module that the model has in several places comes once for each.
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
    return type(module).__name__ in _WRAPPER_CLASSES


def _can_be_called(module: torch.nn.Module) -> bool:
    return "forward" in module.__dict__ or type(module).forward is not torch.nn.Module.forward


def clean_path(model: torch.nn.Module, raw: str) -> str:
    """A path as `named_modules` gives it without the segments of wrappers (DDP's `module`, torch.compile's, ...)."""
    segments, here = [], model
    for segment in raw.split(".") if raw else ():
        wrapped = is_wrapper(here) and segment in here._modules
        here = here.get_submodule(segment)
        if not wrapped and segment not in WRAPPER_SEGMENTS:
            segments.append(segment)
    return ".".join(segments)


def module_at(model: torch.nn.Module, path: str) -> torch.nn.Module:
    """The module at a path without wrappers. Raises AttributeError where there is none."""
    here = unwrapped(model)
    for segment in path.split(".") if path else ():
        child = here._modules.get(segment)
        if child is None:
            raise AttributeError(f"{type(here).__name__} has no module {segment!r}")
        here = unwrapped(child)
    return here


def unwrapped(module: torch.nn.Module) -> torch.nn.Module:
    """What the wrappers around a module wrap."""
    while is_wrapper(module):
        inner = next((child for child in module._modules.values() if child is not None), None)
        if inner is None:
            return module
        module = inner
    return module
