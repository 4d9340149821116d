"""Points of a program that knows grafter: hooks on a model's parts, and what each left in the program's hands."""

from __future__ import annotations

from typing import Any

import torch
from common import Seen

import grafter


class Points:
    """What `dump` gave back for each point is kept in `seen`."""

    def __init__(self, seen: Seen) -> None:
        self._seen = seen

    def dump(self, name: str, value: torch.Tensor, layer_id: int, dims: str) -> torch.Tensor:
        kind = type(value).__name__
        value = grafter.dump(name, value, layer_id=layer_id, dims=dims)
        self._seen.keep(f"{name}.{layer_id}", value, kind)
        return value

    def on_input(self, module: torch.nn.Module, name: str, layer_id: int, dims: str) -> None:
        module.register_forward_pre_hook(lambda _, args: (self.dump(name, args[0], layer_id, dims), *args[1:]))

    def on_output(self, module: torch.nn.Module, name: str, layer_id: int, dims: str) -> None:
        module.register_forward_hook(lambda _, args, output: self.dump(name, output, layer_id, dims))


def keep_what_layers_pass_on(model: Any, seen: Seen) -> None:
    """The output of layer i is what the next module gets, [rows, hidden], as `<step>.layer_out.<i>`."""
    for i, following in enumerate([*model.model.layers[1:], model.model.norm]):
        following.register_forward_pre_hook(lambda _, args, i=i: seen.keep(f"layer_out.{i}", args[0][0]))
