"""Shares: which part of the global tensor each rank of a role holds, worked out from all its headers.

    headers of one role  ->  sizes per place  ->  offsets as prefix sums  ->  a Share per rank

Nothing is assumed about how a library cuts a dim that does not divide: `chunk` gives 3, 3, 1 where `tensor_split` gives
3, 2, 2, and both announce their sizes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import product
from math import prod
from typing import NamedTuple

from grafter.core.layout.cuts import cut_dim
from grafter.core.layout.declared import Box, DeclaredLayout, names_of_boxes
from grafter.core.layout.dims import LARGEST_SIZE, Dim, Dims, parse_dims
from grafter.core.layout.overlap import find_overlap
from grafter.core.layout.places import Member, find_places
from grafter.core.layout.runs import Runs, from_parts
from grafter.errors import LayoutError

# A share in more parts than this is a mistake, or meant to do harm.
MOST_BOXES = 1 << 20


class Share(NamedTuple):
    """What one rank holds: a product of runs, one per local dim; or boxes. `summand`: which, if it is partial."""

    runs: tuple[Runs, ...] = ()
    boxes: tuple[Box, ...] | None = None
    summand: int = 0


@dataclass(frozen=True)
class RoleShares:
    """All ranks of a role. `dims`: the factors of each local dim (none: size 1); None where the dims have no names.

    global_shape: sizes of the local dims, put together. reduction: how `summands` tensors make the value.
    """

    who: str
    text: str
    dims: tuple[Dim, ...] | None
    global_shape: tuple[int, ...]
    shares: dict[int, Share] = field(repr=False)
    reduction: str = "sum"
    summands: int = 1


def declared_alike(members: Sequence[Member], declared: Sequence[DeclaredLayout | None]) -> list[DeclaredLayout]:
    """What all members declare; empty where none of them does. Raises LayoutError where they do not do it alike."""
    first = declared[0]
    form = _form(first)
    for layout, member in zip(declared, members, strict=True):
        if layout is not first and _form(layout) != form:
            raise LayoutError(_why_two_forms(members[0], first, member, layout))
    return [layout for layout in declared if layout is not None]


def _checked(shares: RoleShares) -> RoleShares:
    if any(size > LARGEST_SIZE for size in shares.global_shape):
        raise LayoutError(f"{shares.text!r} at {shares.who} makes a tensor of {list(shares.global_shape)}.")
    return shares


def _form(layout: DeclaredLayout | None) -> tuple[object, ...]:
    """What all ranks of a role must say alike."""
    if layout is None:
        return ()
    return (
        layout.dims,
        layout.seq_lens,
        layout.global_shape,
        layout.runs is None,
        layout.boxes is None,
        layout.summand and (layout.summand[0], layout.summand[2]),
    )


def _why_two_forms(one: Member, first: DeclaredLayout | None, other: Member, second: DeclaredLayout | None) -> str:
    hint = " Ranks that share a point declare it alike; if they hold two tensors, give ranks= of those that share one."
    if (
        first is not None
        and second is not None
        and first.runs is not None
        and first.global_shape != second.global_shape
    ):
        hint = (
            " One of them was made by `from_local` of uneven shards, probably: give `from_local` the true shape= and "
            "stride=."
        )
    return f"{one} declares {_shown(first)}, and {other} declares {_shown(second)}.{hint}"


def _shown(layout: DeclaredLayout | None) -> str:
    if layout is None:
        return "no layout"
    lengths = f" with seq_lens of {len(layout.seq_lens)} sequences" if layout.seq_lens is not None else ""
    summand = f" partial by {layout.summand[0]} over {layout.summand[2]}" if layout.summand is not None else ""
    return f"{layout}{summand}{lengths}"


# --- dims


def of_dims(members: Sequence[Member], layout: DeclaredLayout, dims: Dims) -> RoleShares:
    """Members that all declare the same. Raises LayoutError where they do not fit together."""
    for member in members:
        # A peer's text was checked on the peer, but nothing that a peer sends is taken for granted.
        if len(member.shape) != len(dims.dims):
            raise LayoutError(f"{dims.text!r} names {len(dims.dims)} dims, and {member} has {list(member.shape)}.")
    mesh = find_places(dims, members)
    tables = [cut_dim(number, dim, dims, members, mesh, layout) for number, dim in enumerate(dims.dims)]
    columns = [[table.runs[place] for place in table.places] for table in tables]
    runs_of_members = list(zip(*columns, strict=True)) if columns else [()] * len(members)
    summands = 1
    numbers = [0] * len(members)
    for axis in dims.partial:
        size = mesh.sizes[axis]
        summands *= size
        numbers = [number * size + own for number, own in zip(numbers, mesh.coordinates[axis], strict=True)]
    shares = {
        member.role_rank: Share(runs, summand=number)
        for member, runs, number in zip(members, runs_of_members, numbers, strict=True)
    }
    global_shape = tuple(table.size for table in tables)
    return RoleShares(_role(members), dims.text, dims.dims, global_shape, shares, "sum", summands)


# --- DTensor and boxes


def dims_of(layout: DeclaredLayout) -> Dims | None:
    return parse_dims(layout.dims) if layout.dims is not None else None


def of_dtensors(members: Sequence[Member], layouts: Sequence[DeclaredLayout], dims: Dims | None) -> RoleShares:
    """Members whose tensors are DTensors. Raises LayoutError where they do not fit together."""
    first = layouts[0]
    global_shape = first.global_shape or ()
    if dims is not None and len(dims.dims) != len(global_shape):
        raise LayoutError(f"{dims.text!r} names {len(dims.dims)} dims, and the DTensor is {list(global_shape)}.")
    _check_one_mesh(members, layouts, dims)
    shares: dict[int, Share] = {}
    joined: dict[Runs, Runs] = {}
    checked: set[object] = set()
    for member, layout in zip(members, layouts, strict=True):
        _check_runs(member, layout, first, checked)
        # One object for equal runs: what follows is then worked out once, and not for each rank.
        runs = tuple(joined.get(own) or joined.setdefault(own, _joined(own)) for own in layout.runs or ())
        shares[member.role_rank] = Share(runs, summand=layout.summand[1] if layout.summand else 0)
    reduction, _, summands = first.summand or ("sum", 0, 1)
    text = f"DTensor of {list(global_shape)}"
    return RoleShares(_role(members), text, _named(dims), global_shape, shares, reduction, summands)


def _check_one_mesh(members: Sequence[Member], layouts: Sequence[DeclaredLayout], dims: Dims | None) -> None:
    """All on one mesh, each at a place of its own; or on several that an axis sets apart which is replicated."""
    replicated = [dims.axis_of_job(axis) for axis in dims.replicated] if dims is not None else []
    copies = [tuple((member.on(axis) or (0, 1))[0] for axis in replicated) for member in members]
    holders: dict[object, int] = {}
    meshes: dict[object, int] = {}
    for number, (layout, copy) in enumerate(zip(layouts, copies, strict=True)):
        other = holders.setdefault((copy, layout.place), number)
        if other == number:
            other = meshes.setdefault(copy, number)
        if other != number and (layouts[other].mesh != layout.mesh or layouts[other].place == layout.place):
            raise LayoutError(
                f"the DTensors of {members[other]} and {members[number]} are two tensors, each on a mesh of its own. "
                'If they are copies, name the axis in which their ranks differ: dims="... # dp:replicated", with '
                "set_axes or set_mesh; if not, give ranks= of those that share one."
            )


def _check_runs(member: Member, layout: DeclaredLayout, first: DeclaredLayout, checked: set[object]) -> None:
    """`checked`: what was found possible before, of this rank or another."""
    runs = layout.runs or ()
    if len(runs) != len(member.shape) or len(first.global_shape or ()) != len(member.shape):
        raise LayoutError(f"the DTensor of {member} has another number of dims than its local tensor.")
    for dim, (own, size, limit) in enumerate(zip(runs, member.shape, first.global_shape or (), strict=True)):
        if (own, size, limit) in checked:
            continue
        checked.add((own, size, limit))
        local = 0
        for start, length, at in own:
            if length < 1 or at != local or start < 0 or start + length > limit:
                raise LayoutError(f"the DTensor of {member} has impossible parts in dim {dim}: {own}.")
            local += length
        if local != size:
            raise LayoutError(f"the DTensor of {member} has {local} values in dim {dim}, and its local tensor {size}.")


def _joined(runs: Runs) -> Runs:
    return from_parts((start, length) for start, length, _ in runs)


def _of_boxes(members: Sequence[Member], layouts: Sequence[DeclaredLayout]) -> RoleShares:
    first = layouts[0]
    global_shape = first.global_shape or ()
    shares: dict[int, Share] = {}
    # Ranks are mostly alike in how their boxes fill the local tensor.
    filled: set[object] = set()
    for member, layout in zip(members, layouts, strict=True):
        boxes = tuple(Box(offset, size, local) for offset, size, local in layout.boxes or ())
        for box in boxes:
            _check_box(member, box, global_shape)
        filling = (member.shape, tuple((box.local_offset, box.size) for box in boxes))
        if filling not in filled:
            _check_filled(member, boxes)
            filled.add(filling)
        shares[member.role_rank] = Share(boxes=boxes)
    dims = names_of_boxes(first.dims, global_shape) if first.dims is not None else None
    text = f"Layout of {list(global_shape)}"
    return RoleShares(_role(members), text, _named(dims), global_shape, shares)


def _check_box(member: Member, box: Box, global_shape: tuple[int, ...]) -> None:
    fits = len(box.offset) == len(box.size) == len(box.local_offset) == len(global_shape) == len(member.shape)
    if not fits or any(
        o < 0 or n < 0 or at < 0 or o + n > limit or at + n > size
        for o, n, at, limit, size in zip(
            box.offset, box.size, box.local_offset, global_shape, member.shape, strict=True
        )
    ):
        raise LayoutError(f"a box of {member} leaves the tensor: {box}.")


def _check_filled(member: Member, boxes: Sequence[Box]) -> None:
    held = sum(prod(box.size) for box in boxes)
    overlap = find_overlap([box.local_offset for box in boxes], [box.size for box in boxes])
    if held != prod(member.shape) or overlap is not None:
        raise LayoutError(f"the boxes of {member} do not fill its local tensor {list(member.shape)}, each place once.")


def _named(dims: Dims | None) -> tuple[Dim, ...] | None:
    """Only names: the placements, or the boxes, say how the dims are split."""
    return None if dims is None else tuple(Dim(dim.factors) for dim in dims.dims)


def _role(members: Sequence[Member]) -> str:
    return members[0].role


def boxes_of(share: Share) -> tuple[Box, ...]:
    """A share as boxes of the global tensor, for a transform that wants to know."""
    if share.boxes is not None:
        return share.boxes
    count = prod(map(len, share.runs))
    if count > MOST_BOXES:
        raise LayoutError(f"a share is {count} boxes, and at most {MOST_BOXES} are listed.")
    boxes = []
    for combination in product(*share.runs):
        boxes.append(
            Box(
                tuple(start for start, _, _ in combination),
                tuple(length for _, length, _ in combination),
                tuple(local for _, _, local in combination),
            )
        )
    return tuple(boxes)
