"""The value that one rank brings to a point, taken apart."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch

from grafter.core.layout.declared import DeclaredLayout
from grafter.core.leaves import Leaves, TensorSpec, spec_of
from grafter.core.messages.announced_tokens import AnnouncedTokens


# Not frozen: made at every point, and freezing triples what that costs.
@dataclass
class LocalValue:
    """What this rank brings to a point: leaves, or why there are none."""

    value: Any
    leaves: Leaves | None = None
    extras_text: str | None = None
    extras: list[torch.Tensor] = field(default_factory=list)
    layouts: tuple[DeclaredLayout | None, ...] = ()
    axes: tuple[tuple[str, int, int], ...] = ()
    tokens: AnnouncedTokens | None = None
    nothing: str | None = None
    failure: Exception | None = None
    # Of a value without tensors that is plain data: path and value, as JSON.
    plain: dict[str, str] = field(default_factory=dict)

    @property
    def extras_specs(self) -> tuple[TensorSpec, ...]:
        return tuple(spec_of(str(i), tensor) for i, tensor in enumerate(self.extras))

    @property
    def specs(self) -> tuple[TensorSpec, ...]:
        """Of all tensors that travel: the leaves, then those of the extras."""
        return (self.leaves.specs if self.leaves is not None else ()) + self.extras_specs
