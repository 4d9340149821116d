"""Incoming: for each leaf, what is to be written into it, made of what the exchange has brought."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from grafter.core.layout.declared import Layout
from grafter.core.layout.row_view import RowView
from grafter.core.leaves import Leaves
from grafter.core.messages.manifest import Header, Pair
from grafter.core.messages.roster import Roster
from grafter.core.plan.assembly import (
    Assembled,
    Received,
    Values,
    assembled_leaves,
    received_by_sender,
    received_extras,
    with_padding,
    without_padding,
)
from grafter.core.plan.decision import Decision
from grafter.core.plan.token_shares import layouts_of
from grafter.core.points import PointKey
from grafter.core.records import Difference
from grafter.core.roles import Direction, Place, sender_role
from grafter.core.tensor_access import local_tensor
from grafter.core.user_transform import GraftTransformInput, UserTransform
from grafter.core.writing.conversion import count_saturated, why_not_convertible
from grafter.core.writing.write_back import WriteMode, Written, apply_row_write, apply_write, check_write, same_storage
from grafter.errors import WriteRefused

logger = logging.getLogger("grafter")


@dataclass
class IncomingLeaf:
    """What comes in for one leaf.

    value, target: what came and this rank's tensor, both without padding. padded: the whole local tensor, where layouts
    brought the value. room: memory of ours in which the value lies, with place for the padding. replicas: how far the
    sender's copies are apart, where they were compared. rows: where some rows of the local tensor are meant alone, and
    all else here is [rows, ...] of those. `to_write` has the shape of the whole local tensor, or of these rows.
    """

    value: torch.Tensor
    target: torch.Tensor
    padded: torch.Tensor | None = None
    room: torch.Tensor | None = None
    replicas: Difference | None = None
    rows: RowView | None = None
    saturated: int | None = None
    to_write: torch.Tensor = field(init=False)

    def __post_init__(self) -> None:
        self.to_write = self.value

    @property
    def is_padded(self) -> bool:
        return self.padded is not None and self.padded.shape != self.target.shape

    def check(self, original: torch.Tensor, mode: WriteMode) -> None:
        """Raises WriteRefused, with the reason, unless `write` can succeed."""
        self.prepare()
        if self.rows is None:
            check_write(original, self.to_write, mode)
            return
        if self.to_write.shape != self.rows.packed_shape:
            raise WriteRefused(
                f"a value of shape {list(self.to_write.shape)} does not fit into the {self.rows.count} rows that have "
                f"a partner, {list(self.rows.packed_shape)}; a transform returns what it gets in shape. Nothing was "
                "written."
            )
        check_write(original, self.to_write.new_empty(()).expand(self.rows.shape), mode)

    def write(self, original: torch.Tensor, mode: WriteMode) -> Written:
        """What `check` has accepted."""
        if self.rows is None:
            return apply_write(original, self.to_write, mode)
        return apply_row_write(original, self.to_write, self.rows, mode)

    def keep_apart(self, originals: Sequence[torch.Tensor]) -> None:
        """What a transform returned may lie in memory that the point is written to: then it is copied, so that a write
        that was interrupted can be repeated."""
        value = local_tensor(self.to_write, wait=False)
        if any(same_storage(local_tensor(original, wait=False), value) for original in originals):
            self.to_write = value.clone()

    def placed(self, found: Difference | None) -> Difference | None:
        """A difference with its index in the local tensor."""
        if self.rows is None or found is None or found.max_abs_index is None:
            return found
        return found.model_copy(update={"max_abs_index": self.rows.local_index(found.max_abs_index)})

    def prepare(self) -> None:
        """Put the padding, as it is, around the value. Raises WriteRefused for a dtype that may not be converted."""
        if self.padded is None or not self.is_padded:
            return
        if self.value.shape != self.target.shape:
            raise WriteRefused(
                f"a value of shape {list(self.value.shape)} does not fit into {list(self.target.shape)}, which is the "
                f"tensor {list(self.padded.shape)} without its padding."
            )
        why = why_not_convertible(self.value.dtype, self.padded.dtype)
        if why is not None:
            raise WriteRefused(f"{self.value.dtype} cannot be written into {self.padded.dtype}: {why}.")
        if self.value.dtype != self.padded.dtype:
            self.saturated = count_saturated(self.value, self.padded.dtype)
        fits = self.room is not None and (self.room.dtype, self.room.device) == (self.padded.dtype, self.padded.device)
        self.to_write = with_padding(self.padded, self.value, self.room if fits else None)


# Not frozen: made at every point, and freezing triples what that costs.
@dataclass
class Reception:
    """One point on one receiver, once its bytes have come. tags: without name, step and phase."""

    key: PointKey
    tags: dict[str, Any]
    direction: Direction
    place: Place
    roster: Roster
    pair: Pair
    decision: Decision
    header: Header
    transform: UserTransform | None

    def incoming(self, values: Values, leaves: Leaves) -> list[IncomingLeaf]:
        """The value for each leaf. Raises what the transform raises."""
        if self.decision.reshardings is None:
            return self._from_senders(values, leaves)
        return self._from_layouts(values, leaves)

    def _from_senders(self, values: Values, leaves: Leaves) -> list[IncomingLeaf]:
        """Whole tensors: that of the one sender that serves this rank, or what the transform makes of all."""
        received = received_by_sender(values, self.pair, sender_role(self.direction), self.roster)
        incoming = []
        for index, (spec, target) in enumerate(zip(leaves.specs, leaves.tensors, strict=True)):
            if self.transform is None:
                value = received[0].tensors[index]
            else:
                tensors = [_leaf_at(spec.path, one) for one in received]
                ranks = [one.sender_rank for one in received]
                value = self._transformed(index, tensors, [one.extras for one in received], ranks, target)
            incoming.append(IncomingLeaf(_on_device_of(target, value), target))
        return incoming

    def _from_layouts(self, values: Values, leaves: Leaves) -> list[IncomingLeaf]:
        """This rank's own leaves, put together. A transform receives that alone, and the lowest sender's extras."""
        incoming = []
        rows = self.decision.rows_of(self.header)
        lowest = min(self.pair.senders(self.direction), key=lambda header: header.role_rank)
        sender = self.roster.graft_rank(lowest.role, lowest.role_rank)
        for index, one in enumerate(assembled_leaves(self.decision, values, self.header)):
            view = None if rows is None or rows[index].is_everything else rows[index]
            whole = leaves.tensors[index] if rows is None else rows[index].of(leaves.tensors[index])
            target = without_padding(whole, one.held)
            value, room = one.tensor, one.room
            if self.transform is not None:
                extras = received_extras(values, lowest, sender)
                value, room = self._transformed(index, [value], [extras], [lowest.role_rank], target), None
            value = _on_device_of(target, value)
            incoming.append(IncomingLeaf(value, target, whole, room, one.replicas, view))
            self._tell_replicas(one)
        return incoming

    def _transformed(
        self,
        leaf: int,
        tensors: list[torch.Tensor],
        extras: list[dict[str, Any] | None],
        sender_ranks: list[int],
        target: torch.Tensor,
    ) -> torch.Tensor:
        assert self.transform is not None
        sender_layouts, target_layout = self._layouts(leaf)
        return self.transform(
            GraftTransformInput(
                tags={**self.tags, "name": self.key.name, "step": self.key.step, "phase": self.key.phase},
                received_list=tensors,
                received_extras_list=extras,
                target=target.detach(),
                direction=self.direction,
                role=self.place.role,
                role_rank=self.place.role_rank,
                role_world_size=self.place.role_world_size,
                sender_ranks=sender_ranks,
                sender_layouts=sender_layouts,
                target_layout=target_layout,
                path=self.header.leaves[leaf].path,
            )
        )

    def _layouts(self, leaf: int) -> tuple[list[Layout] | None, Layout | None]:
        """Where the senders' tensors and this one lie, as boxes; None where a side declares nothing that fits."""
        if self.decision.rows is not None or not any(header.layouts for header in self.pair.headers):
            return None, None
        known = f"layouts {self.direction} {leaf}"
        if known not in self.pair.memo:
            self.pair.memo[known] = (
                layouts_of(self.pair.senders(self.direction), leaf),
                layouts_of(self.pair.receivers(self.direction), leaf),
            )
        senders, receivers = self.pair.memo[known]
        return (
            None if senders is None else [senders[h.role_rank] for h in self.pair.senders(self.direction)],
            None if receivers is None else receivers[self.header.role_rank],
        )

    def _tell_replicas(self, one: Assembled) -> None:
        apart = one.replicas
        if apart is None or not apart.mismatched_fraction:
            return
        role = sender_role(self.direction)
        first, other = (f"{role} rank {' and '.join(map(str, ranks))}" for ranks in one.copies)
        at = ""
        if apart.max_abs_index is not None and apart.max_abs_values is not None:
            values = apart.max_abs_values
            at = f", most at {apart.max_abs_index} of its part ({values[0]:.9g} against {values[1]:.9g})"
        logger.warning(
            "grafter: the replicas of %s differ: %s and %s, as %s sees them, in %.3g of the values%s. They should be "
            "equal; that of %s is taken.",
            self.key, first, other, self.header.who, apart.mismatched_fraction, at, first,
        )  # fmt: skip


def _on_device_of(target: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    """What came, without a graph, where the target is. Nothing is done for what is that already, as most is."""
    if value.requires_grad:
        value = value.detach()
    return value if value.device == target.device else value.to(target.device)


def _leaf_at(path: str, received: Received) -> torch.Tensor:
    for spec, tensor in zip(received.specs, received.tensors, strict=True):
        if spec.path == path:
            return tensor
    raise ValueError(
        f"sender {received.sender_rank} has no leaf {path}; it has {[spec.path for spec in received.specs]}"
    )
