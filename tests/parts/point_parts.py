"""Headers and rosters for tests of the pure parts."""

from __future__ import annotations

from typing import Any

import torch

from grafter.core.leaves import TensorSpec
from grafter.core.messages.manifest import Header, Manifest, Pair
from grafter.core.messages.roster import Announcement, Roster
from grafter.core.process_identity import ProcessIdentity


def spec(*shape: int, dtype: torch.dtype = torch.float32, path: str = "") -> TensorSpec:
    return TensorSpec(path=path, shape=shape, dtype=str(dtype).removeprefix("torch."), device="cpu")


def header(role: Any, role_rank: int, of: int = 1, **fields: Any) -> Header:
    """Rank `role_rank` of `of` participants, with one float32 tensor [4] unless told otherwise."""
    given = {
        "participants": tuple(range(of)),
        "direction": "b2t",
        "call_site": f"{role}.py:{role_rank}",
        "leaves": (spec(4),),
        "structure": "tensor",
        **fields,
    }
    return Header(role=role, role_rank=role_rank, **given)


def pair(baseline: list[Header], target: list[Header]) -> Pair:
    return Pair(Manifest(role="baseline", headers=tuple(baseline)), Manifest(role="target", headers=tuple(target)))


def sides(baseline: int, target: int, **fields: Any) -> Pair:
    """All ranks alike."""
    return pair(
        [header("baseline", r, baseline, **fields) for r in range(baseline)],
        [header("target", r, target, **fields) for r in range(target)],
    )


def roster(baseline: int, target: int) -> Roster:
    def announcement(role: Any, rank: int, size: int) -> Announcement:
        process = ProcessIdentity(host="h", hostname="h", uid=0, pid=100 + rank, start_time=1)
        return Announcement(
            protocol_version=1, grafter_version="0", role=role, role_rank=rank, role_world_size=size, process=process,
            restart_count=0, shared_settings={}, expected_world_sizes={},
        )  # fmt: skip

    return Roster(
        tuple(announcement("baseline", r, baseline) for r in range(baseline)),
        tuple(announcement("target", r, target) for r in range(target)),
    )
