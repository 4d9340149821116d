"""The common space of both sides: one coordinate for each factor, whatever the order and fusion of the dims.

    baseline  s b (h*d)[tp]           target  b s h[tp] d
                    \\                            /
                factors  s   b   h x d          h and d are one component: they are fused on one side
                        component per s, b, (h, d)

A share is the product of its parts in each component, and there it is a list of boxes. If both sides fuse the same
factors alike, the fused dim is one factor, and the sizes inside it may be unknown. If a side gives boxes, all factors
are one component.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import product
from math import prod
from typing import NamedTuple

from grafter.core.layout.common_dims import GlobalSizes, fused_alike, named_alike
from grafter.core.layout.dims import Dim
from grafter.core.layout.runs import Numbers, Runs, clip, total
from grafter.core.layout.shares import MOST_BOXES, RoleShares, Share
from grafter.errors import LayoutError


class SpaceBox(NamedTuple):
    """A box of one component: the start and size for each factor, and where it begins in each local dim of its side."""

    starts: Numbers
    sizes: Numbers
    local: Numbers

    @property
    def volume(self) -> int:
        return prod(self.sizes)

    @property
    def part(self) -> tuple[Numbers, Numbers]:
        """Which part of the tensor it is, wherever it lies in memory."""
        return self.starts, self.sizes


Boxes = tuple[SpaceBox, ...]


@dataclass(frozen=True)
class SideDims:
    """The local dims of one side that make up a component.

    dims: their numbers. along, steps: for each factor, the local dim that it runs along, and how many values of that
    dim one step of the factor covers.
    """

    dims: Numbers
    along: Numbers
    steps: Numbers

    @cached_property
    def factors(self) -> list[list[int]]:
        """For each of `dims`, the numbers of the factors along it, outer first."""
        numbers = sorted(range(len(self.along)), key=lambda factor: -self.steps[factor])
        return [[factor for factor in numbers if self.along[factor] == dim] for dim in self.dims]

    @cached_property
    def order(self) -> list[int]:
        """For each factor, its number among all of `factors`."""
        listed = [factor for own in self.factors for factor in own]
        return [listed.index(factor) for factor in range(len(listed))]


@dataclass(frozen=True)
class Component:
    """Factors that belong together, in the receiver's order, with their global sizes (without padding)."""

    names: tuple[str, ...]
    sizes: Numbers
    sender: SideDims
    receiver: SideDims

    @property
    def volume(self) -> int:
        return prod(self.sizes)

    def place(self, box: SpaceBox) -> str:
        """Where a box lies, such as `h 0:4, d 8:16`."""
        return ", ".join(
            f"{name} {start}:{start + size}"
            for name, start, size in zip(self.names, box.starts, box.sizes, strict=True)
        )


@dataclass(frozen=True)
class Space:
    """The components of two sides' dims. padded: the receiver's padded local dims, and their sizes without it."""

    components: tuple[Component, ...]
    padded: dict[int, int]

    def boxes(self, share: Share, component: Component, side: SideDims) -> Boxes:
        """A share's boxes in one component. If the share is given as boxes, there is only one component."""
        if share.boxes is None:
            return _product(component, side, [share.runs[dim] for dim in side.dims])
        found: list[SpaceBox] = []
        for box in share.boxes:
            if all(box.size):
                runs = [((box.offset[dim], box.size[dim], box.local_offset[dim]),) for dim in side.dims]
                found += _product(component, side, runs)
        return tuple(found)

    def held_sizes(self, share: Share, shape: Sequence[int]) -> Numbers:
        """The local shape of a receiver without padding.

        Raises LayoutError where the padding is not at the end of the local dim.
        """
        sizes = list(shape)
        for dim, limit in self.padded.items():
            kept = clip(share.runs[dim], limit)
            sizes[dim] = total(kept)
            if any(local + length > sizes[dim] for _, length, local in kept):
                raise LayoutError(
                    f"the padding of local dim {dim} (its size without it is {limit}) lies in the middle of a local "
                    "tensor; only padding at the end can be left out."
                )
        return tuple(sizes)


def find_space(sender: RoleShares, receiver: RoleShares) -> Space:
    """The common space. Raises LayoutError naming the dim where names or sizes of the two sides do not fit."""
    sending, receiving = named_alike(sender, receiver)
    by_boxes = any(share.boxes is not None for side in (sender, receiver) for share in side.shares.values())
    sizes = GlobalSizes()
    sizes.learn(sender, sending)
    sizes.learn(receiver, receiving)
    sizes.solve([(sender, sending), (receiver, receiving)])
    sending, receiving = fused_alike(sending, receiving)
    sizes.learn(sender, sending)
    sizes.learn(receiver, receiving)
    groups = _groups(sending, receiving, one=by_boxes)
    padded = {
        number: sizes.known[dim.names[0]][0]
        for number, (dim, size) in enumerate(zip(receiving, receiver.global_shape, strict=True))
        if len(dim.factors) == 1 and sizes.known[dim.names[0]][0] < size
    }
    components = [_component(group, (sender, sending), (receiver, receiving), sizes) for group in groups]
    return Space(tuple(components), padded)


