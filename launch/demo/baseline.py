"""The demo's baseline: one process, float32, eager attention. It knows nothing of grafter.

python baseline.py MODEL_DIRECTORY
"""

import sys

import torch
from transformers import LlamaForCausalLM

model = LlamaForCausalLM.from_pretrained(sys.argv[1], dtype=torch.float32, attn_implementation="eager").eval()

token_ids = torch.arange(2 * 2 * 32).reshape(2, 2, 32) * 37 % 512  # two steps of two sequences of 32 tokens
with torch.no_grad():
    for step in range(2):
        logits = model(input_ids=token_ids[step]).logits
        print(f"step {step}: sum of |logits| = {logits.abs().sum().item():.6f}", flush=True)
