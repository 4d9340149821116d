"""Recomputed regions as transformers' models have them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from jobs import Rank
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
