"""Recomputed regions as real programs have them: transformers, FSDP2."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import torch
from jobs import Jobs, Rank, succeed
from recompute_parts import both_kinds, run_both

import grafter


def train_llama(rank: Rank) -> Any:
    use_reentrant, is_checkpointed = rank.arguments
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(1 if rank.is_baseline else 2)
    config = LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=4,
        num_key_value_heads=2, attention_dropout=0.1,
    )  # fmt: skip
    model = LlamaForCausalLM(config).train()
    if is_checkpointed:
        model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
    attachment = grafter.attach(model, "model.layers.*")
    torch.manual_seed(3)
    ids = torch.arange(8).reshape(2, 4)
    losses = [model(input_ids=ids + batch, labels=ids, use_cache=False).loss for batch in range(2)]
    grafter.step()
    torch.stack(losses).sum().backward()
    assert attachment is not None
    return [float(loss) for loss in losses], {name: p.grad.tolist() for name, p in model.named_parameters()}


@both_kinds
def test_transformers_gradient_checkpointing(tmp_path: Path, use_reentrant: bool) -> None:
    """Every decoder layer's output grafted, through hooks: losses and gradients to the last bit as without."""
    filters = {"b2t_filter": "name == 'model.layers.out'", "attach": None}
    plain, _ = run_both(tmp_path / "plain", train_llama, use_reentrant, False, **filters)
    found, ledger = run_both(tmp_path / "checkpointed", train_llama, use_reentrant, True, **filters)
    assert found == plain
    assert [record.outcome for record in ledger] == ["grafted"] * 6
    assert [record.tags["layer_id"] for record in ledger] == [0, 1, 2] * 2


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
        with Jobs(tmp_path / name, b2t_filter="True") as jobs:
            for role in ("baseline", "target"):
                jobs.start(role, 2, train_sharded, tmp_path / name, is_checkpointed)
            results[name] = succeed(jobs.wait())
            assert len(jobs.ledgers()["target", 1]) == 4
    assert results["plain"] == results["checkpointed"]
    assert results["plain"][0] != results["plain"][2]
