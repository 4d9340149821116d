"""Parameters and buffers as points, in one order on all ranks, so that two jobs can start from the same weights."""

from __future__ import annotations

from collections.abc import Callable, Iterable
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

    A tied weight is listed under each of its paths, since it may be untied in the other job.
    """
    found: dict[str, torch.Tensor] = {}
    for path, module in walk(model):
        for name, tensor in (*module._parameters.items(), *module._buffers.items()):
            if tensor is not None and name not in module._non_persistent_buffers_set:
                found[f"{path}.{name}" if path else name] = tensor
    return sorted(found.items(), key=lambda item: item[0])


def dump_weights(
    model: torch.nn.Module, naming: Naming, offer: Callable[[PointName, torch.Tensor], torch.Tensor]
) -> int:
    """Offer each weight as a point, and return how many there are. The result is written into the weight, even if a
    rule says `write: return`."""
    weights = named_weights(model)
    for path, tensor in weights:
        result = offer(naming.of_weight(model, path), tensor)
        if result is not tensor:
            with torch.no_grad():
                local_tensor(tensor).data.copy_(local_tensor(result))
    return len(weights)


def watch_gradients(
    model: torch.nn.Module,
    paths: Iterable[str],
    naming: Naming,
    accumulated: Callable[[PointName, torch.Tensor], None],
) -> list[RemovableHandle]:
    """Hooks on the parameters of the modules at these paths, which report each accumulated gradient."""
    chosen = set(paths)
    handles: list[RemovableHandle] = []
    watched: set[int] = set()
    for path, module in walk(model):
        if path not in chosen:
            continue
        for own, parameter in module.named_parameters(recurse=False):
            # A tied parameter gets one hook.
            if parameter.requires_grad and id(parameter) not in watched:
                watched.add(id(parameter))
                name = naming.of_weight(model, f"{path}.{own}" if path else own)
                hooked: Any = parameter
                handle = hooked.register_post_accumulate_grad_hook(partial(accumulated, name))
                _put_first(hooked._post_accumulate_grad_hooks, handle.id)
                handles.append(handle)
    return handles


def _put_first(hooks: dict[int, Any], own: int) -> None:
    """Move our hook before the program's hooks, which may step an optimizer and drop the gradient.

    Autograd calls hooks in the order of insertion, which `OrderedDict.move_to_end` does not change.
    """
    for other in [key for key in hooks if key != own]:
        hooks[other] = hooks.pop(other)
