"""FSDP2: the axis `fsdp` of a mesh without names, which `fully_shard` makes where it is given no mesh."""

from __future__ import annotations

from typing import Any

from grafter.core.layout.axes import Axes


def axes(model: Any) -> Axes:
    """The axis of the first parameter group's mesh."""
    from torch.distributed.fsdp import FSDPModule

    for module in model.modules():
        if isinstance(module, FSDPModule):
            for group in _parameter_groups(module):
                return _axes_of(group.mesh_info)
    return {}


def _parameter_groups(module: Any) -> list[Any]:
    state = module._get_fsdp_state()
    groups = getattr(state, "_fsdp_param_groups", None)
    if groups is None:  # torch before 2.11 has one group
        groups = [state._fsdp_param_group]
    return [group for group in groups if group is not None]


def _axes_of(info: Any) -> Axes:
    if info.mesh.mesh_dim_names:
        return {}  # read from its DTensors; a mesh of two dims must have names
    return {"fsdp": (info.shard_mesh_rank, info.shard_mesh_size)}
