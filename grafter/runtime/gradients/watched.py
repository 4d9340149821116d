"""Gradients that are points, from the forward pass, which settles them, until they arrive."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from grafter.core.points import PointKey
from grafter.core.roles import Direction
from grafter.runtime.point_preparation import Point

if TYPE_CHECKING:
    import torch

    from grafter.store.dumps.pending_record import PendingRecord

BACKWARD = "backward"
NO_GRADIENT = "no gradient reached this point"


@dataclass
class WatchedGradient:
    """A gradient that is expected, and exchanged. taken: as it arrived, where it is saved, until it is exchanged."""

    point: Point
    saves: bool = False
    gradient: torch.Tensor | None = None
    met: bool = False
    # Its step is over, and it had not arrived by then.
    ended: bool = False
    taken: PendingRecord | None = None

    @property
    def key(self) -> PointKey:
        """What identifies it in both jobs."""
        return self.point.key

    @property
    def direction(self) -> Direction:
        """Which way it goes."""
        assert self.point.direction is not None
        return self.point.direction


@dataclass
class SavedGradient:
    """A gradient that is only saved when it arrives. Its point has a direction if it is recorded for a later graft."""

    point: Point
    came: bool = False

    @property
    def key(self) -> PointKey:
        """What identifies it in the job."""
        return self.point.key
