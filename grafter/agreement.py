"""Agreement: all receivers of a point write, or none does.

The outcome is one key of the store, decided by whoever puts it first: the receivers' leader puts `commit` after all
yes votes; a refusal, or the end of the run, may come before. Everyone obeys what lies there.
"""

from __future__ import annotations

from collections.abc import Sequence

from grafter.direction import RoleName
from grafter.housekeeping import Housekeeping, Wait
from grafter.pairing import StoreKeys
from grafter.points import PointKey
from grafter.roster import Roster
from grafter.store import StoreClient
from grafter.wire import Sealed

COMMIT, REFUSE, YES, NO = "commit", "refuse", "yes", "no"


class Agreement:
    """Decides points among the receivers of each. Called by the dump thread of every receiver."""

    def __init__(
        self,
        client: StoreClient,
        housekeeping: Housekeeping,
        roster: Roster,
        role: RoleName,
        role_rank: int,
        timeout: float,
    ) -> None:
        self._client, self._housekeeping, self._roster = client, housekeeping, roster
        self._role, self._role_rank, self._timeout = role, role_rank, timeout

    def vote(self, key: PointKey, receivers: Sequence[int], refusal: str | None) -> None:
        """Say that this receiver's value is complete and may be written (None), or why not. Never waits."""
        keys = StoreKeys(self._client.hall, key.digest)
        if len(receivers) == 1:
            # One receiver alone decides alone; only a refusal must be heard, by senders that still wait.
            if refusal is not None:
                self._client.set(keys.outcome, REFUSE, refusal)
        elif self._role_rank != min(receivers):
            self._client.set(keys.vote(self._role_rank), NO if refusal is not None else YES, refusal or "")

    def outcome(self, key: PointKey, receivers: Sequence[int], refusal: str | None) -> str | None:
        """None: write. Else the one reason why no receiver of this point writes. Waits for all votes.

        Raises what ended the run, if that came first; then nobody has written.
        """
        if len(receivers) == 1:
            return refusal
        keys = StoreKeys(self._client.hall, key.digest)
        others = [rank for rank in receivers if rank != self._role_rank]
        needs = frozenset(self._roster.graft_rank(self._role, rank) for rank in others)
        if self._role_rank != min(receivers):
            with self._housekeeping.waiting(self._wait(key, needs, keys.outcome)):
                return _reason(self._client.get(keys.outcome))
        ballots = [keys.vote(rank) for rank in others]
        with self._housekeeping.waiting(self._wait(key, needs, *ballots)):
            votes = self._client.get_all(ballots)
        no = next((vote.payload for vote in votes if vote.kind == NO), None) if refusal is None else refusal
        found = self._client.put_if_absent(keys.outcome, COMMIT if no is None else REFUSE, no or "")
        return no if found is None else _reason(found)

    def _wait(self, key: PointKey, needs: frozenset[int], *awaits: str) -> Wait:
        return Wait("agreement", str(key), awaits, self._timeout, needs=needs)

    def keys_to_delete(self, key: PointKey, receivers: Sequence[int], *, committed: bool) -> list[str]:
        """What the receivers' leader deletes of a point that is over. The reason of a failed one stays until close."""
        if len(receivers) == 1 or self._role_rank != min(receivers):
            return []
        keys = StoreKeys(self._client.hall, key.digest)
        ballots = [keys.vote(rank) for rank in receivers if rank != self._role_rank]
        return [*ballots, keys.outcome] if committed else ballots


def _reason(outcome: Sealed) -> str | None:
    return None if outcome.kind == COMMIT else outcome.payload
