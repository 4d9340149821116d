"""Transforms between transformers' RoPE, which turns the halves of a head, and torchtitan's, which turns neighbours.

A head of 6 whose values are 0 1 2 3 4 5 in transformers is 0 3 1 4 2 5 in titan. Heads are not split between ranks,
so the local tensor, put together from the other job's, is enough.
"""

import torch

import grafter

HALF_A_HEAD = 8


def to_titan(value: torch.Tensor) -> torch.Tensor:
    """The last dim, of one head or several: from transformers' order to titan's. Shape and dtype stay."""
    return value.unflatten(-1, (-1, 2, HALF_A_HEAD)).transpose(-1, -2).flatten(-3)


def from_titan(value: torch.Tensor) -> torch.Tensor:
    """The way back."""
    return value.unflatten(-1, (-1, HALF_A_HEAD, 2)).transpose(-1, -2).flatten(-3)


@grafter.transform(receives="resharded")
def target_is_titan(graft_input: grafter.GraftTransformInput) -> torch.Tensor:
    (value,) = graft_input.received_list
    return to_titan(value) if graft_input.role == "target" else from_titan(value)


@grafter.transform(receives="resharded")
def baseline_is_titan(graft_input: grafter.GraftTransformInput) -> torch.Tensor:
    (value,) = graft_input.received_list
    return from_titan(value) if graft_input.role == "target" else to_titan(value)
