import os

import torch

import grafter

rank = int(os.environ["RANK"])
grafter.set_axes(tp=(rank, 2))
whole = torch.arange(24, dtype=torch.float32).view(4, 6)
tokens = grafter.Tokens.from_lengths(["a", None], [3, 1], token_ids=[5, 6, 7, 0])
for step in range(2):
    with grafter.context(layer_id=3):
        grafter.dump("attn", whole[:, rank * 3 : rank * 3 + 3] + step, dims="t h[tp]", tokens=tokens, rank=rank)
        grafter.dump("mlp", torch.full((2,), rank + 1.5, dtype=torch.bfloat16), dims="d[tp:partial]")
    phase = torch.tensor([1 + 2j], dtype=torch.complex128)
    grafter.dump("state", {"phase": phase, "n": 3}, extras={"k": torch.ones(2)})
    grafter.dump("norm", torch.tensor([3.0, 4.0]))
    grafter.dump("sum", torch.tensor([3.0, 4.0]))
    grafter.step()
grafter.close()
