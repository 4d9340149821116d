"""What a wait for other ranks asks while it lasts, and how it can end early."""

from __future__ import annotations

from typing import Protocol


class Watch(Protocol):
    """What a transfer asks, at least four times a second, whether to go on."""

    def check(self) -> None:
        """Raises RunError if the run is over, Abandoned if the other side has given this point up."""


class Abandoned(Exception):
    """The other side has given this point up; the text says why. The run goes on."""


class PeerGone(Exception):
    """The connection to a rank broke in the middle of a transfer."""

    def __init__(self, graft_rank: int, detail: str) -> None:
        super().__init__(detail)
        self.graft_rank = graft_rank
