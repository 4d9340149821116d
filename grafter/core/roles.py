"""Roles: which of the two jobs a process belongs to, and which way a point's tensor goes between the jobs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Role = Literal["baseline", "target"]
ROLES: tuple[Role, Role] = ("baseline", "target")
# Which way a point's tensor goes: from baseline to target, from target to baseline, or nowhere (it is compared).
Direction = Literal["b2t", "t2b", "compare"]

# Settings that both jobs must have alike.
SHARED_SETTINGS = ("b2t_filter", "t2b_filter", "compare_filter", "key")


@dataclass(frozen=True)
class RankIdentity:
    """Which rank of which job a process is."""

    role: Role
    role_rank: int
    role_world_size: int

    @property
    def who(self) -> str:
        """The rank as messages name it, such as `target rank 3`."""
        return f"{self.role} rank {self.role_rank}"


def sender_role(direction: Direction) -> Role:
    """The role that sends. In a comparison the baseline sends, and the target computes the difference."""
    return "target" if direction == "t2b" else "baseline"


def receiver_role(direction: Direction) -> Role:
    """The role that receives."""
    return "baseline" if direction == "t2b" else "target"
