"""Looking changes nothing in a model of transformers. In modules of torch: tests/capture/test_observer_effect.py."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
from observer_parts import check_that_nothing_changes, each_setting, make_tokens
from torch import nn


def train_llama() -> tuple[nn.Module, Callable[[], torch.Tensor]]:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=32, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
            num_key_value_heads=2, attention_dropout=0.1,
        )
    )  # fmt: skip
    return model, lambda: model(make_tokens(), labels=make_tokens()).loss


@each_setting
def test_nothing_changes_bitwise(tmp_path: Path, settings: dict[str, str]) -> None:
    """Outputs, gradients, updated weights, buffers and the random state, with dropout, in both jobs."""
    check_that_nothing_changes(tmp_path, train_llama, settings)
