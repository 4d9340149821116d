"""Cuts: how one dim of a `dims` text is shared out over its axes, from the sizes that the ranks announce."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from grafter.core.layout.declared import DeclaredLayout
from grafter.core.layout.dims import Dim, Dims
from grafter.core.layout.places import Coordinates, Member, Mesh
from grafter.core.layout.runs import Runs, split_in_order, split_zigzag, total, whole
from grafter.errors import LayoutError

# The dim that holds packed sequences: zigzag is per sequence there.
PACKED_DIM = "t"


@dataclass(frozen=True)
class CutDim:
    """The global size of a dim, the place of each member on its axes, and what lies at each place."""

    size: int
    places: list[Coordinates]
    runs: dict[Coordinates, Runs]


def cut_dim(number: int, dim: Dim, dims: Dims, members: Sequence[Member], mesh: Mesh, layout: DeclaredLayout) -> CutDim:
    """Where each place of this dim's axes begins: prefix sums of the sizes that its holders announce."""
    axes = [split.axis for split in dim.splits]
    places = mesh.places(axes)
    sizes: dict[Coordinates, int] = {}
    for member, place in zip(members, places, strict=True):
        size = member.shape[number]
        if sizes.setdefault(place, size) != size:
            other = members[places.index(place)]
            at = f"at {', '.join(f'{a}={c}' for a, c in zip(axes, place, strict=True))} " if axes else ""
            raise LayoutError(
                f"the dim {dim} {at}has size {sizes[place]} at {other} and {size} at {member}; one part has one size. "
                f"If {dim} is split over an axis, {dims.text!r} must say so: `{dim}[tp]`."
            )
    runs: dict[Coordinates, Runs] = {}
    size = sum(sizes.values())
    _assign(dim, dims, mesh, layout, sizes, (), whole(size), runs)
    return CutDim(size, places, runs)


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
