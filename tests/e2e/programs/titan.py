"""torchtitan's Llama 3 with its own tensor parallelism, in which the residual is sharded over the sequence.

torchrun --standalone --nproc-per-node 2 titan.py OUT --weights FILE --seed N [--own-layers I ...] [--steps N]
"""

import torch
import torch.distributed as dist
from common import Seen, load_weights, parse_arguments, token_ids
from dumping import Points
from plain_titan import make_model

import grafter

SEQUENCE_SHARDED = "b s[tp] h"
QUERIES, KEYS = "b s (g*r*d)[tp]", "b s (g*d)[tp]"  # g groups of r query heads that share one key head
ATTENTION = "b s (n*d)[tp]"
FEATURES = "b s f[tp]"

options = parse_arguments()
dist.init_process_group("gloo")
model, mesh = make_model(load_weights(options))
grafter.set_mesh(mesh)
seen = Seen()
points = Points(seen)
for i, layer in enumerate(model.layers.values()):
    points.on_input(layer, "layer_in", i, SEQUENCE_SHARDED)
    points.on_output(layer.attention.wq, "q", i, QUERIES)
    points.on_output(layer.attention.wk, "k", i, KEYS)
    points.on_output(layer.attention.wv, "v", i, KEYS)
    points.on_input(layer.attention.wo, "attn", i, ATTENTION)
    points.on_input(layer.feed_forward.w2, "mlp_hidden", i, FEATURES)
    points.on_output(layer.feed_forward.w2, "mlp_out", i, SEQUENCE_SHARDED)
    points.on_output(layer, "layer_out", i, SEQUENCE_SHARDED)

with torch.no_grad():
    for seen.step in range(options.steps):
        seen.keep("logits", model(token_ids()))
        grafter.step()
seen.save(options.out, dist.get_rank())
dist.destroy_process_group()
