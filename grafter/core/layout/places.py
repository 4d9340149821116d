"""Places: which coordinates the ranks of one role have on the axes of a layout, and whether they make one tensor.

Two ranks at one place hold the same part of the tensor: replicas, if the layout says so. Otherwise it is an error that
would go unnoticed, since data-parallel ranks with different batches do not hold one tensor.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from math import prod
from typing import NamedTuple

from grafter.core.layout.dims import Dims
from grafter.errors import LayoutError

Coordinates = tuple[int, ...]


class Member(NamedTuple):
    """One participant: its place on the axes of the job (axis, coordinate, size), and its tensor's local shape.

    A tuple is cheap, and a large job makes one for each rank at every new point.
    """

    role: str
    role_rank: int
    placed: tuple[tuple[str, int, int], ...]
    shape: tuple[int, ...]

    def on(self, axis: str) -> tuple[int, int] | None:
        """(coordinate, size) on an axis of the job; None if this rank does not know the axis."""
        for name, at, size in self.placed:
            if name == axis:
                return at, size
        return None

    @property
    def axes(self) -> dict[str, tuple[int, int]]:
        """(coordinate, size) by axis."""
        return {axis: (at, size) for axis, at, size in self.placed}

    def __str__(self) -> str:
        return f"{self.role} rank {self.role_rank}"


@dataclass(frozen=True)
class Mesh:
    """The axes that a layout mentions: their sizes, and the coordinates of all members on each, in order.

    If a job does not have an axis, its size is 1. count: the number of members.
    """

    sizes: dict[str, int]
    coordinates: dict[str, Sequence[int]]
    count: int

    def places(self, axes: Sequence[str]) -> list[Coordinates]:
        """For each member, its coordinates on these axes."""
        if not axes:
            return [()] * self.count
        return list(zip(*(self.coordinates[axis] for axis in axes), strict=True))


def find_mesh(dims: Dims, members: Sequence[Member]) -> Mesh:
    """The mesh that the members form on the axes of `dims`.

    Raises LayoutError, naming axis and ranks, unless every place is held by equally many ranks.
    """
    placing = (*dims.split_axes, *dims.partial)
    mesh = Mesh({}, {}, len(members))
    for axis in (*placing, *dims.replicated):
        mesh.sizes[axis], mesh.coordinates[axis] = _along(dims.axis_of_job(axis), members)
    _check_unique(dims, members, mesh.places((*placing, *dims.replicated)))
    _check_complete(dims, members, mesh, placing)
    return mesh


def _along(axis: str, members: Sequence[Member]) -> tuple[int, Sequence[int]]:
    """The size of an axis of the job, and the coordinate of every member on it."""
    given = [member.on(axis) for member in members]
    first = given[0]
    for own, member in zip(given, members, strict=True):
        if (own is None) != (first is None) or (own is not None and first is not None and own[1] != first[1]):
            raise LayoutError(
                f"the axis {axis!r} is {_said(members[0], axis)} and {_said(member, axis)}. Set it on every rank of "
                f"the job: grafter.set_axes({axis}=(rank, size))."
            )
        if own is not None and not 0 <= own[0] < own[1]:
            raise LayoutError(f"the axis {axis!r} has no place {own[0]} of {own[1]}, as {member} says.")
    if first is None:
        return 1, [0] * len(members)
    return first[1], [own[0] for own in given if own is not None]


def _said(member: Member, axis: str) -> str:
    return f"of size {member.axes[axis][1]} at {member}" if axis in member.axes else f"unknown at {member}"


def _check_unique(dims: Dims, members: Sequence[Member], places: Sequence[Coordinates]) -> None:
    if len(set(places)) == len(members):
        return
    holders: dict[Coordinates, Member] = {}
    for member, place in zip(members, places, strict=True):
        other = holders.setdefault(place, member)
        if other is not member:
            raise LayoutError(_why_one_place(dims, other, member))


def _why_one_place(dims: Dims, one: Member, other: Member) -> str:
    said = {*map(dims.axis_of_job, (*dims.split_axes, *dims.partial, *dims.replicated))}
    both = f"{one} and {other} have the same place in {dims.text!r}"
    apart = sorted(axis for axis in one.axes if axis not in said and one.axes[axis] != other.axes.get(axis))
    if apart:
        return (
            f"{both}; they differ in the axis {apart[0]!r}, which it does not mention. If their tensors are copies, "
            f"write `# {apart[0]}:replicated` at its end; if not (other batches, say), they are not one tensor: give "
            "ranks= of those that share it."
        )
    unset = [dims.axis_of_job(axis) for axis in (*dims.split_axes, *dims.partial, *dims.replicated)]
    unset = [axis for axis in unset if axis not in one.axes]
    if unset:
        return (
            f"{both}, since this job has no axis {unset[0]!r}. Say where each rank stands: "
            f"grafter.set_axes({unset[0]}=(rank, size)), set_mesh(mesh), or GRAFTER_{one.role.upper()}_AXES."
        )
    return (
        f"{both}, and no axis is known in which they differ. Say what sets them apart with grafter.set_axes(...) and "
        "mention it in the layout (`# dp:replicated`, say), or give ranks= of those that share the tensor."
    )


def _check_complete(dims: Dims, members: Sequence[Member], mesh: Mesh, axes: Sequence[str]) -> None:
    holders = Counter(mesh.places(axes))
    sizes = [mesh.sizes[axis] for axis in axes]
    expected = prod(sizes)
    if len(holders) != expected:
        raise LayoutError(
            f"{dims.text!r} needs {expected} places, and no rank among {', '.join(map(str, members[:4]))}"
            f"{', ...' if len(members) > 4 else ''} is at {_at(axes, _first_missing(holders, sizes))}. All ranks that "
            "hold a part take part in the point."
        )
    (most, highest), (fewest, lowest) = (end(holders.items(), key=lambda item: item[1]) for end in (max, min))
    if highest != lowest:
        raise LayoutError(
            f"{dims.text!r}: the part at {_at(axes, most)} is held by {highest} ranks, that at {_at(axes, fewest)} by "
            f"{lowest}; replicas must be equally many."
        )


def _at(axes: Sequence[str], place: Coordinates) -> str:
    return ", ".join(f"{axis}={number}" for axis, number in zip(axes, place, strict=True)) or "the whole"


def _first_missing(holders: Collection[Coordinates], sizes: Sequence[int]) -> Coordinates:
    """The lowest coordinates that no rank has. The search follows the holders, not all products of sizes."""
    place: list[int] = []
    known = set(holders)
    for number, size in enumerate(sizes):
        below = prod(sizes[number + 1 :])
        # One of the `size` coordinates is not full, and no more are full than there are holders.
        full = Counter(own[number] for own in known)
        coordinate = next(one for one in range(size) if full[one] < below)
        place.append(coordinate)
        known = {own for own in known if own[number] == coordinate}
    return tuple(place)
