"""Convert what came to the target's dtype, also where grafter refuses to by itself, e.g. float32 to int64 (truncates).

received: 1 tensor [...] of any dtype. Returns [...] of the target's dtype. Values out of its range are the cast's to
decide, and are not counted as saturated.
"""

from __future__ import annotations

import torch

import grafter


@grafter.transform(receives="same_rank")
def transform(graft_input: grafter.GraftTransformInput) -> torch.Tensor:
    return graft_input.received_list[0].to(graft_input.target.dtype)
