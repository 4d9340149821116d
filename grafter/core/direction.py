"""Direction: which way a point's tensor goes, as the filters decide it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    pass

Direction = Literal["b2t", "t2b", "compare"]
RoleName = Literal["baseline", "target"]


def sender_role(direction: Direction) -> RoleName:
    """Who sends. In a comparison the baseline sends and the target computes the difference."""
    return "target" if direction == "t2b" else "baseline"


def receiver_role(direction: Direction) -> RoleName:
    return "baseline" if direction == "t2b" else "target"
