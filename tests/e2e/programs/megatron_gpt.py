"""megatron-core's GPTModel as a Llama, with its own tensor parallelism.

torchrun --standalone --nproc-per-node 2 megatron_gpt.py OUT --weights FILE --seed N [--own-layers I ...] [--steps N]
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

import grafter

REPLICATED = "s b h # tp:replicated"
QUERIES, KEYS = "s b g[tp] r d", "s b g[tp] d"
ATTENTION = "s b (n*d)[tp]"
FEATURES = "s b f[tp]"

options = parse_arguments()
dist.init_process_group("gloo")
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


def shard(weight: torch.Tensor, dim: int) -> torch.Tensor:
    return weight.chunk(world_size, dim)[rank]


def megatron_state(weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """This rank's part of the checkpoint, with megatron's names; q, k and v interleaved per KV group."""
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


unloaded = model.load_state_dict(megatron_state(load_weights(options)), strict=False)
# What megatron keeps beside weights (`_extra_state`) is empty without fp8.
assert not unloaded.unexpected_keys
assert all(key.endswith("_extra_state") for key in unloaded.missing_keys), unloaded.missing_keys
model.eval()
grafter.set_axes(tp=(rank, world_size))
seen = Seen()


def point(name: str, value: torch.Tensor, layer_id: int, dims: str) -> torch.Tensor:
    kind = type(value).__name__
    value = grafter.dump(name, value, layer_id=layer_id, dims=dims)
    seen.keep(f"{name}.{layer_id}", value, kind)
    return value


def on_input(module: torch.nn.Module, name: str, layer_id: int, dims: str) -> None:
    def hook(_: torch.nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
        if args:
            return (point(name, args[0], layer_id, dims), *args[1:]), kwargs
        return args, {**kwargs, "hidden_states": point(name, kwargs["hidden_states"], layer_id, dims)}

    module.register_forward_pre_hook(hook, with_kwargs=True)


def on_output(module: torch.nn.Module, name: str, layer_id: int, dims: str) -> None:
    """Megatron's modules return their output and one thing more (a bias, a context)."""
    module.register_forward_hook(lambda _, args, output: (point(name, output[0], layer_id, dims), *output[1:]))


def on_fused_projection(module: torch.nn.Module, layer_id: int) -> None:
    """Its output holds q, q, k, v for each KV group; a point is a view of its part, and is written through it."""

    def hook(_: torch.nn.Module, args: tuple, output: tuple) -> None:
        groups = output[0].unflatten(-1, (-1, HEADS // KV_HEADS + 2, HEAD_DIM))
        point("q", groups[..., :-2, :], layer_id, QUERIES)
        point("k", groups[..., -2, :], layer_id, KEYS)
        point("v", groups[..., -1, :], layer_id, KEYS)

    module.register_forward_hook(hook)


for i, layer in enumerate(model.decoder.layers):
    on_input(layer, "layer_in", i, REPLICATED)
    on_fused_projection(layer.self_attention.linear_qkv, i)
    on_input(layer.self_attention.linear_proj, "attn", i, ATTENTION)
    on_input(layer.mlp.linear_fc2, "mlp_hidden", i, FEATURES)
    on_output(layer.mlp.linear_fc2, "mlp_out", i, REPLICATED)
    on_output(layer, "layer_out", i, REPLICATED)

positions = torch.arange(SEQUENCE).expand(*token_ids().shape)
causal_mask = torch.ones(1, 1, SEQUENCE, SEQUENCE).triu(1).bool()
with torch.no_grad():
    for seen.step in range(options.steps):
        seen.keep("logits", model(token_ids(), positions, causal_mask))
        grafter.step()
seen.save(options.out, rank)
dist.destroy_process_group()
