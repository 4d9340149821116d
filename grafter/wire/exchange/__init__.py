"""Exchange: moves the bytes of a plan. One file for each way: shared memory, gloo, NCCL.

A point may use several ways; one pure function chooses the way of each pair of ranks, on both sides alike. A transfer
is complete when it returns, or raises.

transfer        chooses the ways of a point, and runs them
shared_memory   between ranks of one host
gloo            between hosts (gloo_messages: what is sent as one message)
nccl            between CUDA tensors
staging         the memory that a rank receives into
incoming        makes what is written from what was received
"""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import ClassVar, NamedTuple

import torch

from grafter.core.plan.transfer_plan import Piece, TransferPlan
from grafter.core.processes import Watch
from grafter.wire.exchange.staging import Staging


class Outgoing(NamedTuple):
    """A piece, and its view of the sender's tensor: on the tensor's device, of any strides."""

    piece: Piece
    tensor: torch.Tensor


class Incoming(NamedTuple):
    """A piece, and its view of the staged value: of any strides, in `staging` or on the device."""

    piece: Piece
    tensor: torch.Tensor


class Exchange(ABC):
    """One way to move tensors, or parts of them, between ranks. The dump thread calls it, one point at a time."""

    name: ClassVar[str]

    @abstractmethod
    def send(self, plan: TransferPlan, outgoing: Sequence[Outgoing], watch: Watch) -> None:
        """Called by every sender of a point that uses this way. The tensors may be changed once it returns."""

    @abstractmethod
    def receive(self, plan: TransferPlan, incoming: Sequence[Incoming], staging: Staging, watch: Watch) -> None:
        """Called by every receiver. When it returns, each piece is in its place, bit for bit as it was sent.

        The pieces between two ranks arrive in the order in which their sender has them.
        """

    @abstractmethod
    def refuse(self, plan: TransferPlan, incoming: Sequence[Piece], reason: str, watch: Watch) -> None:
        """Give this point up before it has begun, and report that to the senders of these pieces, if the way can.

        Called by a receiver that cannot receive its pieces, and, without pieces, by any rank whose point was lost on
        another way. Raises Abandoned if the other side has given it up as well.
        """

    @abstractmethod
    def close(self) -> None:
        """Release all sockets, threads and memory."""


def group_prefix(run_prefix: str, members: Sequence[int], generation: int, kind: str) -> str:
    """The prefix in the store of a process group: a set of members, a generation, and `gloo` or `nccl`.

    The groups are made from the run's own store, and never registered with the job's torch.distributed.
    """
    digest = hashlib.blake2b(",".join(map(str, members)).encode(), digest_size=8).hexdigest()
    return f"{run_prefix}/group/{kind}/{digest}/{generation}"
