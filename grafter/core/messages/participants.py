"""Participants: which ranks of its own job share a point, as the call declares them."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch.distributed as dist

from grafter.core.roles import Place
from grafter.errors import UsageError


def own_participants(place: Place, ranks: Any) -> tuple[int, ...]:
    """Role ranks, sorted, from `ranks=`: None (all of the job), role ranks, or one of the job's process groups.

    Raises UsageError for anything else, and where this rank is not among them.
    """
    if ranks is None:
        return tuple(range(place.role_world_size))
    if dist.is_available() and ranks is dist.GroupMember.NON_GROUP_MEMBER:
        raise UsageError(
            f"ranks= is a process group that {place.who} is not in. Only the ranks that share a point dump it."
        )
    if dist.is_available() and isinstance(ranks, dist.ProcessGroup):
        if dist.get_rank() != place.role_rank:
            raise UsageError(
                f"ranks= is a process group, whose ranks count in a world where this process is {dist.get_rank()}; for "
                f"grafter it is {place.who}. Give the role ranks as a list."
            )
        declared = dist.get_process_group_ranks(ranks)
    elif isinstance(ranks, Iterable) and not isinstance(ranks, (str, bytes)):
        declared = list(ranks)
    else:
        raise UsageError(f"ranks={ranks!r} is neither a list of role ranks nor a process group.")
    if not all(type(rank) is int and 0 <= rank < place.role_world_size for rank in declared):
        raise UsageError(f"ranks={declared!r}: each must be a role rank, 0 to {place.role_world_size - 1}.")
    if place.role_rank not in declared:
        raise UsageError(
            f"ranks={declared!r} does not name this rank, {place.role_rank}. Only the ranks that share a point dump it."
        )
    return tuple(sorted(set(declared)))
