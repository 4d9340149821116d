"""Parameters and buffers as points, in one order on all ranks, so that two jobs can start from the same weights."""

from __future__ import annotations

from collections.abc import Callable

import torch

from grafter.capture.naming import Naming
from grafter.capture.selection import clean_path
from grafter.names import PointName


def named_weights(model: torch.nn.Module) -> list[tuple[str, torch.Tensor]]:
    """(path without wrappers, tensor) of all parameters and persistent buffers, sorted by path; tied ones once."""
    persistent = set(model.state_dict(keep_vars=True))
    found = [
        *model.named_parameters(),
        *((path, buffer) for path, buffer in model.named_buffers() if path in persistent),
    ]
    return sorted(((clean_weight_path(model, path), tensor) for path, tensor in found), key=lambda item: item[0])


def clean_weight_path(model: torch.nn.Module, raw: str) -> str:
    owner, _, own = raw.rpartition(".")
    path = clean_path(model, owner)
    return f"{path}.{own}" if path else own


def dump_weights(
    model: torch.nn.Module, naming: Naming, offer: Callable[[PointName, torch.Tensor], torch.Tensor]
) -> int:
    """Offer each; how many there were."""
    weights = named_weights(model)
    for path, tensor in weights:
        offer(naming.of_module(model, path), tensor)
    return len(weights)
