"""NCCL, if the user chooses it (`GRAFTER_BACKEND=nccl`), for CUDA tensors on both sides: device to device."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Sequence
from datetime import timedelta
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch.distributed import PrefixStore, TCPStore

from grafter.core.plan.transfer_plan import Piece, TransferPlan
from grafter.core.processes import Abandoned, Watch
from grafter.wire.exchange import Exchange, Incoming, Outgoing, group_prefix
from grafter.wire.exchange.staging import Staging

if TYPE_CHECKING:
    from torch.distributed import ProcessGroupNCCL

# NCCL was seen to hang with more operations than this in one coalesced call.
MOST_OPERATIONS = 256
_POLL_SECONDS = 0.0005


class NcclExchange(Exchange):
    """The exchange of one rank by NCCL. All participants of a point build its communicator, at their first point."""

    name: ClassVar[str] = "nccl"

    def __init__(self, graft_rank: int, run_prefix: str, new_store: Callable[[], TCPStore], timeout: float) -> None:
        self._graft_rank, self._run_prefix, self._timeout = graft_rank, run_prefix, timedelta(seconds=2 * timeout + 60)
        self._new_store = new_store
        self._store: TCPStore | None = None
        self._groups: dict[tuple[tuple[int, ...], int], ProcessGroupNCCL] = {}
        # As for gloo: groups of a lower generation are given up.
        self.generation = 0

    def send(self, plan: TransferPlan, outgoing: Sequence[Outgoing], watch: Watch) -> None:
        tensors = [item.tensor.detach().resolve_conj().resolve_neg().contiguous() for item in outgoing]
        peers = [plan.members.index(item.piece.receiver) for item in outgoing]
        self._move(plan, tensors, peers, watch, sending=True)

    def receive(self, plan: TransferPlan, incoming: Sequence[Incoming], staging: Staging, watch: Watch) -> None:
        try:
            # A piece that is strided in its value is received into a buffer, and copied.
            landings = [
                item.tensor
                if item.tensor.is_contiguous()
                else torch.empty_like(item.tensor, memory_format=torch.contiguous_format)
                for item in incoming
            ]
        except torch.cuda.OutOfMemoryError as error:
            self._give_up(plan)
            raise Abandoned(f"no device memory for what is announced: {error}") from error
        peers = [plan.members.index(item.piece.sender) for item in incoming]
        self._move(plan, landings, peers, watch, sending=False)
        for item, landing in zip(incoming, landings, strict=True):
            if landing is not item.tensor:
                item.tensor.copy_(landing)

    def refuse(self, plan: TransferPlan, incoming: Sequence[Piece], reason: str, watch: Watch) -> None:
        """NCCL cannot report it: the senders read it in the outcome of the point. All build a new group afterwards."""
        self._give_up(plan)

    def _move(
        self, plan: TransferPlan, tensors: Sequence[torch.Tensor], peers: Sequence[int], watch: Watch, *, sending: bool
    ) -> None:
        """Move tensors by coalesced calls, in the order of graft ranks. The CPU polls an event, so that it does not
        hang if a peer is lost."""
        device = tensors[0].device if tensors else torch.device("cuda", torch.cuda.current_device())
        # The wait begins here: building a group waits for all its members.
        watch.check()
        torch.cuda.current_stream(device).synchronize()
        group: Any = self._group(plan, device)  # torch's stubs leave out most of what a backend has
        operations = sorted(zip(peers, range(len(tensors)), strict=True))
        flat = [_as_bytes(tensor) for tensor in tensors]
        for start in range(0, len(operations), MOST_OPERATIONS):
            group._start_coalescing(device)
            for peer, index in operations[start : start + MOST_OPERATIONS]:
                if flat[index].numel():
                    (group.send if sending else group.recv)([flat[index]], peer, 0)
            work = group._end_coalescing(device)
            if work is not None:
                # Makes the current stream wait for NCCL's, so that the event follows the transfer.
                work.wait()
        done = torch.cuda.Event()  # type: ignore[no-untyped-call]
        done.record(torch.cuda.current_stream(device))
        while not done.query():  # type: ignore[no-untyped-call]
            try:
                watch.check()
            except BaseException:
                self._give_up(plan)
                raise
            time.sleep(_POLL_SECONDS)

    def _group(self, plan: TransferPlan, device: torch.device) -> ProcessGroupNCCL:
        place = (plan.members, plan.generation)
        if place not in self._groups:
            if self._store is None:
                self._store = self._new_store()
            self._groups[place] = make_nccl_group(
                self._store, self._run_prefix, plan.members, plan.generation, self._graft_rank, self._timeout, device
            )
        return self._groups[place]

    def _give_up(self, plan: TransferPlan) -> None:
        """Abort before the watchdog does, which would end the process. The next point builds a new group."""
        self._abort_groups()
        self.generation = max(self.generation, plan.generation + 1)

    def _abort_groups(self) -> None:
        for group in self._groups.values():
            group.abort()
        self._groups.clear()

    def close(self) -> None:
        self._abort_groups()
        self._store = None


def make_nccl_group(
    store: TCPStore,
    run_prefix: str,
    members: Sequence[int],
    generation: int,
    graft_rank: int,
    timeout: timedelta,
    device: torch.device,
) -> ProcessGroupNCCL:
    """Build a group and its communicator, which waits for all. Called by all members, also if they have no pieces."""
    from torch.distributed import ProcessGroupNCCL

    # Otherwise its watchdog ends the process when a transfer is late; grafter raises an exception instead.
    os.environ.setdefault("TORCH_NCCL_ASYNC_ERROR_HANDLING", "0")
    options = ProcessGroupNCCL.Options()
    options._timeout = timeout
    prefixed = PrefixStore(group_prefix(run_prefix, members, generation, "nccl"), store)
    group = ProcessGroupNCCL(prefixed, members.index(graft_rank), len(members), options)
    group.eager_connect_single_device(device)
    return group


def _as_bytes(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.reshape(-1).view(torch.uint8) if tensor.numel() else torch.empty(0, dtype=torch.uint8)
