"""Agreement: all receivers of a point write, or none does, whatever happens when.

What a receiver does, and in which order, is the commit protocol's to say (`commit_protocol`); nothing keeps it from
being carried out (`critical_section`). Here is what it needs: the vote log that these receivers use, and their waits.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable

from grafter.core.messages.manifest import store_keys
from grafter.core.messages.roster import Roster
from grafter.core.points import PointKey
from grafter.core.roles import RoleName
from grafter.errors import RunError
from grafter.wire.monitor.waits import Wait
from grafter.wire.pairing.critical_section import CriticalSection, Settled, Work
from grafter.wire.pairing.host_votes import HostLogs, HostVotes
from grafter.wire.pairing.store_votes import StoreVotes
from grafter.wire.pairing.vote_log import OwnVotes, VoteLog
from grafter.wire.rendezvous.courier import Courier
from grafter.wire.store_client import StoreClient

# Of an outcome key: the receivers have refused the point.
REFUSE = "refuse"


class Agreement:
    """Settles points among the receivers of each. Called by the dump thread of every receiver."""

    def __init__(
        self, client: StoreClient, courier: Courier, roster: Roster, role: RoleName, role_rank: int, timeout: float
    ) -> None:
        self._client, self._courier, self._roster = client, courier, roster
        self._run_prefix = client.run_prefix
        self._role, self._role_rank, self._timeout = role, role_rank, timeout
        self._who = f"{role} rank {role_rank}"
        self._logs = HostLogs(courier, roster, role, role_rank, self._run_prefix)

    def settle(self, key: PointKey, receivers: tuple[int, ...], work: Work) -> Settled:
        """Exchange, vote, and write if all receivers have voted yes. receivers: role ranks, this one among them.

        Called by each of them. Waits for all votes. Raises nothing that arrives in between: `Settled.error` is to be
        raised once the caller has noted the outcome.
        """
        log = self._log(key, receivers)
        settled = CriticalSection(log, self._role_rank, receivers, work, self._who).run()
        log.close()
        if settled.is_refused_here:
            self._tell(key, settled)
        return settled

    def leave(self, key: PointKey, receivers: tuple[int, ...], error: BaseException) -> None:
        """Give a point up because an exception ended this receiver's part before `settle`: no other must wait."""
        section = CriticalSection(self._log(key, receivers), self._role_rank, receivers, _NoWork(), self._who)
        self._tell(key, section.leave(error))

    def _tell(self, key: PointKey, settled: Settled) -> None:
        if settled.is_refused_here and settled.refusal:
            # Where the run is over, so is every transfer.
            with contextlib.suppress(RunError):
                self.refuse(key, settled.refusal)

    def refuse(self, key: PointKey, reason: str) -> None:
        """Give a point up: all ranks that still move its bytes, senders and receivers, hear it in about a second."""
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

        if self._courier.mail_inside:
            return HostVotes(self._logs, self._courier, keys, key.digest, receivers, self._role_rank, make_wait)
        writers = {f"{self._role}/{rank}": rank for rank in receivers}
        return StoreVotes(self._client, self._courier, keys, writers, make_wait)

    def keys_to_delete(self, key: PointKey, receivers: tuple[int, ...], *, has_failed: bool) -> list[str]:
        """What the receivers' lowest rank deletes of a point, once all participants are past it."""
        if self._role_rank != min(receivers):
            return []
        keys = store_keys(self._run_prefix, key.digest)
        deletable = [keys.outcome] if has_failed else []
        if len(receivers) > 1 and not self._courier.mail_inside:
            deletable += [keys.log, keys.decided]
        return deletable

    def close(self) -> None:
        """Leave. Ranks that have a log open keep it."""
        self._logs.close()


class _NoWork(Work):
    """Of a receiver that has left before it prepared anything, and so has not voted yes."""

    progress = 0

    def prepare(self) -> str | None:
        raise AssertionError("this receiver leaves")

    def write(self) -> None:
        pass
