"""Exchange: the plan's bytes move. One file for each way: shared memory, gloo, NCCL.

A point may use several ways, chosen for each pair of ranks by one pure function on both sides. Whichever it is, a
transfer is either complete when it returns, or raises.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import ClassVar, NamedTuple

import torch

from grafter.core.plan.transfer_plan import Piece, TransferPlan
from grafter.core.processes import Watch
from grafter.wire.exchange.staging import Staging


class Outgoing(NamedTuple):
    """A piece and the view of the sender's tensor that it is: on its device, of any strides."""

    piece: Piece
    tensor: torch.Tensor


class Incoming(NamedTuple):
    """A piece and the view of the staged value in which it lands: of any strides, in `staging` or on the device."""

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
        """Called by every receiver. Once it returns, each piece lies in its place, bit for bit as it was sent.

        The pieces between two ranks come in the order in which their sender has them.
        """

    @abstractmethod
    def refuse(self, plan: TransferPlan, incoming: Sequence[Piece], reason: str, watch: Watch) -> None:
        """Give this point up before it began: tell the senders of these pieces, where the way has a way to say so.

        Called by a receiver that cannot take its pieces, and, without pieces, by any rank whose point was lost on
        another way. Raises Abandoned if the other side has given it up as well.
        """

    @abstractmethod
    def close(self) -> None:
        """Leave nothing behind: no socket, no thread, no memory."""
