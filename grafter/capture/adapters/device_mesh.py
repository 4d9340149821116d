"""Plain torch: the named meshes on which a model's DTensors lie, and the whole meshes that these are cut from."""

from __future__ import annotations

import itertools
from typing import Any

from grafter.core.layout.axes import Axes


def axes(model: Any) -> Axes:
    """The axes of the meshes of all DTensors, and of the meshes that these were cut from."""
    from torch.distributed.tensor import DTensor

    found: Axes = {}
    meshes: list[Any] = []
    for tensor in itertools.chain(model.parameters(), model.buffers()):
        if isinstance(tensor, DTensor) and not any(tensor.device_mesh is mesh for mesh in meshes):
            meshes.append(tensor.device_mesh)
    for mesh in meshes:
        found = {**axes_of_mesh(root_of(mesh)), **found, **axes_of_mesh(mesh)}
    return found


def axes_of_mesh(mesh: Any) -> Axes:
    """The named axes of a mesh; none if it has no names, or if this rank is not in it."""
    coordinate = mesh.get_coordinate()
    if not mesh.mesh_dim_names or coordinate is None:
        return {}
    return {name: (coordinate[number], mesh.size(number)) for number, name in enumerate(mesh.mesh_dim_names)}


def root_of(mesh: Any) -> Any:
    """The mesh that this one was cut from. torch before 2.7 keeps it elsewhere."""
    get_root = getattr(mesh, "_get_root_mesh", None)
    return get_root() if get_root is not None else mesh
