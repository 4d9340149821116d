"""Recomputed regions in a model that FSDP2 shards. In one of transformers: tests/e2e/test_recompute_llama.py."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import torch
from jobs import Jobs, Rank, succeed

import grafter


def train_sharded(rank: Rank) -> Any:
    import torch.distributed as dist
    from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
    from torch.distributed.fsdp import fully_shard

    directory, is_checkpointed = rank.arguments
    dist.init_process_group(
        "gloo", init_method=f"file://{directory}/{rank.role}", rank=rank.role_rank, world_size=rank.world_size
    )
    torch.manual_seed(1 if rank.is_baseline else 2)
    make = functools.partial(torch.nn.Linear, 4, 4)
    blocks = [torch.nn.Sequential(make(), torch.nn.Tanh(), make()) for _ in range(2)]
    wrapped = [checkpoint_wrapper(block) if is_checkpointed else block for block in blocks]
    model = torch.nn.Sequential(*wrapped)
    for block in wrapped:
        fully_shard(block)
    fully_shard(model)
    for number, block in enumerate(blocks):
        block[1].register_forward_hook(functools.partial(_dump_output, number))
    for batch in range(2):
        model(torch.full((2, 4), 1.0 + batch + rank.role_rank)).pow(2).sum().backward()
    found = [parameter.grad.full_tensor().tolist() for parameter in model.parameters()]
    dist.destroy_process_group()
    return found


def _dump_output(number: int, module: Any, args: Any, output: torch.Tensor) -> Any:
    return grafter.dump("tanh", output, layer_id=number, write="return")


def test_fsdp2_with_checkpointed_blocks(tmp_path: Path) -> None:
    """Two ranks on each side; the sharded gradients are those without checkpointing."""
    results = {}
    for name, is_checkpointed in (("plain", False), ("checkpointed", True)):
        (tmp_path / name).mkdir()
        with Jobs(tmp_path / name, compiler=True, b2t_filter="True") as jobs:
            for role in ("baseline", "target"):
                jobs.start(role, 2, train_sharded, tmp_path / name, is_checkpointed)
            results[name] = succeed(jobs.wait())
            assert len(jobs.ledgers()["target", 1]) == 4
    assert results["plain"] == results["checkpointed"]
    assert results["plain"][0] != results["plain"][2]
