"""Places: which coordinates the ranks of one role have on the axes of a layout, and whether they make one tensor.

Two ranks at one place would be two values for the same part of the tensor: replicas, if they say so, else a mistake
that nobody would see (two data-parallel replicas with different batches are not one tensor).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from grafter.errors import LayoutError
from grafter.layout.dims import Dims

Coordinates = tuple[int, ...]


@dataclass(frozen=True)
class Member:
    """One participant: its axes (axis of the job -> (coordinate, size)) and its tensor's local shape."""

    role_rank: int
    who: str
    axes: dict[str, tuple[int, int]]
    shape: tuple[int, ...]
    call_site: str = ""

    @property
    def role(self) -> str:
        return self.who.split(" ")[0]

    def __str__(self) -> str:
        return self.who


@dataclass(frozen=True)
class Mesh:
    """The axes that a layout mentions: their sizes, and each member's coordinates. An axis nobody has is of size 1."""

    sizes: dict[str, int]
    coordinates: dict[int, dict[str, int]]

    def of(self, role_rank: int, axes: Sequence[str]) -> Coordinates:
        own = self.coordinates[role_rank]
        return tuple(own[axis] for axis in axes)


def find_places(dims: Dims, members: Sequence[Member]) -> Mesh:
    """Raises LayoutError, naming axis and ranks, unless every place of the layout is held by equally many ranks."""
    placing = (*dims.split_axes, *dims.partial)
    sizes = {axis: _size_of(axis, dims, members) for axis in (*placing, *dims.replicated)}
    coordinates = {
        member.role_rank: {axis: member.axes.get(dims.axis_of_job(axis), (0, 1))[0] for axis in sizes}
        for member in members
    }
    mesh = Mesh(sizes, coordinates)
    _check_unique(dims, members, mesh, (*placing, *dims.replicated))
    _check_complete(dims, members, mesh, placing)
    return mesh


def _size_of(axis: str, dims: Dims, members: Sequence[Member]) -> int:
    name = dims.axis_of_job(axis)
    first = members[0]
    size = first.axes.get(name, (0, 1))[1]
    for member in members:
        own = member.axes.get(name)
        if (own is None) != (name not in first.axes) or (own is not None and own[1] != size):
            raise LayoutError(
                f"the axis {name!r} is {_said(first, name)} and {_said(member, name)}. Set it on every rank of the "
                f"job: grafter.set_axes({name}=(rank, size))."
            )
    return size


def _said(member: Member, axis: str) -> str:
    return f"of size {member.axes[axis][1]} at {member}" if axis in member.axes else f"unknown at {member}"


def _check_unique(dims: Dims, members: Sequence[Member], mesh: Mesh, axes: Sequence[str]) -> None:
    holders: dict[Coordinates, Member] = {}
    for member in members:
        other = holders.setdefault(mesh.of(member.role_rank, axes), member)
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
    unset = [axis for axis in (*dims.split_axes, *dims.partial) if dims.axis_of_job(axis) not in one.axes]
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
    holders: dict[Coordinates, int] = {}
    for member in members:
        place = mesh.of(member.role_rank, axes)
        holders[place] = holders.get(place, 0) + 1
    expected = 1
    for axis in axes:
        expected *= mesh.sizes[axis]
    if len(holders) != expected:
        missing = _first_missing(holders, [mesh.sizes[axis] for axis in axes])
        where = ", ".join(f"{axis}={number}" for axis, number in zip(axes, missing, strict=True))
        raise LayoutError(
            f"{dims.text!r} needs {expected} places, and no rank among {', '.join(map(str, members[:4]))}"
            f"{', ...' if len(members) > 4 else ''} is at {where}. All ranks that hold a part take part in the point."
        )
    most, fewest = max(holders, key=lambda p: holders[p]), min(holders, key=lambda p: holders[p])
    if holders[most] != holders[fewest]:
        raise LayoutError(
            f"{dims.text!r}: the part at {_at(axes, most)} is held by {holders[most]} ranks, that at "
            f"{_at(axes, fewest)} by {holders[fewest]}; replicas must be equally many."
        )


def _at(axes: Sequence[str], place: Coordinates) -> str:
    return ", ".join(f"{axis}={number}" for axis, number in zip(axes, place, strict=True)) or "the whole"


def _first_missing(holders: dict[Coordinates, int], sizes: Sequence[int]) -> Coordinates:
    """The lowest coordinates that nobody has; looked for along the holders, not along all products of sizes."""
    place: list[int] = []
    known = set(holders)
    for number, size in enumerate(sizes):
        below = 1
        for other in sizes[number + 1 :]:
            below *= other
        for coordinate in range(size):
            inside = {own for own in known if own[number] == coordinate}
            if len(inside) < below:
                place.append(coordinate)
                known = inside
                break
    return tuple(place)
