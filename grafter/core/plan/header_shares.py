"""The shares of a tensor that the headers of one role declare."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from grafter.core.layout.declared import DeclaredLayout, Layout
from grafter.core.layout.dims import LARGEST_SIZE, parse_dims
from grafter.core.layout.places import Member
from grafter.core.layout.runs import whole
from grafter.core.layout.shares import (
    RoleShares,
    Share,
    _checked,
    _of_boxes,
    boxes_of,
    declared_alike,
    dims_of,
    of_dims,
    of_dtensors,
)
from grafter.errors import LayoutError

if TYPE_CHECKING:
    from grafter.core.messages.manifest import Header


def find_shares(headers: Sequence[Header], leaf: int) -> RoleShares | None:
    """None where this role declares nothing. Raises LayoutError where what its ranks declare does not fit together."""
    members = [member_of(header, leaf) for header in headers]
    present = declared_alike(members, [declared_of(header, leaf) for header in headers])
    if not present:
        return None
    if present[0].runs is not None:
        return _checked(of_dtensors(members, present, dims_of(present[0])))
    if present[0].boxes is not None:
        return _checked(_of_boxes(members, present))
    return _checked(of_dims(members, present[0], parse_dims(present[0].dims or "")))


def whole_tensor(header: Header, leaf: int) -> RoleShares:
    """A role of one rank that declares nothing: its tensor is the whole one."""
    shape = member_of(header, leaf).shape
    share = Share(tuple(whole(size) for size in shape))
    return _checked(RoleShares(header.role, "the whole tensor", None, shape, {header.role_rank: share}))


def member_of(header: Header, leaf: int) -> Member:
    shape = header.leaves[leaf].shape
    for size in shape:
        if not 0 <= size <= LARGEST_SIZE:
            raise LayoutError(f"{header.who} says that its tensor is {list(shape)}.")
    return Member(header.role, header.role_rank, header.axes, shape)


def declared_of(header: Header, leaf: int) -> DeclaredLayout | None:
    if header.layouts and len(header.layouts) != len(header.leaves):
        raise LayoutError(f"{header.who} has {len(header.leaves)} tensors and {len(header.layouts)} layouts.")
    return header.layouts[leaf] if header.layouts else None


def layouts_of(headers: Sequence[Header], leaf: int) -> dict[int, Layout] | None:
    """Every rank's layout as boxes, for a transform that wants to know; None where there is none that fits."""
    try:
        found = find_shares(headers, leaf)
        if found is None:
            return None
        return {rank: Layout(found.global_shape, boxes_of(share)) for rank, share in found.shares.items()}
    except LayoutError:
        return None
