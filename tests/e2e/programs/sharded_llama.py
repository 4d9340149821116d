"""transformers' Llama: whole in one process, or, under torchrun, in transformers' own tensor parallelism."""

from __future__ import annotations

import os
from pathlib import Path

import torch
import torch.distributed as dist
from plain_llama import CONFIG, make_model
from transformers import LlamaForCausalLM

RANK, WORLD_SIZE = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))


def load_model(weights: dict[str, torch.Tensor], checkpoint: Path) -> LlamaForCausalLM:
    """checkpoint: a directory to write, since transformers shards while it loads. Initialises torch.distributed."""
    if WORLD_SIZE == 1:
        return make_model(weights)
    from transformers import DistributedConfig

    dist.init_process_group("gloo")
    if RANK == 0:
        LlamaForCausalLM(CONFIG).save_pretrained(checkpoint, state_dict=weights)
    dist.barrier()
    model = LlamaForCausalLM.from_pretrained(
        checkpoint, dtype=torch.float32, distributed_config=DistributedConfig(tp_plan="auto")
    )
    return model.eval()
