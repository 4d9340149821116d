"""Assembly: what came, made into what a receiver works with: a tensor per sender, or its own leaves put together."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from grafter.decision import Decision
from grafter.direction import RoleName
from grafter.errors import LayoutError
from grafter.layout.resharding import Resharding
from grafter.leaves import TensorSpec, decode_extras
from grafter.ledger import Difference
from grafter.manifest import Header, Pair
from grafter.roster import Roster
from grafter.stats import difference
from grafter.transfer_plan import Value

Values = dict[Value, torch.Tensor]


@dataclass(frozen=True)
class Received:
    """What one sender sent: its leaves in the order of their paths, and its extras."""

    sender_rank: int
    specs: tuple[TensorSpec, ...]
    tensors: list[torch.Tensor]
    extras: dict[str, Any] | None


@dataclass(frozen=True)
class Assembled:
    """One of the receiver's own leaves, put together from pieces, without padding: of the shape `held`.

    replicas: how far the copies are apart that were compared; None where there was but one.
    """

    tensor: torch.Tensor
    held: tuple[int, ...]
    replicas: Difference | None = None


def received_by_sender(values: Values, pair: Pair, role: RoleName, roster: Roster) -> list[Received]:
    """Whole tensors, in the order of the sending role's ranks."""
    headers = {roster.graft_rank(role, header.role_rank): header for header in pair.side(role).headers}
    received = []
    for sender in dict.fromkeys(value.sender for value in values):
        if sender is None:
            continue
        header = headers[sender]
        own = [tensor for value, tensor in values.items() if value.sender == sender]
        extras = received_extras(values, header, sender)
        received.append(Received(header.role_rank, header.leaves, own[: len(header.leaves)], extras))
    return received


def received_extras(values: Values, header: Header, sender: int) -> dict[str, Any] | None:
    """Extras are small and are kept by users: they get memory of their own."""
    if header.extras is None:
        return None
    tensors = [
        tensor.clone()
        for value, tensor in values.items()
        if value.sender == sender and value.index >= len(header.leaves)
    ]
    return decode_extras(header.extras, tensors)


def assembled_leaves(decision: Decision, values: Values, header: Header) -> list[Assembled]:
    """The receiver's leaves. Raises LayoutError where summands of this dtype have no sum."""
    leaves = []
    for index, resharding in enumerate(decision.reshardings or ()):
        layers = [tensor for value, tensor in values.items() if value.sender is None and value.index == index]
        held = resharding.held_sizes(header.role_rank, header.leaves[index].shape)
        layers = [without_padding(layer, held) for layer in layers]
        if resharding.gets_zeros(header.role_rank):
            layers = [torch.zeros_like(layers[0])]
            leaves.append(Assembled(layers[0], held))
            continue
        apart = _compare_replicas(layers, resharding)
        leaves.append(Assembled(_reduce(layers[:: resharding.replicas], resharding), held, apart))
    return leaves


def without_padding(tensor: torch.Tensor, held: Sequence[int]) -> torch.Tensor:
    for dim, size in enumerate(held):
        if size != tensor.shape[dim]:
            tensor = tensor.narrow(dim, 0, size)
    return tensor


def with_padding(target: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    """The value in its place in a copy of the target, whose padding stays as it is."""
    full = target.detach().clone()
    without_padding(full, value.shape).copy_(value)
    return full


def _compare_replicas(layers: Sequence[torch.Tensor], resharding: Resharding) -> Difference | None:
    """How far the copy that differs most is from the first of its summand; None where none were compared."""
    worst: Difference | None = None
    for start in range(0, len(layers), resharding.replicas):
        for other in layers[start + 1 : start + resharding.replicas]:
            found = difference(layers[start], other, "light")
            if found is not None and (worst is None or _badness(found) > _badness(worst)):
                worst = found
    return worst


def _badness(found: Difference) -> tuple[int, float, float]:
    return found.nan + found.inf, found.rel or 0.0, found.mismatched_fraction or 0.0


def _reduce(summands: Sequence[torch.Tensor], resharding: Resharding) -> torch.Tensor:
    """In float32 or better, in the order of the ranks; integers in their own dtype, as torch adds them."""
    if len(summands) == 1:
        return summands[0]
    reduction, dtype = resharding.sender.reduction, summands[0].dtype
    if dtype is torch.bool or (reduction == "avg" and not (dtype.is_floating_point or dtype.is_complex)):
        raise LayoutError(f"summands of {dtype} have no {reduction}.")
    result = summands[0].to(_wide(dtype), copy=True)
    for summand in summands[1:]:
        if reduction in ("sum", "avg"):
            result += summand.to(result.dtype)
        elif reduction == "product":
            result *= summand.to(result.dtype)
        else:
            result = (torch.maximum if reduction == "max" else torch.minimum)(result, summand.to(result.dtype))
    return result / len(summands) if reduction == "avg" else result


def _wide(dtype: torch.dtype) -> torch.dtype:
    if dtype.is_complex:
        return torch.promote_types(dtype, torch.complex64)
    if dtype.is_floating_point:
        return dtype if dtype is torch.float64 else torch.float32
    return dtype
