"""torchtitan's Llama 3 with its own tensor parallelism, in which the residual is sharded over the sequence.

torchrun --standalone --nproc-per-node 2 titan.py OUT --weights FILE --seed N [--own-layers I ...] [--steps N]
"""

import sys
from types import ModuleType

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
    SEQUENCE,
    VOCAB,
    Seen,
    load_weights,
    parse_arguments,
    token_ids,
)
from torch.distributed.device_mesh import init_device_mesh

import grafter

# torchtitan imports the kernels of its mixture of experts, which need triton: too large for a machine without a GPU.
# Llama 3 has no experts.
kernels = ModuleType("torchtitan.models.moe.kernels")
kernels.generate_permute_indices = None
sys.modules.setdefault(kernels.__name__, kernels)

from torchtitan.models.llama3.infra.parallelize import apply_tp  # noqa: E402
from torchtitan.models.llama3.model.args import RoPEScalingArgs, TransformerModelArgs  # noqa: E402
from torchtitan.models.llama3.model.model import Transformer  # noqa: E402
from torchtitan.models.llama3.model.state_dict_adapter import Llama3StateDictAdapter  # noqa: E402

SEQUENCE_SHARDED = "b s[tp] h"
QUERIES, KEYS = "b s (g*r*d)[tp]", "b s (g*d)[tp]"  # g groups of r query heads that share one key head
ATTENTION = "b s (n*d)[tp]"
FEATURES = "b s f[tp]"

options = parse_arguments()
dist.init_process_group("gloo")
mesh = init_device_mesh("cpu", (dist.get_world_size(),), mesh_dim_names=("tp",))
arguments = TransformerModelArgs(
    dim=HIDDEN,
    n_layers=LAYERS,
    n_heads=HEADS,
    n_kv_heads=KV_HEADS,
    vocab_size=VOCAB,
    multiple_of=INTERMEDIATE,
    ffn_dim_multiplier=0.75,  # titan rounds 8/3 of the hidden size, times this, up to `multiple_of`
    norm_eps=NORM_EPS,
    rope_theta=ROPE_THETA,
    rope_scaling_args=RoPEScalingArgs(scaling_factor=1.0),
    max_seq_len=SEQUENCE,
)
model = Transformer(arguments)
# The adapter permutes the rows of wq and wk: titan's RoPE turns neighbours, transformers' the two halves of a head.
model.load_state_dict(Llama3StateDictAdapter(arguments, None).from_hf(load_weights(options)))
apply_tp(model, mesh, loss_parallel=False, enable_float8_tensorwise_tp=False)
model.eval()
grafter.set_mesh(mesh)
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


for i, layer in enumerate(model.layers.values()):
    on_input(layer, "layer_in", i, SEQUENCE_SHARDED)
    on_output(layer.attention.wq, "q", i, QUERIES)
    on_output(layer.attention.wk, "k", i, KEYS)
    on_output(layer.attention.wv, "v", i, KEYS)
    on_input(layer.attention.wo, "attn", i, ATTENTION)
    on_input(layer.feed_forward.w2, "mlp_hidden", i, FEATURES)
    on_output(layer.feed_forward.w2, "mlp_out", i, SEQUENCE_SHARDED)
    on_output(layer, "layer_out", i, SEQUENCE_SHARDED)

with torch.no_grad():
    for seen.step in range(options.steps):
        seen.keep("logits", model(token_ids()))
        grafter.step()
seen.save(options.out, dist.get_rank())
dist.destroy_process_group()
