"""Multiply by a factor that the sender gives: `grafter.dump("x", x, extras={"scale": 0.5})`, e.g. to dequantise.

received: 1 tensor [...] of any numeric dtype. Returns [...], computed in the target's dtype or float32, the wider one.
"""

from __future__ import annotations

import torch

import grafter


@grafter.transform(receives="same_rank")
def transform(graft_input: grafter.GraftTransformInput) -> torch.Tensor:
    extras = graft_input.received_extras_list[0] or {}
    if "scale" not in extras:
        raise ValueError("the sender gave no scale; write its dump call with extras={'scale': <number>}")
    scale: float = extras["scale"]
    dtype = torch.promote_types(graft_input.target.dtype, torch.float32)
    return graft_input.received_list[0].to(dtype) * scale
