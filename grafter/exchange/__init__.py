"""Exchange: the plan's bytes move. One file for each way: shared memory, gloo, NCCL.

A point may use several ways, chosen for each pair of ranks by one pure function on both sides. Whichever it is, a
transfer is either complete when it returns, or raises.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch

from grafter.staging import Staging
from grafter.transfer_plan import Piece, TransferPlan
from grafter.watch import Watch


@dataclass(frozen=True)
class Outgoing:
    """A piece and the tensor that it is: on the sender's device, of any strides."""

    piece: Piece
    tensor: torch.Tensor


class Exchange(ABC):
    """One way to move whole tensors between ranks. Both calls are made by the dump thread, one point at a time."""

    name: ClassVar[str]

    @abstractmethod
    def send(self, plan: TransferPlan, outgoing: Sequence[Outgoing], watch: Watch) -> None:
        """Called by every sender of a point that uses this way. The tensors may be changed once it returns."""

    @abstractmethod
    def receive(
        self, plan: TransferPlan, incoming: Sequence[Piece], staging: Staging, watch: Watch
    ) -> list[torch.Tensor]:
        """Called by every receiver. The pieces' tensors, in their order: contiguous, bit for bit what was sent.

        They lie in `staging`, or on the device for a way that moves device memory, and are valid until the next point.
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
