"""Gradients of parameters: hooks that tell when one has been added up."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import torch
from torch.utils.hooks import RemovableHandle

from grafter.capture.naming import Naming
from grafter.capture.selection import walk
from grafter.config.names import PointName


def watch_gradients(
    model: torch.nn.Module,
    paths: Iterable[str],
    naming: Naming,
    came: Callable[[PointName, torch.Tensor], None],
) -> list[RemovableHandle]:
    """Hooks on the own parameters of the modules at these paths, called each time their gradient has been added to."""
    chosen = set(paths)
    handles: list[RemovableHandle] = []
    watched: set[int] = set()
    for path, module in walk(model):
        if path not in chosen:
            continue
        for own, parameter in module.named_parameters(recurse=False):
            # Tied ones once.
            if parameter.requires_grad and id(parameter) not in watched:
                watched.add(id(parameter))
                name = naming.of_weight(model, f"{path}.{own}" if path else own)
                hooked: Any = parameter
                handle = hooked.register_post_accumulate_grad_hook(partial(came, name))
                _put_first(hooked._post_accumulate_grad_hooks, handle.id)
                handles.append(handle)
    return handles


def _put_first(hooks: dict[int, Any], own: int) -> None:
    """Before the program's own: one of these may step an optimizer and drop the gradient.

    Autograd calls them in the order in which they were inserted, whatever `OrderedDict.move_to_end` says.
    """
    for other in [key for key in hooks if key != own]:
        hooks[other] = hooks.pop(other)
