"""Where a rank stands on its framework's mesh, found in a process of its own over torch's fake process group."""

from __future__ import annotations

import sys
from typing import Any

from jobs import call_in_a_process


def axes(code: str, rank: int, size: int) -> dict[str, tuple[int, int]]:
    """The axes of `model` after `code`, which has `sys`, `torch`, `init_device_mesh` and `mesh_axes`, too."""
    found: dict[str, tuple[int, int]] = call_in_a_process(_find_axes, code, rank, size)
    return found


def _find_axes(code: str, rank: int, size: int) -> dict[str, tuple[int, int]]:
    import torch
    import torch.distributed as dist
    from torch.distributed.device_mesh import init_device_mesh
    from torch.testing._internal.distributed.fake_pg import FakeStore

    from grafter.capture.adapters import mesh_axes

    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=size)
    names: dict[str, Any] = {
        "sys": sys,
        "torch": torch,
        "init_device_mesh": init_device_mesh,
        "mesh_axes": mesh_axes,
        "model": torch.nn.Linear(8, 8),
    }
    exec(code, names)
    return dict(mesh_axes(names["model"]))
