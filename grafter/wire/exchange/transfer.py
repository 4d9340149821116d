"""Transfer: one point's pieces move, each the way that suits the pair of ranks it lies between."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Literal

import torch
from torch.distributed import TCPStore

from grafter.core.messages.manifest import Pair, store_keys
from grafter.core.messages.roster import Announcement, Roster
from grafter.core.plan.transfer_plan import Piece, TransferPlan, Value
from grafter.core.processes import Abandoned, Watch
from grafter.wire.exchange import Exchange, Incoming, Outgoing
from grafter.wire.exchange.gloo import GlooExchange
from grafter.wire.exchange.nccl import NcclExchange
from grafter.wire.exchange.shared_memory import SharedMemoryExchange
from grafter.wire.exchange.staging import Staging, StagingRefused
from grafter.wire.monitor.housekeeping import Housekeeping
from grafter.wire.monitor.lasting_wait import LastingWait
from grafter.wire.monitor.waits import Wait

Way = Literal["shared memory", "gloo", "nccl"]
Backend = Literal["auto", "gloo", "nccl"]


def choose_way(backend: Backend, sender: Announcement, receiver: Announcement, device: str, all_cuda: bool) -> Way:
    """How one piece travels. Both ends compute it from what both know. `device` is the sender's tensor's."""
    if backend == "nccl" and all_cuda and device == "cuda":
        return "nccl"
    can_share = sender.process.memory_domain == receiver.process.memory_domain
    if backend != "gloo" and can_share and sender.socket_name and receiver.socket_name:
        return "shared memory"
    return "gloo"


class _Part:
    """This rank's part of a plan, with which it is remembered.

    values: those that lie here, in staging or, where NCCL brings them, `on_device`.
    """

    def __init__(
        self,
        pieces: Sequence[Piece],
        by_way: dict[Way, list[Piece]],
        needs: Iterable[int],
        values: Sequence[Value] = (),
    ) -> None:
        self.by_way, self.needs, self.values = by_way, frozenset(needs), values
        self.on_device = {piece.value for piece in by_way.get("nccl", ())} & set(values)
        self.nbytes = sum(piece.spec.nbytes for piece in pieces)


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
        run_prefix: str,
        new_store: Callable[[], TCPStore],
        local_address: Callable[[], str],
    ) -> None:
        self._backend, self._roster, self._graft_rank = backend, roster, graft_rank
        self._housekeeping, self._timeout = housekeeping, timeout
        self._shared_memory = shared_memory
        self._run_prefix = run_prefix
        self._gloo = GlooExchange(graft_rank, run_prefix, new_store, local_address, timeout)
        self._nccl = NcclExchange(graft_rank, run_prefix, new_store, timeout)
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
        known = plan.memo.get("outgoing")
        if known is None:
            pieces = plan.outgoing(self._graft_rank)
            known = plan.memo["outgoing"] = _Part(pieces, self._by_way(pieces, pair), {p.receiver for p in pieces})
        self._hear_announcements(pair)
        needs, by_way = known.needs, known.by_way

        def make_wait() -> Wait:
            return Wait("exchange", what, self._timeout, needs=needs, outcome_key=outcome_key)

        with LastingWait(self._housekeeping, make_wait) as watch:
            for way, part in by_way.items():
                outgoing = [Outgoing(piece, piece.taken_from(tensors[piece.index])) for piece in part]
                try:
                    self._exchanges[way].send(plan, outgoing, watch)
                except Abandoned as abandoned:
                    self._give_up(plan, by_way, abandoned, watch)
                    raise
        return known.nbytes

    def receive(self, plan: TransferPlan, pair: Pair, what: object) -> tuple[dict[Value, torch.Tensor], int]:
        """The complete values that the plan stages at this rank, and the number of bytes received.

        They lie in the staging memory, or on the device if NCCL transfers them, until the next point. Raises Abandoned
        if they cannot be received.
        """
        known = plan.memo.get("incoming")
        if known is None:
            pieces = plan.incoming(self._graft_rank)
            values = plan.values_of(self._graft_rank)
            known = _Part(pieces, self._by_way(pieces, pair), {p.sender for p in pieces}, values)
            plan.memo["incoming"] = known
        needs, by_way = known.needs, known.by_way

        def make_wait() -> Wait:
            # Another receiver may give the point up, and then the senders stop for all.
            outcome_key = store_keys(self._run_prefix, plan.digest).outcome
            return Wait("exchange", what, self._timeout, needs=needs, outcome_key=outcome_key)

        with LastingWait(self._housekeeping, make_wait) as watch:
            room = self._make_room(plan, known, watch)
            for way, part in by_way.items():
                incoming = [Incoming(piece, piece.landing(room[piece.value])) for piece in part]
                try:
                    self._exchanges[way].receive(plan, incoming, self.staging, watch)
                except Abandoned as abandoned:
                    self._give_up(plan, by_way, abandoned, watch)
                    raise
        return room, known.nbytes

    def _make_room(self, plan: TransferPlan, part: _Part, watch: Watch) -> dict[Value, torch.Tensor]:
        """Memory for all values: on the device for what NCCL brings, else in staging."""
        by_way, on_device = part.by_way, part.on_device
        try:
            if len(on_device) < len(part.values):
                self.staging.reserve(plan.staging_bytes[self._graft_rank])
            return {
                value: self._device_memory(value) if value in on_device else self._staged(value)
                for value in part.values
            }
        except (StagingRefused, torch.OutOfMemoryError) as refused:
            reason = f"{self._roster.who(self._graft_rank)} has no memory to receive into: {refused}"
            for way, pieces in by_way.items():
                self._exchanges[way].refuse(plan, pieces, reason, watch)
            raise Abandoned(reason) from refused

    def _staged(self, value: Value) -> torch.Tensor:
        return self.staging.tensor(value.offset, value.spec.torch_dtype, value.spec.shape)

    def _device_memory(self, value: Value) -> torch.Tensor:
        device = torch.device("cuda", torch.cuda.current_device())
        return torch.empty(value.spec.shape, dtype=value.spec.torch_dtype, device=device)

    def _give_up(self, plan: TransferPlan, by_way: Iterable[Way], why: Abandoned, watch: Watch) -> None:
        """A point that is lost on one way will not come on the others: their groups are out of step from here."""
        for way in by_way:
            self._exchanges[way].refuse(plan, [], str(why), watch)

    def _hear_announcements(self, pair: Pair) -> None:
        if self._shared_memory is not None:
            known = pair.memo.get("announced")
            if known is None:
                known = pair.memo["announced"] = {
                    self._roster.graft_rank(header.role, header.role_rank): header.staging for header in pair.headers
                }
            self._shared_memory.announced = known

    def _by_way(self, pieces: Sequence[Piece], pair: Pair) -> dict[Way, list[Piece]]:
        """The pieces by how they travel; the ways in one order on all ranks, so that no two wait for each other."""
        all_cuda = all(leaf.device == "cuda" for header in pair.headers for leaf in header.leaves)
        members = self._roster.all
        by_way: dict[Way, list[Piece]] = {"shared memory": [], "gloo": [], "nccl": []}
        for piece in pieces:
            sender, receiver = members[piece.sender], members[piece.receiver]
            by_way[choose_way(self._backend, sender, receiver, piece.spec.device, all_cuda)].append(piece)
        # NCCL's communicator is built by all participants, those with nothing to move, too.
        joined = self._backend == "nccl" and all_cuda
        return {way: part for way, part in by_way.items() if part or (joined and way == "nccl")}

    def close(self) -> None:
        for exchange in self._exchanges.values():
            exchange.close()
        self.staging.release()
