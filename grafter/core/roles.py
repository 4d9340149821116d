"""Roles: which job and rank this is, and which way a point's tensor goes between the two jobs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

SHARED_SETTINGS = ("b2t_filter", "t2b_filter", "compare_filter", "key")


@dataclass(frozen=True)
class Place:
    """Which rank of which job this process is."""

    role: RoleName
    role_rank: int
    role_world_size: int

    @property
    def who(self) -> str:
        return f"{self.role} rank {self.role_rank}"


# Direction: which way a point's tensor goes, as the filters decide it.


Direction = Literal["b2t", "t2b", "compare"]
RoleName = Literal["baseline", "target"]


def sender_role(direction: Direction) -> RoleName:
    """Who sends. In a comparison the baseline sends and the target computes the difference."""
    return "target" if direction == "t2b" else "baseline"


def receiver_role(direction: Direction) -> RoleName:
    return "baseline" if direction == "t2b" else "target"
