"""The plan of one point: which bytes go from whom to whom, and where they land. Pure; every participant computes it.

Each receiver has one staging memory. It holds values: whole tensors of senders, or the receiver's own tensor put
together from pieces of many. Every piece lands at its final place in its value.

    receiver's staging   |   value 0   |pad|   value 1   |pad|  ...
    offset               0                  ^ a multiple of ALIGNMENT
    pieces                [0 ][ 1 ][  2]    [ 3          ]
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from grafter.core.bounded_memory import Remembered
from grafter.core.layout.overlap_table import Region
from grafter.core.leaves import TensorSpec
from grafter.core.messages.manifest import Pair
from grafter.core.messages.roster import Roster
from grafter.core.plan.decision import Decision
from grafter.core.plan.resharding import CopyItem, Resharding
from grafter.core.roles import Direction, receiver_role, sender_role

# Enough for every dtype, and for the widest vector loads of a copy.
ALIGNMENT_BYTES = 64


@dataclass(frozen=True)
class Value:
    """A tensor in a receiver's staging. `index` counts the tensors of one sender: its leaves, then those of its extras.

    sender: whose whole tensor it is, as a graft rank; None where it is the receiver's own leaf, put together. `layer`:
    which of several of the same leaf (summands, replicas).
    """

    receiver: int
    sender: int | None
    index: int
    offset: int
    spec: TensorSpec
    layer: int = 0

    def __hash__(self) -> int:
        # Without the spec, whose hash costs more than all the rest of a look-up.
        return hash((self.receiver, self.offset))


@dataclass(frozen=True)
class Piece:
    """Values on their way from one rank to another.

    spec: what moves. source, place: where it lies in the sender's tensor and in the value, where it is a part of them.
    """

    sender: int
    receiver: int
    index: int
    spec: TensorSpec
    value: Value
    source: Region | None = None
    place: Region | None = None

    @property
    def offset(self) -> int:
        return self.value.offset

    def taken_from(self, tensor: torch.Tensor) -> torch.Tensor:
        """The sender's view of what moves."""
        return tensor if self.source is None else self.source.of(tensor)

    def landing(self, value: torch.Tensor) -> torch.Tensor:
        """Where it lands in the staged value."""
        return value if self.place is None else self.place.of(value)


# Not frozen: made at every point, and freezing triples what that costs.
@dataclass
class TransferPlan:
    """`pieces` and `values` are those of one rank where the plan was made for one. All ranks are graft ranks."""

    digest: str
    members: tuple[int, ...]
    generation: int
    pieces: tuple[Piece, ...]
    values: tuple[Value, ...]
    staging_bytes: dict[int, int]
    # What follows from it, once it has been worked out, for all points that have this plan.
    memo: dict[str, Any] = field(default_factory=dict, compare=False, repr=False)

    def of_point(self, digest: str) -> TransferPlan:
        """The same plan for another point: of the same manifests, or of as many rows."""
        return TransferPlan(
            digest, self.members, self.generation, self.pieces, self.values, self.staging_bytes, self.memo
        )

    def outgoing(self, sender: int) -> tuple[Piece, ...]:
        return tuple(piece for piece in self.pieces if piece.sender == sender)

    def incoming(self, receiver: int) -> tuple[Piece, ...]:
        return tuple(piece for piece in self.pieces if piece.receiver == receiver)

    def values_of(self, receiver: int) -> tuple[Value, ...]:
        return tuple(value for value in self.values if value.receiver == receiver)


def make_plan(
    digest: str, direction: Direction, pair: Pair, decision: Decision, roster: Roster, graft_rank: int | None = None
) -> TransferPlan:
    """The transfers that a decision asks for; with `graft_rank`, only those of that rank.

    Raises ValueError for a dtype that this torch does not have.
    """

    def work_out() -> TransferPlan:
        return _work_out(digest, direction, pair, decision, roster, graft_rank)

    if decision.rows is None:
        return work_out()
    # Which rows they are, the plan does not say: those of the next step have the same one.
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
    known: Remembered[TransferPlan] = roster.memo.setdefault("plans of rows", Remembered(64))
    return known.answer(key, work_out).of_point(digest)


