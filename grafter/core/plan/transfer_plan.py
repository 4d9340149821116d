"""The plan of one point: which bytes go from whom to whom, and where they land. Every participant computes it.

Each receiver has one staging memory. It holds values: whole tensors of senders, or the receiver's own tensor, assembled
from pieces of many. Every piece lands at its final place in its value.

    receiver's staging   |   value 0   |pad|   value 1   |pad|  ...
    offset               0                  ^ a multiple of ALIGNMENT
    pieces                [0 ][ 1 ][  2]    [ 3          ]
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch

from grafter.core.bounded_memory import BoundedMemory
from grafter.core.layout.overlap_table import StridedRegion
from grafter.core.leaves import TensorSpec
from grafter.core.messages.manifest import Pair
from grafter.core.messages.roster import Roster
from grafter.core.plan.decision import TransferDecision
from grafter.core.plan.resharding import CopyItem, Resharding
from grafter.core.roles import Direction, receiver_role, sender_role

# Enough for every dtype and for the widest vector loads.
ALIGNMENT_BYTES = 64


@dataclass(frozen=True)
class Value:
    """A tensor in a receiver's staging memory.

    sender: the graft rank whose whole tensor it is; None if it is the receiver's own leaf, assembled. index: counts the
    tensors of one sender: its leaves, then those of its extras. layer: which of several of one leaf it is (summands,
    replicas).
    """

    receiver: int
    sender: int | None
    index: int
    offset: int
    spec: TensorSpec
    layer: int = 0

    def __hash__(self) -> int:
        # Without the spec, whose hash costs more than the rest of a look-up.
        return hash((self.receiver, self.offset))


@dataclass(frozen=True)
class Piece:
    """Values that go from one rank to another, of the shape and dtype `spec`.

    source, place: where they lie in the sender's tensor and in the staged value; None: they are all of it.
    """

    sender: int
    receiver: int
    index: int
    spec: TensorSpec
    value: Value
    source: StridedRegion | None = None
    place: StridedRegion | None = None

    @property
    def offset(self) -> int:
        """Where the value begins in the staging memory, in bytes."""
        return self.value.offset

    def taken_from(self, tensor: torch.Tensor) -> torch.Tensor:
        """The view of the sender's tensor that moves."""
        return tensor if self.source is None else self.source.of(tensor)

    def landing(self, value: torch.Tensor) -> torch.Tensor:
        """The view of the staged value that the piece fills."""
        return value if self.place is None else self.place.of(value)


# Not frozen: every point makes one, and freezing would triple its cost.
@dataclass
class TransferPlan:
    """The transfers of one point. If it was made for one rank, `pieces` and `values` are those of this rank.

    All ranks are graft ranks. memo: what follows from the plan, once it is computed, for all points that share it.
    """

    digest: str
    members: tuple[int, ...]
    generation: int
    pieces: tuple[Piece, ...]
    values: tuple[Value, ...]
    staging_bytes: dict[int, int]
    memo: dict[str, Any] = field(default_factory=dict, compare=False, repr=False)

    def of_point(self, digest: str) -> TransferPlan:
        """The same plan for another point with the same manifests, or with as many rows."""
        return TransferPlan(
            digest, self.members, self.generation, self.pieces, self.values, self.staging_bytes, self.memo
        )

    def outgoing(self, sender: int) -> tuple[Piece, ...]:
        """The pieces that a rank sends."""
        return tuple(piece for piece in self.pieces if piece.sender == sender)

    def incoming(self, receiver: int) -> tuple[Piece, ...]:
        """The pieces that a rank receives."""
        return tuple(piece for piece in self.pieces if piece.receiver == receiver)

    def values_of(self, receiver: int) -> tuple[Value, ...]:
        """The values in a rank's staging memory."""
        return tuple(value for value in self.values if value.receiver == receiver)


def make_plan(
    digest: str,
    direction: Direction,
    pair: Pair,
    decision: TransferDecision,
    roster: Roster,
    graft_rank: int | None = None,
) -> TransferPlan:
    """The transfers that a decision asks for; with `graft_rank`, only those of that rank.

    Raises ValueError for a dtype that this torch does not have.
    """
    planner = partial(_Planner, direction, pair, decision, roster, graft_rank)
    if decision.rows is None:
        return planner().plan(digest)
    # The plan does not depend on which rows they are, so the next step has the same one.
    key = (
        direction,
        graft_rank,
        decision.reshardings,
        tuple(decision.sources.items()),
        tuple(
            (header.role, header.role_rank, header.generation, header.extras_tensors)
            + tuple((leaf.path, leaf.device) for leaf in header.leaves)
            for header in pair.headers
        ),
    )
    known: BoundedMemory[Any, TransferPlan] = roster.memo.setdefault("plans of rows", BoundedMemory(64))
    return known.answer(key, lambda: planner().plan(digest)).of_point(digest)


