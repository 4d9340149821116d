"""Adapters: where a rank stands on its framework's mesh. Ranks are one process's, over torch's fake process group."""

from __future__ import annotations

import sys

import pytest
import torch
from adapter_parts import axes

from grafter.capture import adapters


def test_a_process_without_a_framework_has_no_axes() -> None:
    assert adapters.mesh_axes(torch.nn.Linear(2, 2)) == {}


def test_the_mesh_of_dtensors_and_the_whole_that_it_is_cut_from() -> None:
    """A parameter on the `tp` part of a mesh tells the data-parallel axis, too."""
    code = """
from torch.distributed.tensor import distribute_tensor, Shard
mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp"))
model.weight = torch.nn.Parameter(distribute_tensor(model.weight.detach(), mesh["tp"], [Shard(0)], src_data_rank=None))
"""
    assert axes(code, 2, 4) == {"dp": (1, 2), "tp": (0, 2)}


@pytest.mark.parametrize(
    ("mesh", "expected"),
    [
        ("", {"fsdp": (3, 4)}),
        (
            ", mesh=init_device_mesh('cpu', (2, 2), mesh_dim_names=('replicate', 'shard'))",
            {"replicate": (1, 2), "shard": (1, 2)},
        ),
        (", mesh=init_device_mesh('cpu', (4,), mesh_dim_names=('dp',))", {"dp": (3, 4)}),
    ],
)
def test_fully_sharded_models(mesh: str, expected: dict[str, tuple[int, int]]) -> None:
    """Without names the axis is `fsdp`; with names they are the mesh's own."""
    code = f"from torch.distributed.fsdp import fully_shard\nfully_shard(model{mesh})"
    assert axes(code, 3, 4) == expected


def test_transformers() -> None:
    """The mesh that `from_pretrained` makes: all of its axes."""
    pytest.importorskip("transformers")
    code = """
import transformers.modeling_utils
from transformers import DistributedConfig
from transformers.distributed.utils import initialize_distributed_mesh
_, manager = initialize_distributed_mesh(DistributedConfig(tp_plan="auto", tp_size=2, fsdp_size=2))
model._device_mesh = manager.get_mesh(("pp", "fsdp", "tp"))
"""
    assert axes(code, 3, 4) == {"pp": (0, 1), "dp_replicate": (0, 1), "fsdp": (1, 2), "tp": (1, 2)}


def test_a_framework_that_cannot_be_read_is_told_of_and_left_out(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """A new version of a framework must not keep a program from running."""
    monkeypatch.setattr(adapters, "_ADAPTERS", (("torch", "megatron"),))
    monkeypatch.delitem(sys.modules, "megatron.core.parallel_state", raising=False)
    assert adapters.mesh_axes(torch.nn.Linear(2, 2)) == {}
    assert "the mesh of torch cannot be read" in caplog.text
