"""transformers: the mesh that `from_pretrained` puts on a model it has distributed, with the axes pp, fsdp and tp."""

from __future__ import annotations

from typing import Any

from grafter.capture.adapters.device_mesh import axes_of_mesh, root_of
from grafter.core.layout.axes import Axes


def axes(model: Any) -> Axes:
    """The axes of the first mesh that a module of the model has."""
    for module in model.modules():
        mesh = getattr(module, "_device_mesh", None)
        if mesh is None or not hasattr(mesh, "get_coordinate"):
            continue
        if not mesh.mesh_dim_names:
            # What the older `tp_plan="auto"` makes: tensor parallelism alone.
            coordinate = mesh.get_coordinate()
            return {"tp": (coordinate[0], mesh.size(0))} if coordinate is not None and mesh.ndim == 1 else {}
        return {**axes_of_mesh(root_of(mesh)), **axes_of_mesh(mesh)}
    return {}
