"""The demo's target: the same weights, tensor parallel over the ranks of torchrun, with one fault planted.

It knows nothing of grafter either.

torchrun --standalone --nproc-per-node 2 target.py MODEL_DIRECTORY [--fault norm|rope|none] [--layer N]
"""

import argparse
import os

import torch
from faults import plant_fault
from transformers import DistributedConfig, LlamaForCausalLM

parser = argparse.ArgumentParser()
parser.add_argument("model_directory")
parser.add_argument("--fault", choices=["norm", "rope", "none"], default="none")
parser.add_argument("--layer", type=int, default=2)
options = parser.parse_args()

model = LlamaForCausalLM.from_pretrained(
    options.model_directory,
    dtype=torch.float32,
    attn_implementation="eager",
    distributed_config=DistributedConfig(tp_plan="auto"),
).eval()
plant_fault(model, options.fault, options.layer)

token_ids = torch.arange(2 * 2 * 32).reshape(2, 2, 32) * 37 % 512
with torch.no_grad():
    for step in range(2):
        logits = model(input_ids=token_ids[step]).logits
        if os.environ["RANK"] == "0":
            print(f"step {step}: sum of |logits| = {logits.abs().sum().item():.6f}", flush=True)
torch.distributed.destroy_process_group()
