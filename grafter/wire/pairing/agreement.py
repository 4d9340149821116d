"""Agreement: all receivers of a point write, or none does, whatever happens when.

The commit protocol says what a receiver does in which order (`grafter.core.commit_protocol`), and the critical section
carries that out whatever happens (`critical_section`). This file chooses their vote log and makes their waits.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable

from grafter.core.messages.manifest import store_keys
from grafter.core.messages.roster import Roster
from grafter.core.points import PointKey
from grafter.core.roles import Role
from grafter.errors import RunError
from grafter.wire.monitor.waits import Wait
from grafter.wire.pairing.critical_section import CriticalSection, Settled, Work
from grafter.wire.pairing.host_votes import HostLogs, HostVotes
from grafter.wire.pairing.vote_log import OwnVotes, StoreVotes, VoteLog
from grafter.wire.rendezvous.message_router import MessageRouter
from grafter.wire.store_client import StoreClient

# The kind under an outcome key that says that the receivers have refused the point.
REFUSE = "refuse"


class Agreement:
    """Settles points among the receivers of each. Called by the dump thread of every receiver."""

    def __init__(
        self, client: StoreClient, router: MessageRouter, roster: Roster, role: Role, role_rank: int, timeout: float
    ) -> None:
        self._client, self._router, self._roster = client, router, roster
        self._run_prefix = client.run_prefix
        self._role, self._role_rank, self._timeout = role, role_rank, timeout
        self._who = f"{role} rank {role_rank}"
        self._logs = HostLogs(router, roster, role, role_rank, self._run_prefix)

    def settle(self, key: PointKey, receivers: tuple[int, ...], work: Work) -> Settled:
        """Exchange, vote, and write if all receivers have voted yes. Called by every receiver of a point.

        receivers: role ranks, this one among them. Waits for all votes. Raises no exception that arrives meanwhile: the
        caller raises `Settled.error` once it has recorded the outcome.
        """
        log = self._log(key, receivers)
        settled = CriticalSection(log, self._role_rank, receivers, work, self._who).run()
        log.close()
        if settled.is_refused_here:
            self._report(key, settled)
        return settled

    def leave(self, key: PointKey, receivers: tuple[int, ...], error: BaseException) -> None:
        """Give a point up because an exception ended this receiver's part before `settle`, so that no other waits."""
        section = CriticalSection(self._log(key, receivers), self._role_rank, receivers, _NoWork(), self._who)
        self._report(key, section.leave(error))

    def _report(self, key: PointKey, settled: Settled) -> None:
        if settled.is_refused_here and settled.refusal:
            # If the run is over, so is every transfer.
            with contextlib.suppress(RunError):
                self.refuse(key, settled.refusal)

    def refuse(self, key: PointKey, reason: str) -> None:
        """Give a point up: all ranks that still move its bytes, senders and receivers, read it in about a second."""
        self._client.set(store_keys(self._run_prefix, key.digest).outcome, REFUSE, reason)

    def _log(self, key: PointKey, receivers: tuple[int, ...]) -> VoteLog:
        if len(receivers) == 1:
            return OwnVotes(self._role_rank)
        keys = store_keys(self._run_prefix, key.digest)

        def make_wait(has_grown: Callable[[], bool] | None = None) -> Wait:
            needs = frozenset(self._roster.graft_rank(self._role, r) for r in receivers if r != self._role_rank)
            wait = Wait("agreement", key, self._timeout, needs=needs)
            wait.has_grown = has_grown
            return wait

        if self._router.channels_within_job:
            return HostVotes(self._logs, self._router, keys, key.digest, receivers, self._role_rank, make_wait)
        writers = {f"{self._role}/{rank}": rank for rank in receivers}
        return StoreVotes(self._client, self._router, keys, writers, make_wait)

    def keys_to_delete(self, key: PointKey, receivers: tuple[int, ...], *, has_failed: bool) -> list[str]:
        """The keys that the receivers' lowest rank deletes of a point, once all participants are done with it."""
        if self._role_rank != min(receivers):
            return []
        keys = store_keys(self._run_prefix, key.digest)
        deletable = [keys.outcome] if has_failed else []
        if len(receivers) > 1 and not self._router.channels_within_job:
            deletable += [keys.log, keys.decided]
        return deletable

    def close(self) -> None:
        """Close this rank's logs. Other ranks keep theirs open."""
        self._logs.close()


class _NoWork(Work):
    """The work of a receiver that leaves before it has prepared anything, and so has not voted yes."""

    progress = 0

    def prepare(self) -> str | None:
        raise AssertionError("this receiver leaves")

    def write(self) -> None:
        pass