class _Planner:
    """Makes one plan; with a graft rank, only the transfers of that rank."""

    def __init__(
        self, direction: Direction, pair: Pair, decision: TransferDecision, roster: Roster, graft_rank: int | None
    ) -> None:
        self._sending, self._receiving = sender_role(direction), receiver_role(direction)
        self._senders = {header.role_rank: header for header in pair.side(self._sending).headers}
        self._receivers = {header.role_rank: header for header in pair.side(self._receiving).headers}
        self._decision, self._roster, self._only = decision, roster, graft_rank
        self._hosts = [member.process.host for member in roster.all]
        self._headers = pair.headers
        self._pieces: list[Piece] = []
        self._values: list[Value] = []
        self._staging_bytes: dict[int, int] = {}

    def plan(self, digest: str) -> TransferPlan:
        if self._decision.reshardings is None:
            self._plan_whole_tensors()
        else:
            self._plan_resharding()
        members = tuple(sorted(self._roster.graft_rank(header.role, header.role_rank) for header in self._headers))
        generation = max(header.generation for header in self._headers)
        return TransferPlan(digest, members, generation, tuple(self._pieces), tuple(self._values), self._staging_bytes)

    def _plan_whole_tensors(self) -> None:
        for receiver_rank, sources in self._decision.sources.items():
            receiver = self._to(receiver_rank)
            if not self._concerns(receiver, [self._from(source) for source in sources]):
                continue
            offset = 0
            for source in sources:
                offset = self._place_whole(receiver, source, self._senders[source].leaves, 0, offset)
                extras = self._senders[source].extras_tensors
                offset = self._place_whole(receiver, source, extras, len(self._senders[source].leaves), offset)
            self._staging_bytes[receiver] = offset

    def _plan_resharding(self) -> None:
        staged = {rank: self._stage(rank) for rank in self._receivers if self._only in (None, self._to(rank))}
        specs: dict[tuple[int, str, tuple[int, ...]], TensorSpec] = {}
        for index, resharding in enumerate(self._decision.reshardings or ()):
            for item in self._items_of(resharding):
                if item.receiver not in staged:
                    staged[item.receiver] = self._stage(item.receiver)
                value = staged[item.receiver][index, item.layer]
                # Senders share a leaf's dtype, so pieces of one shape share their description.
                known = (index, self._senders[item.sender].leaves[index].device, item.place.sizes)
                spec = specs.get(known)
                if spec is None:
                    leaf = self._senders[item.sender].leaves[index]
                    spec = specs[known] = leaf.model_copy(update={"shape": item.place.sizes})
                sender = self._from(item.sender)
                self._pieces.append(Piece(sender, value.receiver, index, spec, value, item.source, item.place))
        self._plan_extras(staged)

    def _items_of(self, resharding: Resharding) -> Iterator[CopyItem]:
        for rank in self._receivers:
            if self._only in (None, self._to(rank)):
                yield from resharding.incoming(rank, self._near)
        for rank in self._senders:
            if self._only == self._from(rank):
                yield from resharding.outgoing(rank, self._near)

    def _from(self, sender_rank: int) -> int:
        return self._roster.graft_rank(self._sending, sender_rank)

    def _to(self, receiver_rank: int) -> int:
        return self._roster.graft_rank(self._receiving, receiver_rank)

    def _plan_extras(self, staged: dict[int, dict[tuple[int, int], Value]]) -> None:
        """A transform that asks for the assembled value also gets the extras of the lowest sender."""
        lowest = min(self._senders)
        extras = self._senders[lowest].extras_tensors
        for rank, sources in self._decision.sources.items():
            receiver = self._to(rank)
            if not sources or not extras or not self._concerns(receiver, [self._from(lowest)]):
                continue
            if rank not in staged:
                staged[rank] = self._stage(rank)
            leaves, offset = len(self._senders[lowest].leaves), self._staging_bytes[receiver]
            self._staging_bytes[receiver] = self._place_whole(receiver, lowest, extras, leaves, offset)

    def _concerns(self, receiver: int, senders: Sequence[int]) -> bool:
        return self._only is None or self._only == receiver or self._only in senders

    def _place_whole(
        self, receiver: int, source: int, specs: Sequence[TensorSpec], first_index: int, offset: int
    ) -> int:
        """Place one sender's tensors one after the other; the offset behind them."""
        sender = self._from(source)
        for index, spec in enumerate(specs, first_index):
            value = Value(receiver, sender, index, offset, spec)
            if self._only in (None, receiver, sender):
                self._values.append(value)
                self._pieces.append(Piece(sender, receiver, index, spec, value))
            offset += _aligned(spec.nbytes)
        return offset

    def _stage(self, receiver_rank: int) -> dict[tuple[int, int], Value]:
        """The staged values of a receiver's own leaves, in the sender's dtype, by (leaf, layer)."""
        receiver, header = self._to(receiver_rank), self._receivers[receiver_rank]
        sender = next(iter(self._senders.values()))
        values: dict[tuple[int, int], Value] = {}
        offset = 0
        rows = self._decision.rows_of(header)
        for index, resharding in enumerate(self._decision.reshardings or ()):
            shape = header.leaves[index].shape if rows is None else rows[index].packed_shape
            spec = sender.leaves[index].model_copy(update={"shape": shape})
            for layer in range(resharding.layers):
                values[index, layer] = Value(receiver, None, index, offset, spec, layer)
                offset += _aligned(spec.nbytes)
        self._staging_bytes[receiver] = offset
        self._values += values.values()
        return values

    def _near(self, sender: int, receiver: int) -> bool:
        return self._hosts[self._from(sender)] == self._hosts[self._to(receiver)]


def _aligned(nbytes: int) -> int:
    return -(-nbytes // ALIGNMENT_BYTES) * ALIGNMENT_BYTES
