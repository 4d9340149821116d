"""Small models, and one-line ways to attach and to record, for the tests of capture."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from grafter.capture.attachment import Attachment
from grafter.capture.naming import Naming
from grafter.config.names import NameRule, PointName
from grafter.core.patterns import read_patterns


class Block(nn.Module):
    """A layer with an argument by position, one by name, and a tuple as output."""

    def __init__(self, width: int = 4) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.up = nn.Linear(width, width)

    def forward(
        self, hidden: torch.Tensor, mask: torch.Tensor | None = None, *, scale: float = 1.0
    ) -> tuple[torch.Tensor, None]:
        out = torch.tanh(self.up(self.norm(hidden))) * scale
        return hidden + (out if mask is None else out * mask), None


class Tower(nn.Module):
    """Blocks in a row; weights depend on the seed alone."""

    def __init__(self, layers: int = 3, width: int = 4, seed: int = 0) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.layers = nn.ModuleList(Block(width) for _ in range(layers))
        self.head = nn.Linear(width, 2)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            hidden, _ = layer(hidden)
        return self.head(hidden)


def some_input(seed: int = 1, width: int = 4) -> torch.Tensor:
    return torch.randn(3, width, generator=torch.Generator().manual_seed(seed))


class Recorder:
    """Takes the place of the graft: keeps what is offered, and replaces where it is told to."""

    def __init__(self, **replacements: Any) -> None:
        self.seen: list[tuple[str, dict[str, Any]]] = []
        self.values: dict[str, torch.Tensor] = {}
        self._replacements = replacements

    def __call__(self, name: PointName, module: str, tensor: torch.Tensor) -> torch.Tensor:
        self.seen.append((name.name, name.tags))
        self.values[name.name] = tensor.detach().clone()
        replace = self._replacements.get(name.name.replace(".", "_"))
        return tensor if replace is None else replace(tensor)

    @property
    def names(self) -> list[str]:
        return [name for name, _ in self.seen]


def attach(
    model: nn.Module, *patterns: str, offer: Any = None, rules: tuple[NameRule, ...] = (), **kinds: bool
) -> tuple[Attachment, Recorder]:
    """An attachment without a run behind it."""
    recorder = offer if offer is not None else Recorder()
    return Attachment(model, read_patterns(patterns), Naming(rules, "target"), recorder, **kinds), recorder


def facts_of(model: nn.Module) -> dict[str, Any]:
    """All that an attachment could change of a model's modules."""
    return {
        path: (
            sorted(module.__dict__),
            type(module),
            len(module._forward_hooks),
            len(module._forward_pre_hooks),
            len(module._forward_hooks_with_kwargs),
            len(module._forward_pre_hooks_with_kwargs),
        )
        for path, module in model.named_modules()
    }
