"""Average over the senders, e.g. data-parallel replicas that should agree, or partial gradients.

received: n floating tensors [...] of equal shape. Returns [...], summed in float32 or wider, in rank order.
"""

from __future__ import annotations

import torch

import grafter


def transform(graft_input: grafter.GraftTransformInput) -> torch.Tensor:
    first, *others = graft_input.received_list
    total = first.to(torch.promote_types(first.dtype, torch.float32), copy=True)
    for other in others:
        total += other
    return total / len(graft_input.received_list)