def _groups(sending: Sequence[Dim], receiving: Sequence[Dim], *, one: bool) -> list[tuple[str, ...]]:
    """Factors that are fused with each other on either side, in the receiver's order. one: all in one group."""
    order = [name for dim in receiving for name in dim.names]
    if one:
        return [tuple(order)] if order else []
    group_of = {name: {name} for name in order}
    for dim in (*sending, *receiving):
        for name in dim.names[1:]:
            merged = group_of[dim.names[0]] | group_of[name]
            for member in merged:
                group_of[member] = merged
    groups = {id(group): group for group in group_of.values()}
    return [tuple(name for name in order if name in group) for group in groups.values()]


def _component(
    names: tuple[str, ...],
    sender: tuple[RoleShares, Sequence[Dim]],
    receiver: tuple[RoleShares, Sequence[Dim]],
    sizes: GlobalSizes,
) -> Component:
    (sent, sending), (there, receiving) = sender, receiver
    unknown = [name for name in names if name not in sizes.known]
    if unknown:
        fused = next(dim for dim in (*sending, *receiving) if unknown[0] in dim.names)
        raise LayoutError(
            f"the size of {unknown[0]} is not known: {sent.text!r} at {sent.who}, {there.text!r} at {there.who}. "
            f"Declare one of {fused}, such as `{str(fused).replace(unknown[0], unknown[0] + '=8', 1)}`."
        )
    known = {name: sizes.known[name][0] for name in names}
    return Component(
        names, tuple(known[name] for name in names), _side(names, sending, known), _side(names, receiving, known)
    )


def _side(names: Sequence[str], dims: Sequence[Dim], sizes: dict[str, int]) -> SideDims:
    along: dict[str, int] = {}
    steps: dict[str, int] = {}
    for number, dim in enumerate(dims):
        step = 1
        for name in reversed(dim.names):
            if name in sizes:
                along[name], steps[name] = number, step
                step *= sizes[name]
    own = tuple(number for number, dim in enumerate(dims) if any(name in sizes for name in dim.names))
    return SideDims(own, tuple(along[name] for name in names), tuple(steps[name] for name in names))


def _product(component: Component, side: SideDims, runs_of_dims: Sequence[Runs]) -> Boxes:
    """The boxes of all combinations of runs. A run that cuts a fused dim becomes several boxes."""
    if len(component.names) == 1:
        runs = clip(runs_of_dims[0], component.sizes[0])
        return tuple([SpaceBox((start,), (length,), (local,)) for start, length, local in runs])
    per_dim = [
        _cut(runs, [component.sizes[factor] for factor in factors])
        for factors, runs in zip(side.factors, runs_of_dims, strict=True)
    ]
    if prod(map(len, per_dim)) > MOST_BOXES:
        raise LayoutError(f"a share is more than {MOST_BOXES} boxes of {', '.join(component.names)}.")
    found = []
    for combination in product(*per_dim):
        starts = [start for own, _, _ in combination for start in own]
        sizes = [size for _, own, _ in combination for size in own]
        local = tuple([at for _, _, own in combination for at in own])
        found.append(SpaceBox(tuple([starts[n] for n in side.order]), tuple([sizes[n] for n in side.order]), local))
    return tuple(found)


def _cut(runs: Runs, sizes: Sequence[int]) -> list[tuple[Numbers, Numbers, Numbers]]:
    """The runs of one dim as (starts, sizes, (start in the local dim,)) over its factors.

    Padding, which only a dim with one factor can have, is left out.
    """
    if len(sizes) == 1:
        return [((start,), (length,), (local,)) for start, length, local in clip(runs, sizes[0])]
    found: list[tuple[Numbers, Numbers, Numbers]] = []
    for start, length, local in runs:
        for starts, lengths in rectangles(start, start + length, sizes):
            flat = 0
            for begin, size in zip(starts, sizes, strict=True):
                flat = flat * size + begin
            found.append((starts, lengths, (local + flat - start,)))
    return found


def rectangles(start: int, stop: int, sizes: Sequence[int]) -> list[tuple[Numbers, Numbers]]:
    """The stretch [start, stop) of a row-major index over `sizes`, as (starts, lengths) of rectangles.

    . . x x        a stretch that begins and ends inside a row is up to three rectangles:
    x x x x        the end of its first row, the full rows, the beginning of its last row
    x . . .
    """
    if start >= stop:
        return []
    if len(sizes) == 1:
        return [((start,), (stop - start,))]
    inner = prod(sizes[1:])
    (first, begin), (last, end) = divmod(start, inner), divmod(stop, inner)
    if first == last:
        return [((first, *s), (1, *n)) for s, n in rectangles(begin, end, sizes[1:])]
    found: list[tuple[Numbers, Numbers]] = []
    if begin:
        found += [((first, *s), (1, *n)) for s, n in rectangles(begin, inner, sizes[1:])]
        first += 1
    if last > first:
        found.append(((first, *(0 for _ in sizes[1:])), (last - first, *sizes[1:])))
    if end:
        found += [((last, *s), (1, *n)) for s, n in rectangles(0, end, sizes[1:])]
    return found
