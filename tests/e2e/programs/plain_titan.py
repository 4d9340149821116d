"""torchtitan's Llama 3 with tensor and sequence parallelism, as somebody has it who never heard of grafting.

torchrun --standalone --nproc-per-node 2 plain_titan.py OUT --weights FILE --seed N [--own-layers I ...] [--steps N]
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
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

# torchtitan imports the kernels of its mixture of experts, which need triton: too large for a machine without a GPU.
# Llama 3 has no experts.
kernels = ModuleType("torchtitan.models.moe.kernels")
kernels.generate_permute_indices = None
sys.modules.setdefault(kernels.__name__, kernels)

from torchtitan.models.llama3.infra.parallelize import apply_tp  # noqa: E402
from torchtitan.models.llama3.model.args import RoPEScalingArgs, TransformerModelArgs  # noqa: E402
from torchtitan.models.llama3.model.model import Transformer  # noqa: E402
from torchtitan.models.llama3.model.state_dict_adapter import Llama3StateDictAdapter  # noqa: E402

ARGUMENTS = TransformerModelArgs(
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


def make_model(weights: dict[str, torch.Tensor]) -> tuple[Transformer, DeviceMesh]:
    """Called by every rank, once torch.distributed is initialised."""
    model = Transformer(ARGUMENTS)
    # The adapter permutes the rows of wq and wk: titan's RoPE turns neighbours, transformers' the two halves of a head.
    model.load_state_dict(Llama3StateDictAdapter(ARGUMENTS, None).from_hf(weights))
    mesh = init_device_mesh("cpu", (dist.get_world_size(),), mesh_dim_names=("tp",))
    apply_tp(model, mesh, loss_parallel=False, enable_float8_tensorwise_tp=False)
    return model.eval(), mesh


if __name__ == "__main__":
    options = parse_arguments()
    dist.init_process_group("gloo")
    model, _ = make_model(load_weights(options))
    seen = Seen()
    with torch.no_grad():
        for seen.step in range(options.steps):
            seen.keep("logits", model(token_ids()))
    seen.save(options.out, dist.get_rank())
    dist.destroy_process_group()
