"""The module trees of the models here, as one rank of each would write them.

python module_trees.py OUT      llama.json mixtral.json titan.json megatron.json megatron_moe.json
"""

import sys
from pathlib import Path
from types import ModuleType

import torch
import torch.distributed as dist
import torch.nn.functional as F
from common import HEADS, HIDDEN, INTERMEDIATE, KV_HEADS, LAYERS, SEQUENCE, VOCAB

# As in titan.py: what it imports for its mixture of experts needs triton.
kernels = ModuleType("torchtitan.models.moe.kernels")
kernels.generate_permute_indices = None
sys.modules.setdefault(kernels.__name__, kernels)

from megatron.core import parallel_state  # noqa: E402
from megatron.core.models.gpt import GPTModel  # noqa: E402
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec  # noqa: E402
from megatron.core.tensor_parallel.random import initialize_rng_tracker  # noqa: E402
from megatron.core.transformer import TransformerConfig  # noqa: E402
from torchtitan.models.llama3.model.args import TransformerModelArgs  # noqa: E402
from torchtitan.models.llama3.model.model import Transformer  # noqa: E402
from transformers import LlamaConfig, LlamaForCausalLM, MixtralConfig, MixtralForCausalLM  # noqa: E402

from grafter.capture.module_tree import tree_of, write_trees  # noqa: E402

EXPERTS, RANKS = 4, 2


def transformers_models() -> dict[str, torch.nn.Module]:
    sizes = {
        "vocab_size": VOCAB,
        "hidden_size": HIDDEN,
        "intermediate_size": INTERMEDIATE,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": HEADS,
        "num_key_value_heads": KV_HEADS,
    }
    with torch.device("meta"):
        return {
            "llama": LlamaForCausalLM(LlamaConfig(**sizes)),
            "mixtral": MixtralForCausalLM(MixtralConfig(num_local_experts=EXPERTS, **sizes)),
        }


def titan_model() -> torch.nn.Module:
    arguments = TransformerModelArgs(
        dim=HIDDEN,
        n_layers=LAYERS,
        n_heads=HEADS,
        n_kv_heads=KV_HEADS,
        vocab_size=VOCAB,
        multiple_of=INTERMEDIATE,
        ffn_dim_multiplier=0.75,
        max_seq_len=SEQUENCE,
    )
    with torch.device("meta"):
        return Transformer(arguments)


def megatron_models() -> dict[str, torch.nn.Module]:
    """Rank 0 of two, in tensor parallelism: the fake group communicates nothing, and no values are wanted."""
    from torch.testing._internal.distributed.fake_pg import FakeStore

    dist.init_process_group("fake", rank=0, world_size=RANKS, store=FakeStore())
    torch.cuda.current_device = lambda: torch.device("cpu")
    initialize_rng_tracker(inference_rng_tracker=True)
    parallel_state.initialize_model_parallel(tensor_model_parallel_size=RANKS, create_gloo_process_groups=False)
    return {"megatron": megatron_model(), "megatron_moe": megatron_model(num_moe_experts=EXPERTS)}


def megatron_model(**experts: int) -> torch.nn.Module:
    config = TransformerConfig(
        num_layers=LAYERS,
        hidden_size=HIDDEN,
        ffn_hidden_size=INTERMEDIATE,
        num_attention_heads=HEADS,
        num_query_groups=KV_HEADS,
        normalization="RMSNorm",
        activation_func=F.silu,
        gated_linear_unit=True,
        add_bias_linear=False,
        tensor_model_parallel_size=RANKS,
        use_cpu_initialization=True,
        perform_initialization=False,
        params_dtype=torch.float32,
        gradient_accumulation_fusion=False,
        bias_dropout_fusion=False,
        bias_activation_fusion=False,
        masked_softmax_fusion=False,
        apply_rope_fusion=False,
        persist_layer_norm=False,
        **experts,
    )
    spec = get_gpt_layer_local_spec(
        normalization="RMSNorm", num_experts=experts.get("num_moe_experts"), moe_grouped_gemm=False
    )
    return GPTModel(config, spec, VOCAB, SEQUENCE, parallel_output=False, position_embedding_type="rope")


if __name__ == "__main__":
    models = {**transformers_models(), "titan": titan_model(), **megatron_models()}
    for name, model in models.items():
        write_trees(Path(sys.argv[1]) / f"{name}.json", [tree_of(model)])
