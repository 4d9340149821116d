"""transformers' Llama: in one process, or in its own tensor parallelism.

python llama.py OUT --weights FILE --seed N [--own-layers I ...] [--steps N]
torchrun --standalone --nproc-per-node 2 llama.py OUT ...
"""

import os

import torch
import torch.distributed as dist
from common import Seen, load_weights, parse_arguments, token_ids
from dumping import Points
from plain_llama import CONFIG, make_model
from transformers import LlamaForCausalLM

import grafter

REPLICATED = "b s h # tp:replicated"
QUERIES, KEYS = "b s (g*r*d)[tp]", "b s (g*d)[tp]"  # g groups of r query heads that share one key head
ATTENTION = "b s (n*d)[tp]"
FEATURES = "b s f[tp]"

options = parse_arguments()
rank, world_size = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
if world_size == 1:
    model = make_model(load_weights(options))
else:
    # transformers shards while it loads, from a directory.
    from transformers import DistributedConfig

    dist.init_process_group("gloo")
    checkpoint = options.out / "checkpoint"
    if rank == 0:
        LlamaForCausalLM(CONFIG).save_pretrained(checkpoint, state_dict=load_weights(options))
    dist.barrier()
    model = LlamaForCausalLM.from_pretrained(
        checkpoint, dtype=torch.float32, distributed_config=DistributedConfig(tp_plan="auto")
    )
model.eval()
grafter.set_axes(tp=(rank, world_size))
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
seen.save(options.out, rank)
if dist.is_initialized():
    dist.destroy_process_group()
