"""FSDP2: the axes of a mesh without names, which `fully_shard` makes where it is given none.

`fsdp` is the axis over which parameters are sharded, `dp_replicate` the one over which the shards are repeated.
"""

from __future__ import annotations

from typing import Any

from grafter.layout.axes import Axes


def axes(model: Any) -> Axes:
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
        return {}  # its DTensors have said it
    found: Axes = {}
    for axis, kind in (("fsdp", "shard"), ("dp_replicate", "replicate")):
        size = getattr(info, f"{kind}_mesh_size", None)
        if size is not None:
            found[axis] = (getattr(info, f"{kind}_mesh_rank"), size)
    return found
