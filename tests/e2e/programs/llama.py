"""transformers' Llama: in one process, or in its own tensor parallelism.

python llama.py OUT --weights FILE --seed N [--own-layers I ...] [--steps N]
torchrun --standalone --nproc-per-node 2 llama.py OUT ...
"""

import os

import torch
import torch.distributed as dist
from common import (
    HEADS,
    HIDDEN,
    INTERMEDIATE,
    KV_HEADS,
    LAYERS,
    NORM_EPS,
    ROPE_THETA,
    VOCAB,
    Seen,
    load_weights,
    parse_arguments,
    token_ids,
)
from transformers import LlamaConfig, LlamaForCausalLM

import grafter

REPLICATED = "b s h # tp:replicated"
QUERIES, KEYS = "b s (g*r*d)[tp]", "b s (g*d)[tp]"  # g groups of r query heads that share one key head
ATTENTION = "b s (n*d)[tp]"
FEATURES = "b s f[tp]"

options = parse_arguments()
rank, world_size = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
config = LlamaConfig(
    vocab_size=VOCAB,
    hidden_size=HIDDEN,
    intermediate_size=INTERMEDIATE,
    num_hidden_layers=LAYERS,
    num_attention_heads=HEADS,
    num_key_value_heads=KV_HEADS,
    rms_norm_eps=NORM_EPS,
    rope_parameters={"rope_type": "default", "rope_theta": ROPE_THETA},
    use_cache=False,
)
if world_size == 1:
    model = LlamaForCausalLM(config)
    model.load_state_dict(load_weights(options))
else:
    # transformers shards while it loads, from a directory.
    from transformers import DistributedConfig

    dist.init_process_group("gloo")
    checkpoint = options.out / "checkpoint"
    if rank == 0:
        LlamaForCausalLM(config).save_pretrained(checkpoint, state_dict=load_weights(options))
    dist.barrier()
    model = LlamaForCausalLM.from_pretrained(
        checkpoint, dtype=torch.float32, distributed_config=DistributedConfig(tp_plan="auto")
    )
model.eval()
grafter.set_axes(tp=(rank, world_size))
seen = Seen()


def point(name: str, value: torch.Tensor, layer_id: int, dims: str) -> torch.Tensor:
    kind = type(value).__name__
    value = grafter.dump(name, value, layer_id=layer_id, dims=dims)
    seen.keep(f"{name}.{layer_id}", value, kind)
    return value


def on_input(module: torch.nn.Module, name: str, layer_id: int, dims: str) -> None:
    module.register_forward_pre_hook(lambda _, args: (point(name, args[0], layer_id, dims), *args[1:]))


def on_output(module: torch.nn.Module, name: str, layer_id: int, dims: str) -> None:
    module.register_forward_hook(lambda _, args, output: point(name, output, layer_id, dims))


for i, layer in enumerate(model.model.layers):
    on_input(layer, "layer_in", i, REPLICATED)
    on_output(layer.self_attn.q_proj, "q", i, QUERIES)
    on_output(layer.self_attn.k_proj, "k", i, KEYS)
    on_output(layer.self_attn.v_proj, "v", i, KEYS)
    on_input(layer.self_attn.o_proj, "attn", i, ATTENTION)
    on_input(layer.mlp.down_proj, "mlp_hidden", i, FEATURES)
    on_output(layer.mlp.down_proj, "mlp_out", i, REPLICATED)
    on_output(layer, "layer_out", i, REPLICATED)

with torch.no_grad():
    for seen.step in range(options.steps):
        seen.keep("logits", model(input_ids=token_ids()).logits)
        grafter.step()
seen.save(options.out, rank)
if dist.is_initialized():
    dist.destroy_process_group()
