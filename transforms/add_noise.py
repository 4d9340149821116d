"""Add a small perturbation, the same in every run: does a difference of this size at this point matter at the output?

received: 1 floating tensor [...]. Returns [...] of its dtype: received + AMPLITUDE * rms(received) * N(0, 1).
The noise depends on the point's tags and the shape alone, so that a replicated tensor stays equal on all ranks.
"""

from __future__ import annotations

import hashlib
import json

import torch

import grafter

AMPLITUDE = 1e-3


@grafter.transform(receives="same_rank")
def transform(graft_input: grafter.GraftTransformInput) -> torch.Tensor:
    received = graft_input.received_list[0]
    # Not `hash`, which differs from process to process.
    digest = hashlib.sha256(json.dumps(graft_input.tags, sort_keys=True, default=str).encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))
    # Drawn on the CPU: the same numbers whatever the device.
    noise = torch.randn(received.shape, generator=generator).to(received.device)
    wide = received.to(torch.promote_types(received.dtype, torch.float32))
    return (wide + AMPLITUDE * wide.square().mean().sqrt() * noise).to(received.dtype)
