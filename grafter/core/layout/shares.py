"""Shares: which part of the global tensor each rank of a role holds, worked out from all its headers.

    headers of one role  ->  sizes per place  ->  offsets as prefix sums  ->  a Share per rank

How a library cuts a dim that does not divide evenly is not assumed: `chunk` gives 3, 3, 1 where `tensor_split` gives
3, 2, 2. The sizes that ranks announce decide.
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
from grafter.core.layout.places import Member, find_mesh
from grafter.core.layout.runs import Runs, from_parts
from grafter.errors import LayoutError

# A share in more parts than this is an error, or an attack.
MOST_BOXES = 1 << 20


class Share(NamedTuple):
    """What one rank holds: the product of runs for each local dim; or boxes. summand: which, if it is partial."""

    runs: tuple[Runs, ...] = ()
    boxes: tuple[Box, ...] | None = None
    summand: int = 0


@dataclass(frozen=True)
class RoleShares:
    """The shares of all ranks of a role, by role rank.

    who, text: the role and its layout, for messages. dims: the factors of each local dim (none: size 1); None if the
    dims have no names. global_shape: the sizes of the local dims, put together. reduction: how `summands` tensors make
    the value.
    """

    who: str
    text: str
    dims: tuple[Dim, ...] | None
    global_shape: tuple[int, ...]
    shares: dict[int, Share] = field(repr=False)
    reduction: str = "sum"
    summands: int = 1


def declared_alike(members: Sequence[Member], declared: Sequence[DeclaredLayout | None]) -> list[DeclaredLayout]:
    """What the members declare; empty if none of them declares anything. Raises LayoutError if they differ."""
    first = declared[0]
    form = _form(first)
    for layout, member in zip(declared, members, strict=True):
        if layout is not first and _form(layout) != form:
            raise LayoutError(_why_two_forms(members[0], first, member, layout))
    return [layout for layout in declared if layout is not None]


def with_legal_size(shares: RoleShares) -> RoleShares:
    """The shares. Raises LayoutError if their sizes together exceed what torch can hold."""
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


def of_dims(members: Sequence[Member], layout: DeclaredLayout, dims: Dims) -> RoleShares:
    """The shares of members that declare the same dims. Raises LayoutError if they do not fit together."""
    for member in members:
        # The peer has checked its text, but what a peer sends is not trusted.
        if len(member.shape) != len(dims.dims):
            raise LayoutError(f"{dims.text!r} names {len(dims.dims)} dims, and {member} has {list(member.shape)}.")
    mesh = find_mesh(dims, members)
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
    return RoleShares(members[0].role, dims.text, dims.dims, global_shape, shares, "sum", summands)


def dims_of(layout: DeclaredLayout) -> Dims | None:
    """The parsed dims text of a layout, if it has one."""
    return parse_dims(layout.dims) if layout.dims is not None else None


def of_dtensors(members: Sequence[Member], layouts: Sequence[DeclaredLayout], dims: Dims | None) -> RoleShares:
    """The shares of members whose tensors are DTensors. Raises LayoutError if they do not fit together."""
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
        # Equal runs become one object, so that what follows from them is computed once, not for each rank.
        runs = tuple(
            joined.get(own) or joined.setdefault(own, from_parts((start, length) for start, length, _ in own))
            for own in layout.runs or ()
        )
        shares[member.role_rank] = Share(runs, summand=layout.summand[1] if layout.summand else 0)
    reduction, _, summands = first.summand or ("sum", 0, 1)
    text = f"DTensor of {list(global_shape)}"
    return RoleShares(members[0].role, text, _named(dims), global_shape, shares, reduction, summands)


def _check_one_mesh(members: Sequence[Member], layouts: Sequence[DeclaredLayout], dims: Dims | None) -> None:
    """Raise LayoutError unless all are on one mesh, at different places, or on copies of it along a replicated axis."""
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
                f"the DTensors of {members[other]} and {members[number]} are two tensors, on two meshes. "
                'If they are copies, name the axis in which their ranks differ: dims="... # dp:replicated", with '
                "set_axes or set_mesh; if not, give ranks= of those that share one."
            )


def _check_runs(member: Member, layout: DeclaredLayout, first: DeclaredLayout, checked: set[object]) -> None:
    """Raise LayoutError for impossible runs. checked: those that were found possible before, on any rank."""
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


def of_boxes(members: Sequence[Member], layouts: Sequence[DeclaredLayout]) -> RoleShares:
    """The shares of members that declare boxes. Raises LayoutError if they do not fit together."""
    first = layouts[0]
    global_shape = first.global_shape or ()
    shares: dict[int, Share] = {}
    # The boxes of most ranks fill the local tensor in the same way.
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
    return RoleShares(members[0].role, text, _named(dims), global_shape, shares)


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
    """The dims without splits: the placements, or the boxes, say how the dims are split."""
    return None if dims is None else tuple(Dim(dim.factors) for dim in dims.dims)


def boxes_of(share: Share) -> tuple[Box, ...]:
    """A share as boxes of the global tensor, for a transform that asks. Raises LayoutError for too many."""
    if share.boxes is not None:
        return share.boxes
    count = prod(map(len, share.runs))
    if count > MOST_BOXES:
        raise LayoutError(f"a share is {count} boxes, and at most {MOST_BOXES} are listed.")
    # A combination has one run for each dim; the empty one is that of a tensor without dims.
    return tuple(
        Box(*zip(*combination, strict=True)) if combination else Box((), (), ()) for combination in product(*share.runs)
    )
