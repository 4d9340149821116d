"""megatron-core's GPTModel as a Llama, with its own tensor parallelism.

torchrun --standalone --nproc-per-node 2 megatron_gpt.py OUT --weights FILE --seed N [--own-layers I ...] [--steps N]
"""

import torch
import torch.distributed as dist
from common import HEAD_DIM, HEADS, KV_HEADS, Seen, load_weights, parse_arguments
from dumping import Points
from plain_megatron import make_model, run

import grafter

REPLICATED = "s b h # tp:replicated"
QUERIES, KEYS = "s b g[tp] r d", "s b g[tp] d"
ATTENTION = "s b (n*d)[tp]"
FEATURES = "s b f[tp]"

options = parse_arguments()
dist.init_process_group("gloo")
rank = dist.get_rank()
model = make_model(load_weights(options))
grafter.set_axes(tp=(rank, dist.get_world_size()))
seen = Seen()
points = Points(seen)


def on_input(module: torch.nn.Module, name: str, layer_id: int, dims: str) -> None:
    def hook(_: torch.nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
        if args:
            return (points.dump(name, args[0], layer_id, dims), *args[1:]), kwargs
        return args, {**kwargs, "hidden_states": points.dump(name, kwargs["hidden_states"], layer_id, dims)}

    module.register_forward_pre_hook(hook, with_kwargs=True)


def on_output(module: torch.nn.Module, name: str, layer_id: int, dims: str) -> None:
    """Megatron's modules return their output and one thing more (a bias, a context)."""
    module.register_forward_hook(lambda _, args, output: (points.dump(name, output[0], layer_id, dims), *output[1:]))


def on_fused_projection(module: torch.nn.Module, layer_id: int) -> None:
    """Its output holds q, q, k, v for each KV group; a point is a view of its part, and is written through it."""

    def hook(_: torch.nn.Module, args: tuple, output: tuple) -> None:
        groups = output[0].unflatten(-1, (-1, HEADS // KV_HEADS + 2, HEAD_DIM))
        points.dump("q", groups[..., :-2, :], layer_id, QUERIES)
        points.dump("k", groups[..., -2, :], layer_id, KEYS)
        points.dump("v", groups[..., -1, :], layer_id, KEYS)

    module.register_forward_hook(hook)


for i, layer in enumerate(model.decoder.layers):
    on_input(layer, "layer_in", i, REPLICATED)
    on_fused_projection(layer.self_attention.linear_qkv, i)
    on_input(layer.self_attention.linear_proj, "attn", i, ATTENTION)
    on_input(layer.mlp.linear_fc2, "mlp_hidden", i, FEATURES)
    on_output(layer.mlp.linear_fc2, "mlp_out", i, REPLICATED)
    on_output(layer, "layer_out", i, REPLICATED)

with torch.no_grad():
    for seen.step in range(options.steps):
        seen.keep("logits", run(model))
        grafter.step()
seen.save(options.out, rank)
dist.destroy_process_group()
