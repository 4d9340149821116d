"""The vote log of one point: durable, totally ordered, and the only thing that decides (`commit_protocol`).

OwnVotes     one receiver, which decides alone
HostVotes    receivers of one host: shared memory                 (host_votes)
StoreVotes   receivers of several hosts: the rendezvous store     (store_votes)
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence

from grafter.core.commit_protocol import Ballot, Outcome


class VoteLog(ABC):
    """One receiver's handle of the log of one point. Used by its dump thread.

    Any call may be interrupted by an exception, and is then made again.
    """

    def offer(self) -> None:  # noqa: B027 most have nothing to offer
        """Called by all receivers before the exchange: whoever makes the log tells the others where it is."""

    @abstractmethod
    def open(self) -> str | None:
        """Make the log usable. Returns why that is impossible, or None. May wait where it is opened first."""

    @abstractmethod
    def append(self, kind: int, reason: str) -> None:
        """Append this receiver's ballot. Once this returns, every later `read` of any receiver finds it."""

    @abstractmethod
    def read(self) -> Sequence[Ballot]:
        """All ballots of the point, in the one order that all receivers find them in. Never waits for a receiver."""

    @abstractmethod
    def await_news(self) -> str | None:
        """Wait until another receiver says that the point is decided. Returns why a receiver that could not open the
        log asks to give the point up, or None. Raises what ended the run, if something did."""

    @abstractmethod
    def wake(self, outcome: Outcome, reason: str) -> None:
        """Called by each receiver that has read the outcome. reason: why it is refused, where this one decided that."""

    @abstractmethod
    def excuse(self, reason: str) -> None:
        """Ask all others to give the point up: this receiver cannot open the log."""

    @abstractmethod
    def reason_of(self, outcome: Outcome, *, is_leaving: bool) -> str:
        """Why another receiver has refused the point. is_leaving: there is no time to wait for that."""

    def close(self) -> None:  # noqa: B027 most have nothing to close
        """This receiver is done with the point."""


class OwnVotes(VoteLog):
    """Of a point with one receiver."""

    def __init__(self, role_rank: int) -> None:
        self._role_rank = role_rank
        self._ballots: list[Ballot] = []

    def open(self) -> str | None:
        return None

    def append(self, kind: int, reason: str) -> None:
        self._ballots.append(Ballot(self._role_rank, kind))

    def read(self) -> Sequence[Ballot]:
        return self._ballots

    def await_news(self) -> str | None:
        raise AssertionError("a receiver alone waits for nobody")

    def wake(self, outcome: Outcome, reason: str) -> None:
        pass

    def excuse(self, reason: str) -> None:
        pass

    def reason_of(self, outcome: Outcome, *, is_leaving: bool) -> str:
        raise AssertionError("a receiver alone knows its own reason")
