"""Assembly: what came, made into what a receiver works with: a tensor per sender, or its own leaves put together."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from grafter.core.leaves import TensorSpec, decode_extras
from grafter.core.measures.stats import difference
from grafter.core.messages.manifest import Header, Pair
from grafter.core.messages.roster import Roster
from grafter.core.plan.decision import Decision
from grafter.core.plan.resharding import Resharding
from grafter.core.plan.transfer_plan import Value
from grafter.core.records import Difference
from grafter.core.roles import RoleName
from grafter.errors import WriteRefused

Values = dict[Value, torch.Tensor]


# Not frozen: made at every point, and freezing triples what that costs.
@dataclass
class Received:
    """What one sender sent: its leaves in the order of their paths, and its extras."""

    sender_rank: int
    specs: tuple[TensorSpec, ...]
    tensors: list[torch.Tensor]
    extras: dict[str, Any] | None


@dataclass(frozen=True)
class Assembled:
    """One of the receiver's own leaves, put together from pieces, without padding: of the shape `held`.

    room: the staged memory that `tensor` is a part of, with place for the padding; None where it is another's.
    replicas: how far the copies are apart that were compared; None where there was but one. copies: the sending role
    ranks of the first of them, and of the one that is furthest from it.
    """

    tensor: torch.Tensor
    held: tuple[int, ...]
    room: torch.Tensor | None = None
    replicas: Difference | None = None
    copies: tuple[tuple[int, ...], tuple[int, ...]] = ((), ())


def received_by_sender(values: Values, pair: Pair, role: RoleName, roster: Roster) -> list[Received]:
    """Whole tensors, in the order of the sending role's ranks."""
    known = f"headers of {role}"
    headers = pair.memo.get(known)
    if headers is None:
        headers = {roster.graft_rank(role, header.role_rank): header for header in pair.side(role).headers}
        pair.memo[known] = headers
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
    """The receiver's leaves, in the staged memory where they lie. Raises WriteRefused where this dtype has no sum."""
    leaves = []
    rows = decision.rows_of(header)
    for index, resharding in enumerate(decision.reshardings or ()):
        shape = header.leaves[index].shape if rows is None else rows[index].packed_shape
        whole = [tensor for value, tensor in values.items() if value.sender is None and value.index == index]
        held = resharding.held_sizes(header.role_rank, shape)
        layers = [without_padding(layer, held) for layer in whole]
        if resharding.gets_zeros(header.role_rank):
            leaves.append(Assembled(layers[0].zero_(), held, whole[0]))
            continue
        apart, first, other = _compare_replicas(layers, resharding)
        copies = (_ranks_of(resharding, header, first), _ranks_of(resharding, header, other))
        summands = layers[:: resharding.replicas]
        room = whole[0] if len(summands) == 1 else None
        value = reduce_summands(summands, resharding)
        leaves.append(Assembled(value, held, room, apart, copies if apart else ((), ())))
    return leaves


def without_padding(tensor: torch.Tensor, held: Sequence[int]) -> torch.Tensor:
    for dim, size in enumerate(held):
        if size != tensor.shape[dim]:
            tensor = tensor.narrow(dim, 0, size)
    return tensor


def with_padding(target: torch.Tensor, value: torch.Tensor, room: torch.Tensor | None = None) -> torch.Tensor:
    """The value, and around it the target's padding, bit for bit.

    room: memory of the target's shape and dtype in which the value lies already; without it, a new tensor.
    """
    if room is None:
        room = target.detach().clone()
        without_padding(room, value.shape).copy_(value)
        return room
    inner, padding = room, target.detach()
    for dim, held in enumerate(value.shape):
        beyond = inner.shape[dim] - held
        if beyond:
            inner.narrow(dim, held, beyond).copy_(padding.narrow(dim, held, beyond))
            inner, padding = inner.narrow(dim, 0, held), padding.narrow(dim, 0, held)
    return room


def _compare_replicas(layers: Sequence[torch.Tensor], resharding: Resharding) -> tuple[Difference | None, int, int]:
    """How far the copy that differs most is from the first of its summand, and both layers; None for a single copy."""
    worst: tuple[Difference | None, int, int] = (None, 0, 0)
    for first in range(0, len(layers), resharding.replicas):
        for other in range(first + 1, first + resharding.replicas):
            found = difference(layers[first], layers[other], "light")
            if found is not None and (worst[0] is None or _badness(found) > _badness(worst[0])):
                worst = (found, first, other)
    return worst


def _ranks_of(resharding: Resharding, header: Header, layer: int) -> tuple[int, ...]:
    """The senders from whose pieces a layer is made. Where copies are compared, it does not matter who is near."""
    if resharding.replicas == 1:
        return ()
    items = resharding.incoming(header.role_rank, lambda sender, receiver: True)
    return tuple(sorted({item.sender for item in items if item.layer == layer}))


def _badness(found: Difference) -> tuple[int, float, float]:
    return found.nan + found.inf, found.rel or 0.0, found.mismatched_fraction or 0.0


def reduce_summands(summands: Sequence[torch.Tensor], resharding: Resharding) -> torch.Tensor:
    """In float32 or better, in the order of the ranks; integers in their own dtype, as torch adds them.

    The first summand's memory may become the result. Raises WriteRefused where this dtype has no such reduction.
    """
    if len(summands) == 1:
        return summands[0]
    reduction, dtype = resharding.sender.reduction, summands[0].dtype
    if dtype is torch.bool or (reduction == "avg" and not (dtype.is_floating_point or dtype.is_complex)):
        raise WriteRefused(
            f"summands of {dtype} have no {reduction}, and {resharding.sender.text!r} at {resharding.sender.who} is "
            "partial. Dump the tensor after its reduction, or in a dtype that adds."
        )
    # The staged memory is ours, so what is wide enough is added up where it lies.
    result = summands[0].to(reduced_dtype(dtype))
    for summand in summands[1:]:
        if reduction in ("sum", "avg"):
            result += summand.to(result.dtype)
        elif reduction == "product":
            result *= summand.to(result.dtype)
        else:
            result = (torch.maximum if reduction == "max" else torch.minimum)(result, summand.to(result.dtype))
    return result.div_(len(summands)) if reduction == "avg" else result


def reduced_dtype(dtype: torch.dtype) -> torch.dtype:
    """In which summands of a dtype are put together."""
    if dtype.is_complex:
        return torch.promote_types(dtype, torch.complex64)
    if dtype.is_floating_point:
        return dtype if dtype is torch.float64 else torch.float32
    return dtype
