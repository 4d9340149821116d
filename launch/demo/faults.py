"""Faults of the kind that ports of a model really have, planted in one decoder layer of the demo's target."""

from __future__ import annotations

import copy
from typing import Any

from torch import nn
from transformers import LlamaForCausalLM
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

NORM_EPSILON = 1e-5  # the config says 1e-6
ROPE_THETA = 500_000.0  # the config says 10,000


def plant_fault(model: LlamaForCausalLM, fault: str, layer_id: int) -> None:
    """Make `model.model.layers[layer_id]` wrong in one way: `norm`, `rope`, or not at all (`none`).

    Raises ValueError where the model has no such layer.
    """
    layer_count = len(model.model.layers)
    if not 0 <= layer_id < layer_count:
        raise ValueError(f"--layer {layer_id}: the model has layers 0 to {layer_count - 1}")
    layer = model.model.layers[layer_id]
    if fault == "norm":
        layer.input_layernorm.variance_epsilon = NORM_EPSILON
        layer.post_attention_layernorm.variance_epsilon = NORM_EPSILON
    elif fault == "rope":
        _give_own_rotary_embedding(model, layer.self_attn)


def _give_own_rotary_embedding(model: LlamaForCausalLM, attention: nn.Module) -> None:
    # transformers computes cos and sin once for all layers and hands them down, so a layer with another theta (as in
    # models that mix local and global attention) replaces what it gets.
    config = copy.deepcopy(model.config)
    config.rope_parameters["rope_theta"] = ROPE_THETA
    rotary_embedding = LlamaRotaryEmbedding(config)

    def use_own_rotary_embedding(
        module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        position_embeddings = rotary_embedding(kwargs["hidden_states"], kwargs["position_ids"])
        return args, {**kwargs, "position_embeddings": position_embeddings}

    attention.register_forward_pre_hook(use_own_rotary_embedding, with_kwargs=True)
