"""The vote log of one point: durable, totally ordered, and the only thing that decides (`commit_protocol`).

OwnVotes     one receiver, which decides alone
HostVotes    receivers of one host: shared memory                 (host_votes)
StoreVotes   receivers of several hosts: the rendezvous store     (store_votes)
"""

from __future__ import annotations

import contextlib
import json
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence

from grafter.core.commit_protocol import GIVEN_UP, NO, YES, Ballot, Outcome
from grafter.core.messages.manifest import StoreKeys
from grafter.core.messages.wire import Sealed
from grafter.errors import RunError
from grafter.wire.monitor.waits import Wait
from grafter.wire.rendezvous.message_router import MessageRouter
from grafter.wire.store_client import StoreClient


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


_KINDS = {"yes": YES, "no": NO, "given-up": GIVEN_UP}
_NAMES = {kind: name for name, kind in _KINDS.items()}


class StoreVotes(VoteLog):
    """The log of one point. `append` and `read` raise PeerLostError where the store is lost, or was silent for the
    timeout, and for nothing else: an earlier call that blocks, or the end of the run, does not keep them from it."""

    def __init__(
        self,
        client: StoreClient,
        router: MessageRouter,
        keys: StoreKeys,
        writers: dict[str, int],
        make_wait: Callable[[], Wait],
    ) -> None:
        """writers: who signs for which receiver, such as `target/0` for role rank 0."""
        self._client, self._router, self._keys = client, router, keys
        self._writers, self._make_wait = writers, make_wait
        self._reasons: dict[int, str] = {}

    def open(self) -> str | None:
        return None

    def append(self, kind: int, reason: str) -> None:
        self._client.append(self._keys.log, _NAMES[kind], json.dumps(reason))

    def read(self) -> Sequence[Ballot]:
        ballots = []
        for record in self._client.read_appended(self._keys.log):
            ballot = self._ballot(record)
            if ballot is not None:
                ballots.append(ballot)
                if ballot.kind != YES:
                    self._reasons.setdefault(ballot.role_rank, str(json.loads(record.payload)))
        return ballots

    def _ballot(self, record: Sealed) -> Ballot | None:
        role_rank, kind = self._writers.get(record.writer), _KINDS.get(record.kind)
        return Ballot(role_rank, kind) if role_rank is not None and kind is not None else None

    def await_news(self) -> str | None:
        self._router.await_stored(self._make_wait, self._keys.decided)
        return None

    def wake(self, outcome: Outcome, reason: str) -> None:
        with contextlib.suppress(RunError):
            self._client.set(self._keys.decided, "decided", "")

    def excuse(self, reason: str) -> None:
        raise AssertionError("the store's log needs no opening")

    def reason_of(self, outcome: Outcome, *, is_leaving: bool) -> str:
        return self._reasons.get(outcome.decided_by, "")
