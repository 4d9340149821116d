"""Parameters and buffers as points, in one order on all ranks, so that two jobs can start from the same weights."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch

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
