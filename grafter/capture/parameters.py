"""Parameters and buffers as points, in one order on all ranks, so that two jobs can start from the same weights."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from functools import partial
from typing import Any

import torch
from torch.utils.hooks import RemovableHandle

from grafter.capture.naming import Naming
from grafter.capture.selection import walk
from grafter.config.names import PointName
from grafter.core.tensor_access import local_tensor


def named_weights(model: torch.nn.Module) -> list[tuple[str, torch.Tensor]]:
    """(path without wrappers, tensor) of all parameters and persistent buffers, sorted by path.

    A tied weight comes under each of its paths: the other job may have it untied.
    """
    found: dict[str, torch.Tensor] = dict(_own_parameters(model))
    for path, module in walk(model):
        for name, buffer in module._buffers.items():
            if buffer is not None and name not in module._non_persistent_buffers_set:
                found[_joined(path, name)] = buffer
    return sorted(found.items(), key=lambda item: item[0])


def _own_parameters(model: torch.nn.Module) -> Iterator[tuple[str, torch.nn.Parameter]]:
    for path, module in walk(model):
        for name, parameter in module._parameters.items():
            if parameter is not None:
                yield _joined(path, name), parameter


def _joined(path: str, name: str) -> str:
    return f"{path}.{name}" if path else name


def dump_weights(
    model: torch.nn.Module, naming: Naming, offer: Callable[[PointName, torch.Tensor], torch.Tensor]
) -> int:
    """Offer each; how many there were. What comes is in the weight, even where a rule says that it is returned."""
    weights = named_weights(model)
    for path, tensor in weights:
        came = offer(naming.of_weight(model, path), tensor)
        if came is not tensor:
            with torch.no_grad():
                local_tensor(tensor).data.copy_(local_tensor(came))
    return len(weights)


# Gradients of parameters: hooks that tell when one has been added up.


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
