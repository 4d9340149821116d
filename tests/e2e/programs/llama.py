"""transformers' Llama: in one process, or in its own tensor parallelism.

python llama.py OUT --weights FILE --seed N [--own-layers I ...] [--steps N]
torchrun --standalone --nproc-per-node 2 llama.py OUT ...
"""

import torch
import torch.distributed as dist
from common import Seen, load_weights, parse_arguments, token_ids
from dumping import Points
from sharded_llama import RANK, WORLD_SIZE, load_model

import grafter

REPLICATED = "b s h # tp:replicated"
QUERIES, KEYS = "b s (g*r*d)[tp]", "b s (g*d)[tp]"  # g groups of r query heads that share one key head
ATTENTION = "b s (n*d)[tp]"
FEATURES = "b s f[tp]"

options = parse_arguments()
model = load_model(load_weights(options), options.out / "checkpoint")
grafter.set_axes(tp=(RANK, WORLD_SIZE))
seen = Seen()
points = Points(seen)
for i, layer in enumerate(model.model.layers):
    points.on_input(layer, "layer_in", i, REPLICATED)
    points.on_output(layer.self_attn.q_proj, "q", i, QUERIES)
    points.on_output(layer.self_attn.k_proj, "k", i, KEYS)
    points.on_output(layer.self_attn.v_proj, "v", i, KEYS)
    points.on_input(layer.self_attn.o_proj, "attn", i, ATTENTION)
    points.on_input(layer.mlp.down_proj, "mlp_hidden", i, FEATURES)
    points.on_output(layer.mlp.down_proj, "mlp_out", i, REPLICATED)
    points.on_output(layer, "layer_out", i, REPLICATED)

with torch.no_grad():
    for seen.step in range(options.steps):
        seen.keep("logits", model(input_ids=token_ids()).logits)
        grafter.step()
seen.save(options.out, RANK)
if dist.is_initialized():
    dist.destroy_process_group()
