"""Adapters of frameworks that only the extra e2e has: where a rank stands on their meshes."""

from __future__ import annotations

from adapter_parts import axes


def test_torchtitan() -> None:
    """Every axis of ParallelDims, with `dp` for what it calls batch."""
    code = """
# The kernels of its mixture of experts need triton, which is for machines with a GPU.
from types import ModuleType
kernels = sys.modules["torchtitan.models.moe.kernels"] = ModuleType("kernels")
kernels.generate_permute_indices = None
from torchtitan.distributed.parallel_dims import ParallelDims
dims = ParallelDims(dp_replicate=1, dp_shard=2, cp=1, tp=2, pp=1, ep=1, etp=1, world_size=4)
dims.build_mesh()
"""
    found = axes(code, 3, 4)
    assert {axis: found[axis] for axis in ("dp", "fsdp", "tp", "pp", "cp")} == {
        "dp": (1, 2),
        "fsdp": (1, 2),
        "tp": (1, 2),
        "pp": (0, 1),
        "cp": (0, 1),
    }


def test_megatron() -> None:
    """Every axis of its parallel state, once that is there."""
    code = """
from megatron.core import parallel_state
assert mesh_axes(model) == {}, "not before its parallel state is there"
parallel_state.initialize_model_parallel(2, 2, create_gloo_process_groups=False)
"""
    found = axes(code, 5, 8)
    assert {axis: found[axis] for axis in ("tp", "pp", "dp", "cp", "ep")} == {
        "tp": (1, 2),
        "pp": (1, 2),
        "dp": (0, 2),
        "cp": (0, 1),
        "ep": (0, 1),
    }
