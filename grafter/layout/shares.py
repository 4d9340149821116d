"""Shares: which part of the global tensor each rank of a role holds, worked out from all its headers.

    headers of one role  ->  sizes per place  ->  offsets as prefix sums  ->  a Share per rank

Nothing is assumed about how a library cuts a dim that does not divide: `chunk` gives 3, 3, 1 where `tensor_split` gives
3, 2, 2, and both announce their sizes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import product
from typing import TYPE_CHECKING

from grafter.errors import LayoutError
from grafter.layout.declared import Box, DeclaredLayout, Layout
from grafter.layout.dims import Dim, Dims, parse_dims
from grafter.layout.places import Coordinates, Member, Mesh, find_places
from grafter.layout.runs import Runs, from_parts, split_in_order, split_zigzag, total, whole

if TYPE_CHECKING:
    from grafter.manifest import Header

# The dim that holds packed sequences: zigzag is per sequence there.
PACKED_DIM = "t"


@dataclass(frozen=True)
class Share:
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


def find_shares(headers: Sequence[Header], leaf: int) -> RoleShares | None:
    """None where this role declares nothing. Raises LayoutError where what its ranks declare does not fit together."""
    declared = [header.layouts[leaf] if header.layouts else None for header in headers]
    members = [
        Member(h.role_rank, h.who, {axis: (at, size) for axis, at, size in h.axes}, h.leaves[leaf].shape, h.call_site)
        for h in headers
    ]
    first = declared[0]
    for layout, member in zip(declared, members, strict=True):
        if (layout is None) != (first is None) or _form(layout) != _form(first):
            raise LayoutError(f"{members[0]} declares {_shown(first)}, and {member} declares {_shown(layout)}.")
    present = [layout for layout in declared if layout is not None]
    if not present:
        return None
    if present[0].runs is not None:
        return _of_dtensors(members, present)
    if present[0].boxes is not None:
        return _of_boxes(members, present)
    return _of_dims(members, present[0])


def whole_tensor(header: Header, leaf: int) -> RoleShares:
    """A role of one rank that declares nothing: its tensor is the whole one."""
    shape = header.leaves[leaf].shape
    share = Share(tuple(whole(size) for size in shape))
    return RoleShares(header.role, "the whole tensor", None, shape, {header.role_rank: share})


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


def _shown(layout: DeclaredLayout | None) -> str:
    if layout is None:
        return "no layout"
    lengths = f" with seq_lens of {len(layout.seq_lens)} sequences" if layout.seq_lens is not None else ""
    return f"{layout}{lengths}"


# --- dims


def _of_dims(members: Sequence[Member], layout: DeclaredLayout) -> RoleShares:
    dims = parse_dims(layout.dims or "")
    for member in members:
        # A peer's text was checked on the peer, but nothing that a peer sends is taken for granted.
        if len(member.shape) != len(dims.dims):
            raise LayoutError(f"{dims.text!r} names {len(dims.dims)} dims, and {member} has {list(member.shape)}.")
    mesh = find_places(dims, members)
    tables = [_runs_of_dim(number, dim, dims, members, mesh, layout) for number, dim in enumerate(dims.dims)]
    shares: dict[int, Share] = {}
    for member in members:
        own = mesh.coordinates[member.role_rank]
        runs = tuple(
            table.runs[tuple(own[split.axis] for split in dim.splits)]
            for dim, table in zip(dims.dims, tables, strict=True)
        )
        summand = 0
        for axis in dims.partial:
            summand = summand * mesh.sizes[axis] + own[axis]
        shares[member.role_rank] = Share(runs, summand=summand)
    summands = 1
    for axis in dims.partial:
        summands *= mesh.sizes[axis]
    global_shape = tuple(table.size for table in tables)
    return RoleShares(_role(members), dims.text, dims.dims, global_shape, shares, "sum", summands)


@dataclass(frozen=True)
class _DimTable:
    size: int
    runs: dict[Coordinates, Runs]


def _runs_of_dim(
    number: int, dim: Dim, dims: Dims, members: Sequence[Member], mesh: Mesh, layout: DeclaredLayout
) -> _DimTable:
    """Where each place of this dim's axes begins: prefix sums of the sizes that its holders announce."""
    axes = [split.axis for split in dim.splits]
    sizes: dict[Coordinates, int] = {}
    holders: dict[Coordinates, Member] = {}
    for member in members:
        place = mesh.of(member.role_rank, axes)
        size = member.shape[number]
        if sizes.setdefault(place, size) != size:
            other = holders[place]
            at = f"at {', '.join(f'{a}={c}' for a, c in zip(axes, place, strict=True))} " if axes else ""
            raise LayoutError(
                f"the dim {dim} {at}has size {sizes[place]} at {other} and {size} at {member}; one part has one size. "
                f"If {dim} is split over an axis, {dims.text!r} must say so: `{dim}[tp]`."
            )
        holders.setdefault(place, member)
    runs: dict[Coordinates, Runs] = {}
    size = sum(sizes.values())
    _assign(dim, dims, mesh, layout, sizes, (), whole(size), runs)
    return _DimTable(size, runs)


