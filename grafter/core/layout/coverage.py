"""Coverage: which boxes each rank of a role holds, and whether together they hold the whole."""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Iterator, Sequence

from grafter.core.layout.overlap import find_overlap
from grafter.core.layout.overlap_table import BoxLists, Table
from grafter.core.layout.shares import RoleShares, Share
from grafter.core.layout.space import Boxes, Component, Space, SpaceBox
from grafter.errors import LayoutError

# For each component, the number of a rank's boxes among the distinct ones.
Place = tuple[int, ...]


def places(side: RoleShares, space: Space, tables: Sequence[Table], *, sender: bool) -> Iterator[tuple[int, Place]]:
    """The place of each rank that holds something. Equal shares are looked at once."""
    ranks, shares = list(side.shares), list(side.shares.values())
    columns: list[list[int]] = []
    nothing: list[set[int]] = []
    for component, table in zip(space.components, tables, strict=True):
        dims = component.sender if sender else component.receiver
        lists = table.senders if sender else table.receivers
        keys = _keys(shares, dims.dims)
        numbers = {
            key: lists.number(space.boxes(share, component, dims))
            for key, share in dict(zip(keys, shares, strict=True)).items()
        }
        columns.append([numbers[key] for key in keys])
        nothing.append(_empty(lists, numbers.values()))
    places = zip(*columns, strict=True) if columns else iter([()] * len(ranks))
    some_hold_nothing = any(nothing)
    for rank, share, place in zip(ranks, shares, places, strict=True):
        if some_hold_nothing and any(number in empty for number, empty in zip(place, nothing, strict=True)):
            continue
        # A dim of size 1 may be in no component, and held by nobody but one.
        if share.boxes is None and not all(share.runs):
            continue
        if share.boxes is not None and not any(all(box.size) for box in share.boxes):
            continue
        yield rank, place


def places_by_box(side: RoleShares, space: Space, table: Table) -> Iterator[tuple[int, list[Place]]]:
    """Where a sender gives boxes, each of them is a part of its own: two ranks may have one of several in common."""
    (component,) = space.components
    for rank, share in side.shares.items():
        boxes = space.boxes(share, component, component.sender)
        yield rank, [(table.senders.number((box,)),) for box in boxes]


def _keys(shares: Sequence[Share], dims: Sequence[int]) -> list[Hashable]:
    """By identity: ranks at one place of a mesh share their runs, of which there may be many."""
    if any(share.boxes is not None for share in shares):
        return [id(share) for share in shares]
    if len(dims) == 1:
        (dim,) = dims
        return [id(share.runs[dim]) for share in shares]
    return [tuple([id(share.runs[dim]) for dim in dims]) for share in shares]


def _empty(lists: BoxLists, numbers: Iterable[int]) -> set[int]:
    return {number for number in numbers if not lists.boxes[number]}


# Coverage: whether the senders of a point hold the whole of its tensor, each part once but for replicas.


def check_coverage(component: Component, lists: Sequence[tuple[Boxes, str]], who: str) -> None:
    """Raise LayoutError for a region that no rank covers, or for parts that overlap without being the same.

    `lists`: the distinct shares of one component, each with a rank that holds it.
    """
    boxes = [(box, holder) for own, holder in lists for box in own]
    overlap = find_overlap([box.starts for box, _ in boxes], [box.sizes for box, _ in boxes])
    if overlap is not None:
        (one, first), (other, second) = boxes[overlap[0]], boxes[overlap[1]]
        raise LayoutError(
            f"parts of {who} overlap without being copies: {component.place(one)} at {first} and "
            f"{component.place(other)} at {second}. Each value needs one owner, or equal copies."
        )
    held = sum(box.volume for box, _ in boxes)
    if held != component.volume:
        hole = _first_hole([box for box, _ in boxes], component.sizes)
        where = ", ".join(f"{name} at {at}" for name, at in zip(component.names, hole, strict=True))
        raise LayoutError(
            f"the parts of {who} leave a hole: they hold {held} of {component.volume} places of "
            f"{' x '.join(f'{n}={s}' for n, s in zip(component.names, component.sizes, strict=True))}, and nobody "
            f"holds {where}. All ranks that hold a part take part in the point."
        )


def _first_hole(boxes: Sequence[SpaceBox], sizes: Sequence[int]) -> list[int]:
    """The first place, in row-major order, that is in none of the boxes, which do not overlap."""
    hole: list[int] = []
    for dim in range(len(sizes)):
        inside = 1
        for size in sizes[dim + 1 :]:
            inside *= size
        # Along this dim, what is held of each step changes only where a box begins or ends.
        changes = {0: 0}
        for box in boxes:
            held = box.volume
            for before in range(dim + 1):
                held //= box.sizes[before]
            start = box.starts[dim]
            changes[start] = changes.get(start, 0) + held
            changes[start + box.sizes[dim]] = changes.get(start + box.sizes[dim], 0) - held
        held = 0
        for at in sorted(changes):
            held += changes[at]
            if held < inside:
                break
        hole.append(at)
        boxes = [box for box in boxes if box.starts[dim] <= at < box.starts[dim] + box.sizes[dim]]
    return hole
