"""Transfer: one point's pieces move, each the way that suits the pair of ranks it lies between."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch.distributed import TCPStore

from grafter.direction import Direction, RoleName, sender_role
from grafter.exchange import Exchange, Outgoing
from grafter.exchange.gloo import GlooExchange
from grafter.exchange.nccl import NcclExchange
from grafter.exchange.shared_memory import SharedMemoryExchange
from grafter.housekeeping import Housekeeping
from grafter.leaves import TensorSpec, decode_extras
from grafter.manifest import Pair, store_keys
from grafter.roster import Announcement, Roster
from grafter.staging import Staging, StagingRefused
from grafter.transfer_plan import Piece, TransferPlan
from grafter.waits import Wait
from grafter.watch import Abandoned, Watch

Way = Literal["shared memory", "gloo", "nccl"]
Backend = Literal["auto", "gloo", "nccl"]


def choose_way(backend: Backend, sender: Announcement, receiver: Announcement, device: str, all_cuda: bool) -> Way:
    """How one piece travels. Both ends compute it from what both know. `device` is the sender's tensor's."""
    if backend == "nccl" and all_cuda and device == "cuda":
        return "nccl"
    one_host = sender.process.host == receiver.process.host and sender.process.uid == receiver.process.uid
    if backend != "gloo" and one_host and sender.socket_name and receiver.socket_name:
        return "shared memory"
    return "gloo"


@dataclass(frozen=True)
class Received:
    """What one sender sent: its leaves in the order of their paths, and its extras."""

    sender_rank: int
    specs: tuple[TensorSpec, ...]
    tensors: list[torch.Tensor]
    extras: dict[str, Any] | None


class _Watch:
    def __init__(self, housekeeping: Housekeeping, wait: Wait) -> None:
        self._housekeeping, self._wait = housekeeping, wait

    def check(self) -> None:
        self._housekeeping.check()
        if self._wait.abandoned is not None:
            raise Abandoned(self._wait.abandoned)


class Transfer:
    """One per rank: its exchanges and the memory it receives into. Called by the dump thread."""

    def __init__(
        self,
        backend: Backend,
        roster: Roster,
        graft_rank: int,
        housekeeping: Housekeeping,
        timeout: float,
        shared_memory: SharedMemoryExchange | None,
        hall: str,
        new_store: Callable[[], TCPStore],
        local_address: Callable[[], str],
    ) -> None:
        self._backend, self._roster, self._graft_rank = backend, roster, graft_rank
        self._housekeeping, self._timeout = housekeeping, timeout
        self._shared_memory = shared_memory
        self._hall = hall
        self._gloo = GlooExchange(graft_rank, hall, new_store, local_address, timeout)
        self._nccl = NcclExchange(graft_rank, hall, new_store, timeout)
        self._exchanges: dict[Way, Exchange] = {"gloo": self._gloo, "nccl": self._nccl}
        if shared_memory is not None:
            self._exchanges["shared memory"] = shared_memory
        self.staging = Staging()

    @property
    def generation(self) -> int:
        """Of process groups: counts up when this rank gives one up. The highest of all participants counts."""
        return max(self._gloo.generation, self._nccl.generation)

    def send(
        self, plan: TransferPlan, pair: Pair, tensors: Sequence[torch.Tensor], what: object, outcome_key: str
    ) -> int:
        """Send this rank's tensors to whoever the plan names; bytes sent. Raises Abandoned if a receiver gave up."""
        pieces = plan.outgoing(self._graft_rank)
        self._hear_announcements(pair)
        needs = frozenset(piece.receiver for piece in pieces)
        wait = Wait("exchange", what, self._timeout, needs=needs, outcome_key=outcome_key)
        with self._housekeeping.waiting(wait):
            watch = _Watch(self._housekeeping, wait)
            by_way = self._by_way(pieces, pair)
            for way, part in by_way.items():
                outgoing = [Outgoing(piece, tensors[piece.index]) for piece in part]
                try:
                    self._exchanges[way].send(plan, outgoing, watch)
                except Abandoned as abandoned:
                    self._give_up(plan, by_way, abandoned, watch)
                    raise
        return sum(piece.spec.nbytes for piece in pieces)

    def receive(self, plan: TransferPlan, pair: Pair, direction: Direction, what: object) -> tuple[list[Received], int]:
        """What the plan brings to this rank, by sender, and its bytes. Raises Abandoned if it cannot be had."""
        pieces = plan.incoming(self._graft_rank)
        # Another receiver may give the point up, and then the senders stop for all.
        outcome_key = store_keys(self._hall, plan.digest).outcome
        needs = frozenset(piece.sender for piece in pieces)
        wait = Wait("exchange", what, self._timeout, needs=needs, outcome_key=outcome_key)
        by_way = self._by_way(pieces, pair)
        tensors: dict[Piece, torch.Tensor] = {}
        with self._housekeeping.waiting(wait):
            watch = _Watch(self._housekeeping, wait)
            self._make_room(plan, by_way, watch)
            for way, part in by_way.items():
                try:
                    received = self._exchanges[way].receive(plan, part, self.staging, watch)
                except Abandoned as abandoned:
                    self._give_up(plan, by_way, abandoned, watch)
                    raise
                tensors.update(zip(part, received, strict=True))
        nbytes = sum(piece.spec.nbytes for piece in pieces)
        return self._by_sender(pieces, tensors, pair, sender_role(direction)), nbytes

    def _make_room(self, plan: TransferPlan, by_way: dict[Way, list[Piece]], watch: Watch) -> None:
        if not any(way != "nccl" for way in by_way):
            return
        try:
            self.staging.reserve(plan.staging_bytes[self._graft_rank])
        except StagingRefused as refused:
            reason = f"{self._roster.who(self._graft_rank)} has no memory to receive into: {refused}"
            for way, part in by_way.items():
                self._exchanges[way].refuse(plan, part, reason, watch)
            raise Abandoned(reason) from refused

    def _give_up(self, plan: TransferPlan, by_way: Iterable[Way], why: Abandoned, watch: Watch) -> None:
        """A point that is lost on one way will not come on the others: their groups are out of step from here."""
        for way in by_way:
            self._exchanges[way].refuse(plan, [], str(why), watch)

    def _hear_announcements(self, pair: Pair) -> None:
        if self._shared_memory is not None:
            self._shared_memory.announced = {
                self._roster.graft_rank(header.role, header.role_rank): header.staging for header in pair.headers
            }

    def _by_way(self, pieces: Sequence[Piece], pair: Pair) -> dict[Way, list[Piece]]:
        """The pieces by how they travel; the ways in one order on all ranks, so that no two wait for each other."""
        all_cuda = all(leaf.device == "cuda" for header in pair.headers for leaf in header.leaves)
        members = self._roster.all
        by_way: dict[Way, list[Piece]] = {"shared memory": [], "gloo": [], "nccl": []}
        for piece in pieces:
            sender, receiver = members[piece.sender], members[piece.receiver]
            by_way[choose_way(self._backend, sender, receiver, piece.spec.device, all_cuda)].append(piece)
        return {way: part for way, part in by_way.items() if part}

    def _by_sender(
        self, pieces: Sequence[Piece], tensors: dict[Piece, torch.Tensor], pair: Pair, role: RoleName
    ) -> list[Received]:
        headers = {self._roster.graft_rank(role, h.role_rank): h for h in pair.side(role).headers}
        received = []
        for sender in dict.fromkeys(piece.sender for piece in pieces):
            header = headers[sender]
            own = [tensors[piece] for piece in pieces if piece.sender == sender]
            leaves, extras_tensors = own[: len(header.leaves)], own[len(header.leaves) :]
            # Extras are small and are kept by users: they get memory of their own.
            extras = None
            if header.extras is not None:
                extras = decode_extras(header.extras, [tensor.clone() for tensor in extras_tensors])
            received.append(Received(header.role_rank, header.leaves, leaves, extras))
        return received

    def close(self) -> None:
        for exchange in self._exchanges.values():
            exchange.close()
        self.staging.release()