def _assign(
    dim: Dim,
    dims: Dims,
    mesh: Mesh,
    layout: DeclaredLayout,
    sizes: dict[Coordinates, int],
    prefix: Coordinates,
    held: Runs,
    result: dict[Coordinates, Runs],
) -> None:
    """Cut what the outer axes have left (`held`) over the next axis, and go on inwards."""
    level = len(prefix)
    if level == len(dim.splits):
        result[prefix] = held
        return
    split = dim.splits[level]
    count = mesh.sizes[split.axis]
    inner: list[dict[Coordinates, int]] = [{} for _ in range(count)]
    for place, size in sizes.items():
        inner[place[level]][place] = size
    parts = [sum(own.values()) for own in inner]
    if split.zigzag and count > 1:
        stretches = _zigzag(dim, dims, split.axis, level, count, held, parts, layout)
    else:
        stretches = split_in_order(held, parts)
    for coordinate, stretch in enumerate(stretches):
        _assign(dim, dims, mesh, layout, inner[coordinate], (*prefix, coordinate), stretch, result)


def _zigzag(
    dim: Dim,
    dims: Dims,
    axis: str,
    level: int,
    count: int,
    held: Runs,
    parts: Sequence[int],
    layout: DeclaredLayout,
) -> list[Runs]:
    where = f"{dims.text!r}: {dim}[{axis}:zigzag]"
    lengths = None
    if dim.names == (PACKED_DIM,):
        lengths = layout.seq_lens
        if lengths is None:
            raise LayoutError(
                f"{where} is of packed sequences, each of which is cut by itself: give seq_lens=, the global length of "
                "each sequence. (A dim of another name, such as s, is cut as one.)"
            )
        if level > 0:
            raise LayoutError(f"{where}: on packed sequences zigzag is the outermost split.")
        if sum(lengths) != total(held):
            raise LayoutError(f"{where}: seq_lens= makes {sum(lengths)}, and the ranks hold {total(held)} together.")
    for length in lengths if lengths is not None else (total(held),):
        if length % (2 * count):
            raise LayoutError(
                f"{where} cuts {length} into 2 x {count} equal chunks, which does not go. Pad each sequence to a "
                f"multiple of {2 * count}."
            )
    if any(part != parts[0] for part in parts):
        raise LayoutError(f"{where} gives every rank as much, and the ranks of {axis} hold {list(parts)}.")
    return split_zigzag(held, count, lengths)


# --- DTensor and boxes