def _work_out(
    digest: str, direction: Direction, pair: Pair, decision: Decision, roster: Roster, graft_rank: int | None
) -> TransferPlan:
    planner = _Planner(direction, pair, decision, roster, graft_rank)
    if decision.reshardings is None:
        planner.plan_whole_tensors()
    else:
        planner.plan_resharding()
    members = tuple(sorted(roster.graft_rank(header.role, header.role_rank) for header in pair.headers))
    generation = max(header.generation for header in pair.headers)
    return TransferPlan(
        digest, members, generation, tuple(planner.pieces), tuple(planner.values), planner.staging_bytes
    )


class _Planner:
    def __init__(
        self, direction: Direction, pair: Pair, decision: Decision, roster: Roster, graft_rank: int | None
    ) -> None:
        self._sending, self._receiving = sender_role(direction), receiver_role(direction)
        self._senders = {header.role_rank: header for header in pair.side(self._sending).headers}
        self._receivers = {header.role_rank: header for header in pair.side(self._receiving).headers}
        self._decision, self._roster, self._only = decision, roster, graft_rank
        self._hosts = [member.process.host for member in roster.all]
        self.pieces: list[Piece] = []
        self.values: list[Value] = []
        self.staging_bytes: dict[int, int] = {}

    def plan_whole_tensors(self) -> None:
        for receiver_rank, sources in self._decision.sources.items():
            receiver = self._to(receiver_rank)
            if not self._concerns(receiver, [self._from(source) for source in sources]):
                continue
            offset = 0
            for source in sources:
                offset = self._place_whole(receiver, source, self._senders[source].leaves, 0, offset)
                extras = self._senders[source].extras_tensors
                offset = self._place_whole(receiver, source, extras, len(self._senders[source].leaves), offset)
            self.staging_bytes[receiver] = offset

    def plan_resharding(self) -> None:
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
                self.pieces.append(Piece(sender, value.receiver, index, spec, value, item.source, item.place))
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
        """A transform that asked for the assembled value gets the extras of the lowest sender beside it."""
        lowest = min(self._senders)
        extras = self._senders[lowest].extras_tensors
        for rank, sources in self._decision.sources.items():
            receiver = self._to(rank)
            if not sources or not extras or not self._concerns(receiver, [self._from(lowest)]):
                continue
            if rank not in staged:
                staged[rank] = self._stage(rank)
            leaves, offset = len(self._senders[lowest].leaves), self.staging_bytes[receiver]
            self.staging_bytes[receiver] = self._place_whole(receiver, lowest, extras, leaves, offset)

    def _concerns(self, receiver: int, senders: Sequence[int]) -> bool:
        return self._only is None or self._only == receiver or self._only in senders

    def _place_whole(
        self, receiver: int, source: int, specs: Sequence[TensorSpec], first_index: int, offset: int
    ) -> int:
        """One sender's tensors, one after the other; where the next begins."""
        sender = self._from(source)
        for index, spec in enumerate(specs, first_index):
            value = Value(receiver, sender, index, offset, spec)
            if self._only in (None, receiver, sender):
                self.values.append(value)
                self.pieces.append(Piece(sender, receiver, index, spec, value))
            offset += _aligned(spec.nbytes)
        return offset

    def _stage(self, receiver_rank: int) -> dict[tuple[int, int], Value]:
        """The receiver's own leaves, in the sender's dtype, once per layer; by (leaf, layer)."""
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
        self.staging_bytes[receiver] = offset
        self.values += values.values()
        return values

    def _near(self, sender: int, receiver: int) -> bool:
        return self._hosts[self._from(sender)] == self._hosts[self._to(receiver)]


def _aligned(nbytes: int) -> int:
    return -(-nbytes // ALIGNMENT_BYTES) * ALIGNMENT_BYTES
