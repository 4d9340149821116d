"""Gradients that are points, from the forward pass, which settles them, until they arrive."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from grafter.config.options import PointOptions
from grafter.core.direction import Direction
from grafter.core.points import PointKey

if TYPE_CHECKING:
    import torch

    from grafter.store.dumps.taken import Taken

PHASE = "backward"
NO_GRADIENT = "no gradient came to this point"


@dataclass
class WatchedGradient:
    """A gradient that is expected, and exchanged. taken: as it arrived, where it is saved, until it is exchanged."""

    key: PointKey
    direction: Direction
    tags: dict[str, Any]
    options: PointOptions
    call_site: str
    module: str | None = None
    saves: bool = False
    is_parameter: bool = False
    gradient: torch.Tensor | None = None
    met: bool = False
    # Its step is over, and it had not arrived by then.
    ended: bool = False
    taken: Taken | None = None


@dataclass
class SavedGradient:
    """A gradient that is only saved when it arrives. direction: where it is recorded for a later graft."""

    key: PointKey
    tags: dict[str, Any]
    options: PointOptions
    call_site: str
    module: str | None = None
    direction: Direction | None = None
    is_parameter: bool = False
    came: bool = False