def _of_dtensors(members: Sequence[Member], layouts: Sequence[DeclaredLayout]) -> RoleShares:
    first = layouts[0]
    assert first.global_shape is not None
    dims = parse_dims(first.dims) if first.dims is not None else None
    replicated = dims.replicated if dims is not None else ()
    holders: dict[tuple[object, ...], Member] = {}
    shares: dict[int, Share] = {}
    for member, layout in zip(members, layouts, strict=True):
        own = tuple(member.axes.get(dims.axis_of_job(axis), (0, 1))[0] for axis in replicated) if dims else ()
        other = holders.setdefault((layout.place, *own), member)
        if other is not member:
            raise LayoutError(
                f"the DTensors of {other} and {member} are two tensors, each on a mesh of its own. If they are copies, "
                'name the axis in which their ranks differ: dims="... # dp:replicated", with set_axes or set_mesh; if '
                "not, give ranks= of those that share one."
            )
        _check_runs(member, layout, first)
        shares[member.role_rank] = Share(_as_runs(layout), summand=layout.summand[1] if layout.summand else 0)
    reduction, _, summands = first.summand or ("sum", 0, 1)
    text = f"DTensor of {list(first.global_shape)}"
    return RoleShares(_role(members), text, _named(dims), first.global_shape, shares, reduction, summands)


def _check_runs(member: Member, layout: DeclaredLayout, first: DeclaredLayout) -> None:
    runs = layout.runs or ()
    if len(runs) != len(member.shape) or len(first.global_shape or ()) != len(member.shape):
        raise LayoutError(f"the DTensor of {member} has another number of dims than its local tensor.")
    for dim, (own, size, limit) in enumerate(zip(runs, member.shape, first.global_shape or (), strict=True)):
        local = 0
        for start, length, at in own:
            if length < 1 or at != local or start < 0 or start + length > limit:
                raise LayoutError(f"the DTensor of {member} has impossible parts in dim {dim}: {own}.")
            local += length
        if local != size:
            raise LayoutError(f"the DTensor of {member} has {local} values in dim {dim}, and its local tensor {size}.")


def _as_runs(layout: DeclaredLayout) -> tuple[Runs, ...]:
    return tuple(from_parts((start, length) for start, length, _ in runs) for runs in layout.runs or ())


def _of_boxes(members: Sequence[Member], layouts: Sequence[DeclaredLayout]) -> RoleShares:
    first = layouts[0]
    assert first.global_shape is not None
    shares: dict[int, Share] = {}
    for member, layout in zip(members, layouts, strict=True):
        boxes = tuple(Box(offset, size, local) for offset, size, local in layout.boxes or ())
        for box in boxes:
            _check_box(member, box, first.global_shape)
        shares[member.role_rank] = Share(boxes=boxes)
    dims = parse_dims(first.dims) if first.dims is not None else None
    text = f"Layout of {list(first.global_shape)}"
    return RoleShares(_role(members), text, _named(dims), first.global_shape, shares)


def _check_box(member: Member, box: Box, global_shape: tuple[int, ...]) -> None:
    fits = len(box.offset) == len(box.size) == len(box.local_offset) == len(global_shape) == len(member.shape)
    if not fits or any(
        o < 0 or n < 0 or at < 0 or o + n > limit or at + n > size
        for o, n, at, limit, size in zip(
            box.offset, box.size, box.local_offset, global_shape, member.shape, strict=True
        )
    ):
        raise LayoutError(f"a box of {member} leaves the tensor: {box}.")


def _named(dims: Dims | None) -> tuple[Dim, ...] | None:
    """Only names: the placements, or the boxes, say how the dims are split."""
    return None if dims is None else tuple(Dim(dim.factors) for dim in dims.dims)


def _role(members: Sequence[Member]) -> str:
    return members[0].role


def layouts_of(headers: Sequence[Header], leaf: int) -> dict[int, Layout] | None:
    """Every rank's layout as boxes, for a transform that wants to know; None where there is none that fits."""
    try:
        found = find_shares(headers, leaf)
    except LayoutError:
        return None
    if found is None:
        return None
    return {rank: Layout(found.global_shape, boxes_of(share)) for rank, share in found.shares.items()}


def boxes_of(share: Share) -> tuple[Box, ...]:
    """A share as boxes of the global tensor, for a transform that wants to know."""
    if share.boxes is not None:
        return share.boxes
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
