"""The demo's baseline: one process, float32, eager attention.

python baseline.py MODEL_DIRECTORY
"""

import sys

import torch
from transformers import LlamaForCausalLM

import grafter

model = LlamaForCausalLM.from_pretrained(sys.argv[1], dtype=torch.float32, attn_implementation="eager").eval()
# A forward hook that returns a tensor puts it in place of the module's output.
model.model.embed_tokens.register_forward_hook(lambda module, args, out: grafter.dump("embedding", out))
for i, layer in enumerate(model.model.layers):
    layer.register_forward_hook(lambda module, args, out, i=i: grafter.dump("layer", out, layer_id=i))

token_ids = torch.arange(2 * 2 * 32).reshape(2, 2, 32) * 37 % 512  # two steps of two sequences of 32 tokens
with torch.no_grad():
    for step in range(2):
        logits = model(input_ids=token_ids[step]).logits
        print(f"step {step}: sum of |logits| = {logits.abs().sum().item():.6f}", flush=True)
        grafter.step()
