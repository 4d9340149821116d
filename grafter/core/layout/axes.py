"""The mesh axes of this job, and where this rank stands on each: set once, used by every layout.

They are facts about this process, so they may be set before or after grafting is switched on, and cost nothing where it
is off. An argument of the call (`dump(..., axes={"tp": (0, 2)})`) overrides what is set here, which overrides
GRAFTER_BASELINE_AXES and GRAFTER_TARGET_AXES.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from math import prod
from typing import Any

from grafter.errors import LayoutError

# Axis -> (this rank's coordinate on it, its size).
Axes = dict[str, tuple[int, int]]

_axes: Axes = {}


def set_axes(**axes: Any) -> None:
    """Set where this rank stands on the job's mesh axes: `set_axes(tp=(rank, size), pp=(0, 1))`.

    axes: for each axis (coordinate, size), 0 <= coordinate < size, or the job's process group of that axis, from which
        both are read. An axis that is named again is replaced; the others stay. `tp=None` removes one.

    Every rank of a job that declares layouts with `dims=` calls this with its own coordinates, before the first such
    point. Raises LayoutError for any other value. Nothing is communicated.
    """
    given = {axis: place for axis, place in axes.items() if place is not None}
    checked = read_axes(given)
    for axis in axes.keys() - given.keys():
        _axes.pop(axis, None)
    _axes.update(checked)


def set_mesh(device_mesh: Any) -> None:
    """Take axes from a `torch.distributed.device_mesh.DeviceMesh` with `mesh_dim_names`, as `set_axes` does.

    Several meshes may be set, one after the other (one for attention and one for the experts, say); an axis that is
    named again is replaced. A rank that is not in the mesh has no place on its axes. Raises LayoutError for a mesh
    without names. Nothing is communicated.
    """
    names = getattr(device_mesh, "mesh_dim_names", None)
    if not names:
        raise LayoutError(
            f"set_mesh needs a DeviceMesh whose axes have names, not {device_mesh!r}. Make it with mesh_dim_names=, "
            "such as init_device_mesh(device, (2, 4), mesh_dim_names=('dp', 'tp')), or use set_axes(tp=(rank, size))."
        )
    coordinate = device_mesh.get_coordinate()
    if coordinate is None:
        for name in names:
            _axes.pop(name, None)
        return
    _axes.update(
        {name: (coordinate[number], device_mesh.size(number)) for number, name in enumerate(names)},
    )


def axes_of_job() -> Axes:
    """The axes that were set in this process."""
    return _axes


def read_axes(axes: Any) -> Axes:
    """The axes that a user gave, checked. Raises LayoutError naming the axis."""
    if not isinstance(axes, Mapping):
        raise LayoutError(f"axes={axes!r}: it is a dict such as {{'tp': (rank, size)}}.")
    return {axis: _place(axis, value) for axis, value in axes.items()}


def _place(axis: Any, value: Any) -> tuple[int, int]:
    if not isinstance(axis, str) or not axis.isidentifier():
        raise LayoutError(f"{axis!r} is not a name for a mesh axis; it must be a word such as tp.")
    if callable(getattr(value, "rank", None)) and callable(getattr(value, "size", None)):
        coordinate, size = value.rank(), value.size()
        if coordinate < 0:
            raise LayoutError(f"{axis}: this rank is not in the process group that was given. Give its own group.")
        return coordinate, size
    if (
        not isinstance(value, (tuple, list))
        or len(value) != 2
        or not all(type(number) is int for number in value)
        or not 0 <= value[0] < value[1]
    ):
        raise LayoutError(
            f"{axis}={value!r}: an axis is (coordinate, size) with 0 <= coordinate < size, such as {axis}=(0, 2), or "
            "the job's process group of this axis."
        )
    return value[0], value[1]


def read_axis_sizes(text: str) -> dict[str, int]:
    """The sizes in `dp=2 tp=4`, outermost first: the form of GRAFTER_BASELINE_AXES and GRAFTER_TARGET_AXES.

    Raises LayoutError naming the word that has another form.
    """
    sizes: dict[str, int] = {}
    for word in text.replace(",", " ").split():
        axis, _, size = word.partition("=")
        if not axis.isidentifier() or not re.fullmatch("0*[1-9][0-9]{0,8}", size):
            raise LayoutError(f"{word!r} is not `axis=size`, such as tp=4.")
        if axis in sizes:
            raise LayoutError(f"the axis {axis!r} is there twice.")
        sizes[axis] = int(size)
    return sizes


def axes_from_text(text: str, role_rank: int, role_world_size: int) -> Axes:
    """A rank's place on the axes that a setting names, over which role ranks are numbered in row-major order.

    Raises LayoutError if the product of the sizes is not the number of ranks.
    """
    sizes = read_axis_sizes(text)
    inner = prod(sizes.values())
    if inner != role_world_size:
        raise LayoutError(
            f"the axes {text!r} make {inner} ranks, and this job has {role_world_size}. Name every axis of its mesh in "
            "GRAFTER_BASELINE_AXES or GRAFTER_TARGET_AXES, outermost first."
        )
    axes: Axes = {}
    for axis, size in sizes.items():
        inner //= size
        axes[axis] = (role_rank // inner % size, size)
    return axes
