"""megatron-core's GPTModel as a Llama, tensor parallel, as somebody has it who never heard of grafting.

torchrun --standalone --nproc-per-node 2 plain_megatron.py OUT --weights FILE --seed N [--own-layers I ...] [--steps N]
"""

import torch
import torch.distributed as dist
import torch.nn.functional as F
from common import (
    HEAD_DIM,
    HEADS,
    HIDDEN,
    INTERMEDIATE,
    KV_HEADS,
    LAYERS,
    NORM_EPS,
    ROPE_THETA,
    SEQUENCE,
    VOCAB,
    Seen,
    load_weights,
    parse_arguments,
    token_ids,
)
from megatron.core import parallel_state
from megatron.core.models.gpt import GPTModel
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from megatron.core.tensor_parallel.random import initialize_rng_tracker
from megatron.core.transformer import TransformerConfig


def make_model(weights: dict[str, torch.Tensor]) -> GPTModel:
    """Called by every rank, once torch.distributed is initialised: tensor parallel over all of them."""
    rank, world_size = dist.get_rank(), dist.get_world_size()
    # megatron-core asks for the current GPU wherever it makes a tensor, and for GPU generators; here there is none.
    torch.cuda.current_device = lambda: torch.device("cpu")
    initialize_rng_tracker(inference_rng_tracker=True)
    parallel_state.initialize_model_parallel(tensor_model_parallel_size=world_size)
    config = TransformerConfig(
        num_layers=LAYERS,
        hidden_size=HIDDEN,
        ffn_hidden_size=INTERMEDIATE,
        num_attention_heads=HEADS,
        num_query_groups=KV_HEADS,
        normalization="RMSNorm",
        layernorm_epsilon=NORM_EPS,
        activation_func=F.silu,
        gated_linear_unit=True,
        add_bias_linear=False,
        attention_dropout=0.0,
        hidden_dropout=0.0,
        tensor_model_parallel_size=world_size,
        use_cpu_initialization=True,
        perform_initialization=False,
        params_dtype=torch.float32,
        pipeline_dtype=torch.float32,
        gradient_accumulation_fusion=False,
        bias_dropout_fusion=False,
        bias_activation_fusion=False,
        masked_softmax_fusion=False,
        apply_rope_fusion=False,
        persist_layer_norm=False,
    )
    model = GPTModel(
        config,
        get_gpt_layer_local_spec(normalization="RMSNorm"),
        vocab_size=VOCAB,
        max_sequence_length=SEQUENCE,
        parallel_output=False,
        position_embedding_type="rope",
        rotary_base=ROPE_THETA,
    )
    unloaded = model.load_state_dict(megatron_state(weights, rank, world_size), strict=False)
    # What megatron keeps beside weights (`_extra_state`) is empty without fp8.
    assert not unloaded.unexpected_keys
    assert all(key.endswith("_extra_state") for key in unloaded.missing_keys), unloaded.missing_keys
    return model.eval()


def run(model: GPTModel) -> torch.Tensor:
    """Its logits."""
    positions = torch.arange(SEQUENCE).expand(*token_ids().shape)
    causal_mask = torch.ones(1, 1, SEQUENCE, SEQUENCE).triu(1).bool()
    return model(token_ids(), positions, causal_mask)


def megatron_state(weights: dict[str, torch.Tensor], rank: int, world_size: int) -> dict[str, torch.Tensor]:
    """This rank's part of the checkpoint, with megatron's names; q, k and v interleaved per KV group."""

    def shard(weight: torch.Tensor, dim: int) -> torch.Tensor:
        return weight.chunk(world_size, dim)[rank]

    state = {
        "embedding.word_embeddings.weight": shard(weights["model.embed_tokens.weight"], 0),
        "decoder.final_layernorm.weight": weights["model.norm.weight"],
        "output_layer.weight": shard(weights["lm_head.weight"], 0),
    }
    for i in range(LAYERS):
        ours, theirs = f"decoder.layers.{i}.", f"model.layers.{i}."
        q, k, v = (
            weights[f"{theirs}self_attn.{name}_proj.weight"].view(KV_HEADS, -1, HEAD_DIM, HIDDEN) for name in "qkv"
        )
        qkv = torch.cat([q, k, v], dim=1).reshape(-1, HIDDEN)
        gate, up = (shard(weights[f"{theirs}mlp.{name}_proj.weight"], 0) for name in ("gate", "up"))
        state |= {
            f"{ours}input_layernorm.weight": weights[f"{theirs}input_layernorm.weight"],
            f"{ours}self_attention.linear_qkv.weight": shard(qkv, 0),
            f"{ours}self_attention.linear_proj.weight": shard(weights[f"{theirs}self_attn.o_proj.weight"], 1),
            f"{ours}pre_mlp_layernorm.weight": weights[f"{theirs}post_attention_layernorm.weight"],
            f"{ours}mlp.linear_fc1.weight": torch.cat([gate, up]),
            f"{ours}mlp.linear_fc2.weight": shard(weights[f"{theirs}mlp.down_proj.weight"], 1),
        }
    return state


if __name__ == "__main__":
    options = parse_arguments()
    dist.init_process_group("gloo")
    model = make_model(load_weights(options))
    seen = Seen()
    with torch.no_grad():
        for seen.step in range(options.steps):
            seen.keep("logits", run(model))
    seen.save(options.out, dist.get_rank())
    dist.destroy_process_group()
