"""The space in which both sides' shares meet: one coordinate per factor, whatever the order and fusion of the dims.

    baseline  s b (h*d)[tp]           target  b s h[tp] d
                    \\                            /
                factors  s   b   h x d          h and d are one component: they are fused on one side
                        component per s, b, (h, d)

Within a component a share is a list of boxes; a share is the product of its components. Where both sides fuse the same
factors alike, the fused dim is taken as one factor, and nobody needs to know the sizes inside.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product

from grafter.errors import LayoutError
from grafter.layout.dims import Dim, Factor
from grafter.layout.runs import Run, clip
from grafter.layout.shares import RoleShares, Share

Numbers = tuple[int, ...]


@dataclass(frozen=True)
class SpaceBox:
    """A box of one component: per factor start and size; and per local dim of this side where it begins there."""

    starts: Numbers
    sizes: Numbers
    local: Numbers


Boxes = tuple[SpaceBox, ...]


@dataclass(frozen=True)
class SideDims:
    """How one side's local dims make up a component. `dims` are their numbers; per factor, `along` and `steps` say

    which local dim it runs along, and how many values of that dim one step of the factor is.
    """

    dims: Numbers
    along: Numbers
    steps: Numbers


@dataclass(frozen=True)
class Component:
    """Factors that belong together, in the receiver's order, with global sizes (without padding)."""

    names: tuple[str, ...]
    sizes: Numbers
    sender: SideDims
    receiver: SideDims

    @property
    def volume(self) -> int:
        volume = 1
        for size in self.sizes:
            volume *= size
        return volume


@dataclass(frozen=True)
class Space:
    components: tuple[Component, ...]

    def boxes(self, share: Share, component: Component, side: SideDims) -> Boxes:
        """A share's boxes in one component. A share that is given as boxes has only one component."""
        if share.boxes is None:
            return _product(component, side, [share.runs[dim] for dim in side.dims])
        found: list[SpaceBox] = []
        for box in share.boxes:
            runs = [((box.offset[dim], box.size[dim], box.local_offset[dim]),) for dim in side.dims]
            found += _product(component, side, runs)
        return tuple(found)

    def held_sizes(self, share: Share, shape: Sequence[int], *, sender: bool) -> Numbers:
        """The local shape without padding. Raises LayoutError where the padding is not at the end of the local dim."""
        sizes = list(shape)
        for component in self.components:
            side = component.sender if sender else component.receiver
            if len(side.dims) != 1 or len(component.names) != 1 or share.boxes is not None:
                continue
            dim = side.dims[0]
            kept = clip(share.runs[dim], component.sizes[0])
            sizes[dim] = sum(length for _, length, _ in kept)
            if any(local + length > sizes[dim] for _, length, local in kept):
                raise LayoutError(
                    f"the padding of {component.names[0]} (its size is {component.sizes[0]}) lies in the middle of a "
                    "local tensor; only padding at the end can be left out."
                )
        return tuple(sizes)


def find_space(sender: RoleShares, receiver: RoleShares) -> Space:
    """Raises LayoutError naming the dim where names or sizes of the two sides do not fit."""
    sending, receiving = _named_alike(sender, receiver)
    by_boxes = any(share.boxes is not None for side in (sender, receiver) for share in side.shares.values())
    sizes = _Sizes()
    sizes.learn(sender, sending)
    sizes.learn(receiver, receiving)
    sizes.solve([(sender, sending), (receiver, receiving)])
    groups = _groups(sending, receiving, one=by_boxes)
    return Space(tuple(_component(group, (sender, sending), (receiver, receiving), sizes) for group in groups))


# --- names


def _named_alike(sender: RoleShares, receiver: RoleShares) -> tuple[tuple[Dim, ...], tuple[Dim, ...]]:
    if sender.dims is not None and receiver.dims is not None:
        sent = {name for dim in sender.dims for name in dim.names}
        there = {name for dim in receiver.dims for name in dim.names}
        if sent != there:
            raise LayoutError(
                f"the dims have other names: {_list(sent - there)} only at {sender.who} ({sender.text!r}), "
                f"{_list(there - sent)} only at {receiver.who} ({receiver.text!r}). Name them alike on both sides; a "
                f"dim "
                "of size 1 that one side has not got is written `1`."
            )
        return sender.dims, receiver.dims
    if sender.dims is None and receiver.dims is None:
        return _by_position(sender, receiver)
    if sender.dims is not None:
        return sender.dims, _borrowed(receiver, sender)
    assert receiver.dims is not None
    return _borrowed(sender, receiver), receiver.dims


