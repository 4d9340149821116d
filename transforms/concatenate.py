"""Put the senders' shards together, in role-rank order: a tensor sharded over n ranks becomes a whole one.

received: n tensors [..., s_k, ...], equal but for one dim. Returns [..., sum of s_k, ...].
The dim is `extras={"dim": ...}` of the first sender, else DIM, the last.
"""

from __future__ import annotations

import torch

import grafter

DIM = -1


def transform(graft_input: grafter.GraftTransformInput) -> torch.Tensor:
    extras = graft_input.received_extras_list[0] or {}
    return torch.cat(graft_input.received_list, dim=extras.get("dim", DIM))
