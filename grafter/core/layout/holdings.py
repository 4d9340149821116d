"""Holdings: for each rank of a role, which of the distinct box lists it has in each component."""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Iterator, Sequence

from grafter.core.layout.meetings import BoxLists, Table
from grafter.core.layout.shares import RoleShares, Share
from grafter.core.layout.space import Space

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