def _list(names: set[str]) -> str:
    return ", ".join(sorted(names)) or "none"


def _by_position(sender: RoleShares, receiver: RoleShares) -> tuple[tuple[Dim, ...], tuple[Dim, ...]]:
    ours, theirs = list(sender.global_shape), list(receiver.global_shape)
    if len(ours) != len(theirs) and [n for n in ours if n != 1] != [n for n in theirs if n != 1]:
        raise LayoutError(
            f"the global shapes are {ours} at {sender.who} and {theirs} at {receiver.who}, and their dims have no "
            "names. Name the dims with dims= on both sides."
        )
    same = len(ours) == len(theirs)

    def named(shape: list[int]) -> tuple[Dim, ...]:
        dims, number = [], 0
        for size in shape:
            if size == 1 and not same:
                dims.append(Dim(()))
                continue
            dims.append(Dim((Factor(f"dim {number}"),)))
            number += 1
        return tuple(dims)

    return named(ours), named(theirs)


def _borrowed(unnamed: RoleShares, named: RoleShares) -> tuple[Dim, ...]:
    """Names for dims that have none: those of the other side, in its order."""
    assert named.dims is not None
    real = [Dim(_without_sizes(dim)) for dim in named.dims if dim.factors]
    shape = unnamed.global_shape
    if len(shape) == len(named.dims):
        lent = [Dim(_without_sizes(dim)) for dim in named.dims]
    elif len(shape) == len(real):
        lent = real
    else:
        raise LayoutError(
            f"{named.who} has the dims {named.text!r}, and {unnamed.who} ({unnamed.text}) has {len(shape)} dims "
            f"without "
            f"names: {list(shape)}. Name them with dims=, too."
        )
    for dim, size in zip(lent, shape, strict=True):
        if not dim.factors and size != 1:
            raise LayoutError(
                f"{named.who} has the dims {named.text!r}, and {unnamed.who} has {list(shape)}: size {size} where the "
                "other has 1. Name its dims with dims=."
            )
    return tuple(lent)


def _without_sizes(dim: Dim) -> tuple[Factor, ...]:
    return tuple(Factor(factor.name) for factor in dim.factors)


# --- sizes


