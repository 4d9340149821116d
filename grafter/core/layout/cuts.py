"""Cuts: how one dim of a `dims` text is split over its axes, worked out from the sizes that the ranks announce."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from grafter.core.layout.declared import DeclaredLayout
from grafter.core.layout.dims import Dim, Dims
from grafter.core.layout.places import Coordinates, Member, Mesh
from grafter.core.layout.runs import Runs, split_in_order, split_zigzag, total, whole
from grafter.errors import LayoutError

# The dim of packed sequences, each of which zigzag cuts by itself.
PACKED_DIM = "t"


@dataclass(frozen=True)
class CutDim:
    """One dim, cut: its global size, the place of each member on its axes, and the runs that lie at each place."""

    size: int
    places: list[Coordinates]
    runs: dict[Coordinates, Runs]


def cut_dim(number: int, dim: Dim, dims: Dims, members: Sequence[Member], mesh: Mesh, layout: DeclaredLayout) -> CutDim:
    """The cut of the dim with this number: each place begins where the sizes of those before it end.

    Raises LayoutError for members at one place with different sizes, and for a zigzag split that is not possible.
    """
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
    cutter = _Cutter(dim, dims, mesh, layout)
    size = sum(sizes.values())
    cutter.assign(sizes, (), whole(size))
    return CutDim(size, places, cutter.runs)


class _Cutter:
    """Splits one dim over its axes, from the outermost one inwards. runs: what lies at each place."""

    def __init__(self, dim: Dim, dims: Dims, mesh: Mesh, layout: DeclaredLayout) -> None:
        self._dim, self._text, self._mesh, self._layout = dim, dims.text, mesh, layout
        self.runs: dict[Coordinates, Runs] = {}

    def assign(self, sizes: dict[Coordinates, int], outer: Coordinates, held: Runs) -> None:
        """Split what the outer axes leave (`held`) over the next axis, and over those inside it."""
        level = len(outer)
        if level == len(self._dim.splits):
            self.runs[outer] = held
            return
        split = self._dim.splits[level]
        count = self._mesh.sizes[split.axis]
        inner: list[dict[Coordinates, int]] = [{} for _ in range(count)]
        for place, size in sizes.items():
            inner[place[level]][place] = size
        parts = [sum(own.values()) for own in inner]
        is_zigzag = split.zigzag and count > 1
        stretches = self._zigzag(split.axis, level, held, parts) if is_zigzag else split_in_order(held, parts)
        for coordinate, stretch in enumerate(stretches):
            self.assign(inner[coordinate], (*outer, coordinate), stretch)

    def _zigzag(self, axis: str, level: int, held: Runs, parts: Sequence[int]) -> list[Runs]:
        where = f"{self._text!r}: {self._dim}[{axis}:zigzag]"
        count, lengths = len(parts), None
        if self._dim.names == (PACKED_DIM,):
            lengths = self._layout.seq_lens
            if lengths is None:
                raise LayoutError(
                    f"{where} is of packed sequences, each of which is cut by itself: give seq_lens=, the global "
                    "length of each sequence. (A dim of another name, such as s, is cut as one.)"
                )
            if level > 0:
                raise LayoutError(f"{where}: on packed sequences zigzag is the outermost split.")
            if sum(lengths) != total(held):
                raise LayoutError(
                    f"{where}: seq_lens= makes {sum(lengths)}, and the ranks hold {total(held)} together."
                )
        for length in lengths if lengths is not None else (total(held),):
            if length % (2 * count):
                raise LayoutError(
                    f"{where} cannot cut {length} into 2 x {count} equal chunks. Pad each sequence to a multiple of "
                    f"{2 * count}."
                )
        if any(part != parts[0] for part in parts):
            raise LayoutError(f"{where} gives every rank as much, and the ranks of {axis} hold {list(parts)}.")
        return split_zigzag(held, count, lengths)
