"""The vote log of receivers on several hosts: one key of the rendezvous store, to which the server appends.

The server appends one record at a time, and does what one client asks for in order: a receiver that reads after it has
appended finds its own ballot. Whoever has read the outcome says so under a second key, for which the others wait.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Sequence

from grafter.core.commit_protocol import GIVEN_UP, NO, YES, Ballot, Outcome
from grafter.core.messages.manifest import StoreKeys
from grafter.core.messages.wire import Sealed
from grafter.errors import RunError
from grafter.wire.monitor.waits import Wait
from grafter.wire.pairing.vote_log import VoteLog
from grafter.wire.rendezvous.message_router import MessageRouter
from grafter.wire.store_client import StoreClient

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
