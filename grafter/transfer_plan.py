"""The plan of one point: which bytes go from whom to whom, and where they land. Pure; every participant computes it.

Each receiver has one staging memory, in which every piece has its place:

    receiver's staging   |  sender 0, leaf 0  |pad|  sender 0, leaf 1  |pad|  sender 1, leaf 0  | ...
    offset               0                        ^ a multiple of ALIGNMENT
"""

from __future__ import annotations

from dataclasses import dataclass

from grafter.decision import Decision
from grafter.direction import Direction, receiver_role, sender_role
from grafter.leaves import TensorSpec
from grafter.manifest import Pair
from grafter.roster import Roster

# Enough for every dtype, and for the widest vector loads of a copy.
ALIGNMENT_BYTES = 64


@dataclass(frozen=True)
class Piece:
    """One tensor on its way. `index` counts the sender's tensors: its leaves, then the tensors of its extras."""

    sender: int
    receiver: int
    index: int
    offset: int
    spec: TensorSpec


@dataclass(frozen=True)
class TransferPlan:
    """`pieces` by receiver, then by sender in role-rank order, then by index. All ranks are graft ranks."""

    digest: str
    members: tuple[int, ...]
    generation: int
    pieces: tuple[Piece, ...]
    staging_bytes: dict[int, int]

    def of_point(self, digest: str) -> TransferPlan:
        """The same plan for another point with the same manifests."""
        return TransferPlan(digest, self.members, self.generation, self.pieces, self.staging_bytes)

    def outgoing(self, sender: int) -> tuple[Piece, ...]:
        return tuple(piece for piece in self.pieces if piece.sender == sender)

    def incoming(self, receiver: int) -> tuple[Piece, ...]:
        return tuple(piece for piece in self.pieces if piece.receiver == receiver)


def make_plan(digest: str, direction: Direction, pair: Pair, decision: Decision, roster: Roster) -> TransferPlan:
    """The transfers that a decision asks for. Raises ValueError for a dtype that this torch does not have."""
    sending, receiving = sender_role(direction), receiver_role(direction)
    headers = {header.role_rank: header for header in pair.side(sending).headers}
    pieces: list[Piece] = []
    staging_bytes: dict[int, int] = {}
    for receiver_rank, sources in decision.sources.items():
        receiver = roster.graft_rank(receiving, receiver_rank)
        offset = 0
        for source in sources:
            header = headers[source]
            for index, spec in enumerate(header.leaves + header.extras_tensors):
                pieces.append(Piece(roster.graft_rank(sending, source), receiver, index, offset, spec))
                offset += -(-spec.nbytes // ALIGNMENT_BYTES) * ALIGNMENT_BYTES
        staging_bytes[receiver] = offset
    members = tuple(sorted(roster.graft_rank(header.role, header.role_rank) for header in pair.headers))
    generation = max(header.generation for header in pair.headers)
    return TransferPlan(digest, members, generation, tuple(pieces), staging_bytes)
