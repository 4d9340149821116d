"""The vote log of one point: durable and totally ordered. Only the log decides (`grafter.core.commit_protocol`).

OwnVotes     one receiver, which decides alone
HostVotes    receivers of one host: shared memory (`host_votes`)
StoreVotes   receivers of several hosts: one key of the rendezvous store, to which the server appends

The server of the store appends one record at a time, and does what one client asks for in order: a receiver that reads
after it has appended finds its own ballot. A receiver that has read the outcome puts a second key, for which the others
wait.
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
        """Called by all receivers before the exchange: the one that makes the log reports to the others where it is."""

    @abstractmethod
    def open(self) -> str | None:
        """Make the log usable. Returns why that is impossible, or None. May wait at the first point."""

    @abstractmethod
    def append(self, kind: int, reason: str) -> None:
        """Append this receiver's ballot. Once this returns, every later `read` of every receiver finds it."""

    @abstractmethod
    def read(self) -> Sequence[Ballot]:
        """All ballots of the point, in an order that is the same for all receivers. Never waits for a receiver."""

    @abstractmethod
    def await_news(self) -> str | None:
        """Wait until another receiver reports that the point is decided. Returns None, or why a receiver that could not
        open the log asks to give the point up. Raises what ended the run."""

    @abstractmethod
    def wake(self, outcome: Outcome, reason: str) -> None:
        """Called by each receiver that has read the outcome. reason: why it is refused, if this receiver decided
        that."""

    @abstractmethod
    def excuse(self, reason: str) -> None:
        """Ask all others to give the point up: this receiver cannot open the log."""

    @abstractmethod
    def reason_of(self, outcome: Outcome, *, is_leaving: bool) -> str:
        """Why another receiver has refused the point. is_leaving: there is no time to wait for that."""

    def close(self) -> None:  # noqa: B027 most have nothing to close
        """This receiver is done with the point."""


class OwnVotes(VoteLog):
    """The log of a point with one receiver."""

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
        raise AssertionError("a single receiver waits for no other")

    def wake(self, outcome: Outcome, reason: str) -> None:
        pass

    def excuse(self, reason: str) -> None:
        pass

    def reason_of(self, outcome: Outcome, *, is_leaving: bool) -> str:
        raise AssertionError("a single receiver knows its own reason")


_KINDS = {"yes": YES, "no": NO, "given-up": GIVEN_UP}
_NAMES = {kind: name for name, kind in _KINDS.items()}


class StoreVotes(VoteLog):
    """The log of one point whose receivers are on several hosts.

    `append` and `read` raise PeerLostError if the store is lost or has not answered for the timeout, and nothing else:
    neither an earlier call that blocks nor the end of the run prevents them.
    """

    def __init__(
        self,
        client: StoreClient,
        router: MessageRouter,
        keys: StoreKeys,
        writers: dict[str, int],
        make_wait: Callable[[], Wait],
    ) -> None:
        """writers: the receivers' role ranks by the name that they sign with, such as `target/0`."""
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
