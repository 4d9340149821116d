"""The place of a rank: its job, its rank there, and what both jobs must have set alike."""

from __future__ import annotations

from dataclasses import dataclass

from grafter.core.direction import RoleName

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