class _Sizes:
    """What is known of the factors' global sizes, and who said it."""

    def __init__(self) -> None:
        self.known: dict[str, tuple[int, str]] = {}

    def learn(self, side: RoleShares, dims: Sequence[Dim]) -> None:
        for dim, size in zip(dims, side.global_shape, strict=True):
            for factor in dim.factors:
                if factor.size is not None:
                    self._set(factor.name, factor.size, f"{side.text!r} at {side.who}")
            if len(dim.factors) == 1:
                factor = dim.factors[0]
                if factor.size is not None and factor.size > size:
                    raise LayoutError(
                        f"{side.text!r} says that {factor.name} is {factor.size}, and the ranks of {side.who} hold "
                        f"only "
                        f"{size} of it together."
                    )
                self._set(factor.name, factor.size or size, f"the shards at {side.who}")
            elif not dim.factors and size != 1:
                raise LayoutError(f"{side.text!r} says that a dim is 1, and it is {size} at {side.who}.")

    def _set(self, name: str, size: int, who: str) -> None:
        known, before = self.known.setdefault(name, (size, who))
        if known != size:
            larger, smaller = max(known, size), min(known, size)
            raise LayoutError(
                f"the sizes of {name} disagree: {known} ({before}) and {size} ({who}). If {larger} is padded, declare "
                f"the true size there: `{name}={smaller}`."
            )

    def solve(self, sides: Sequence[tuple[RoleShares, Sequence[Dim]]]) -> None:
        """A fused dim of which all sizes but one are known gives that one; until nothing new is found."""
        found = True
        while found:
            found = False
            for side, dims in sides:
                for dim, size in zip(dims, side.global_shape, strict=True):
                    unknown = [name for name in dim.names if name not in self.known]
                    if len(dim.factors) < 2 or len(unknown) > 1:
                        continue
                    inside = 1
                    for name in dim.names:
                        inside *= self.known[name][0] if name not in unknown else 1
                    if (inside == 0 or size % inside) if unknown else size != inside:
                        known = ", ".join(
                            f"{n}={self.known[n][0]} ({self.known[n][1]})" for n in dim.names if n in self.known
                        )
                        raise LayoutError(f"{dim} is {size} at {side.who}, which does not fit {known}.")
                    if unknown:
                        self._set(unknown[0], size // inside, f"{dim} at {side.who}")
                        found = True


# --- components


def _groups(sending: Sequence[Dim], receiving: Sequence[Dim], *, one: bool) -> list[tuple[str, ...]]:
    """Factors that are fused with one another on either side, in the receiver's order."""
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
    sizes: _Sizes,
) -> Component:
    (sent, sending), (there, receiving) = sender, receiver
    if len(names) > 1:
        fused_sent = [number for number, dim in enumerate(sending) if dim.names == names]
        fused_there = [number for number, dim in enumerate(receiving) if dim.names == names]
        if fused_sent and fused_there:
            # Fused alike on both sides: one factor, whose inside nobody needs to know.
            (s,), (r,) = fused_sent, fused_there
            total, other = sent.global_shape[s], there.global_shape[r]
            if total != other:
                raise LayoutError(f"{sending[s]} is {total} at {sent.who} and {other} at {there.who}.")
            return Component((str(sending[s]),), (total,), SideDims((s,), (s,), (1,)), SideDims((r,), (r,), (1,)))
    unknown = [name for name in names if name not in sizes.known]
    if unknown:
        fused = next(dim for dim in (*sending, *receiving) if unknown[0] in dim.names)
        raise LayoutError(
            f"the size of {unknown[0]} is not known: {sent.text!r} at {sent.who}, {there.text!r} at {there.who}. "
            f"Declare "
            f"one of {fused}, such as `{str(fused).replace(unknown[0], unknown[0] + '=8', 1)}`."
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


def _product(component: Component, side: SideDims, runs_of_dims: Sequence[Sequence[Run]]) -> Boxes:
    """Boxes of all combinations of runs. A run that cuts into a fused dim becomes several boxes."""
    per_dim: list[list[tuple[dict[int, tuple[int, int]], int]]] = []
    for dim, runs in zip(side.dims, runs_of_dims, strict=True):
        # The factors along this dim, outer first.
        factors = sorted(
            (number for number, along in enumerate(side.along) if along == dim), key=lambda n: -side.steps[n]
        )
        sizes = [component.sizes[number] for number in factors]
        boxes: list[tuple[dict[int, tuple[int, int]], int]] = []
        limit = 1
        for size in sizes:
            limit *= size
        for start, length, local in runs:
            for starts, lengths in rectangles(start, min(start + length, limit), sizes):
                flat = 0
                for begin, size in zip(starts, sizes, strict=True):
                    flat = flat * size + begin
                boxes.append((dict(zip(factors, zip(starts, lengths, strict=True), strict=True)), local + flat - start))
        per_dim.append(boxes)
    found = []
    for combination in product(*per_dim):
        places: dict[int, tuple[int, int]] = {}
        for own, _ in combination:
            places.update(own)
        starts = tuple(places[number][0] for number in range(len(component.sizes)))
        lengths = tuple(places[number][1] for number in range(len(component.sizes)))
        found.append(SpaceBox(starts, lengths, tuple(local for _, local in combination)))
    return tuple(found)


def rectangles(start: int, stop: int, sizes: Sequence[int]) -> list[tuple[Numbers, Numbers]]:
    """The stretch [start, stop) of a row-major index over `sizes`, as (starts, lengths) of rectangles.

    . . x x        a stretch that begins and ends inside of a row is up to three rectangles:
    x x x x        the end of its first row, the full rows, the beginning of its last
    x . . .
    """
    if start >= stop:
        return []
    if len(sizes) == 1:
        return [((start,), (stop - start,))]
    inner = 1
    for size in sizes[1:]:
        inner *= size
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
