"""Agreement: all receivers of a point write, or none does.

The outcome is decided by whoever takes its place first: the receivers' leader, to commit after all yes votes, or a
receiver that gives up because the run is over. Everyone obeys what it finds there. The place is a key of the store; for
receivers of one host, a name of the kernel, which is quicker and goes with its process. Two receivers of one host need
neither leader nor place (`mutual_vote`).
"""

from __future__ import annotations

from collections.abc import Sequence

from grafter.direction import RoleName
from grafter.errors import RunError
from grafter.pairing.manifest import StoreKeys, store_keys
from grafter.pairing.mutual_vote import COMMIT, NO, REFUSE, YES, MutualVote
from grafter.points import PointKey
from grafter.rendezvous.courier import Courier
from grafter.rendezvous.roster import Roster
from grafter.rendezvous.store import StoreClient
from grafter.rendezvous.wire import Sealed
from grafter.watching.housekeeping import Housekeeping
from grafter.watching.waits import Wait

_GAVE_UP = "a receiver gave up, because the run was over before the outcome was decided"


class Agreement:
    """Decides points among the receivers of each. Called by the dump thread of every receiver."""

    def __init__(
        self,
        client: StoreClient,
        courier: Courier,
        housekeeping: Housekeeping,
        roster: Roster,
        role: RoleName,
        role_rank: int,
        timeout: float,
    ) -> None:
        self._client, self._courier, self._housekeeping, self._roster = client, courier, housekeeping, roster
        self._role, self._role_rank, self._timeout = role, role_rank, timeout
        self._hall = client.hall
        # What interrupted this rank in a point that was committed already: to be raised once it has written.
        self.interrupted_by: BaseException | None = None
        self._mutual = MutualVote(courier)

    def vote(self, key: PointKey, receivers: Sequence[int], refusal: str | None) -> None:
        """Say that this receiver's value is complete and may be written (None), or why not. Never waits."""
        if refusal is not None:
            self.refuse(key, refusal)
        keys, other = store_keys(self._hall, key.digest), self._only_other(receivers)
        if other is not None:
            self._mutual.vote(keys, self._role_rank, self._roster.graft_rank(self._role, other), refusal)
        elif self._role_rank != min(receivers):
            place = keys.vote(self._role_rank)
            self._bring([min(receivers)], place, NO if refusal is not None else YES, refusal or "")

    def refuse(self, key: PointKey, reason: str) -> None:
        """Give a point up: all ranks that still move its bytes, senders and receivers, hear it in about a second."""
        self._client.set(store_keys(self._hall, key.digest).outcome, REFUSE, reason)

    def outcome(self, key: PointKey, receivers: Sequence[int], refusal: str | None) -> str | None:
        """None: write. Else the one reason why no receiver of this point writes. Waits for all votes.

        Raises what ended the run, if that came first; then nobody has written.
        """
        if len(receivers) == 1:
            return refusal
        keys, other = store_keys(self._hall, key.digest), self._only_other(receivers)
        if other is not None:
            return self._agree_with(other, key, keys, refusal)
        if self._role_rank != min(receivers):
            return self._obey(key, keys, receivers)
        return self._lead(key, keys, receivers, refusal)

    def _only_other(self, receivers: Sequence[int]) -> int | None:
        """The other one of two receivers of one host."""
        if len(receivers) != 2 or not self._courier.mail_inside:
            return None
        return receivers[1] if receivers[0] == self._role_rank else receivers[0]

    def _agree_with(self, other: int, key: PointKey, keys: StoreKeys, refusal: str | None) -> str | None:
        peer = self._roster.graft_rank(self._role, other)
        found = self._mutual.outcome(
            keys, self._role_rank, other, peer, refusal, lambda place: self._fetch(key, [other], [place])[0]
        )
        self.interrupted_by, self._mutual.interrupted_by = self._mutual.interrupted_by, None
        return found

    def _lead(self, key: PointKey, keys: StoreKeys, receivers: Sequence[int], refusal: str | None) -> str | None:
        others = [rank for rank in receivers if rank != self._role_rank]
        committed = False
        try:
            votes = self._fetch(key, others, [keys.vote(rank) for rank in others])
            no = next((vote.payload for vote in votes if vote.kind == NO), None) if refusal is None else refusal
            no = self._decide(keys, no)
            committed = no is None
            self._tell(keys, others, no)
            return no
        except BaseException as error:
            # Ctrl-C, say. What is decided stands; else nobody may write, and the others must not wait for it.
            if not committed:
                self._tell(keys, others, f"{self._role} rank {self._role_rank} left with {type(error).__name__}")
                raise
            self._tell(keys, others, None)
            self.interrupted_by = error
            return None

    def _tell(self, keys: StoreKeys, others: Sequence[int], no: str | None) -> None:
        if self._courier.mail_inside:
            self._bring(others, keys.outcome, COMMIT if no is None else REFUSE, no or "")

    def leave(self, key: PointKey, receivers: Sequence[int], reason: str) -> None:
        """Give a point up before the vote, because this rank leaves it with an error: the others must not wait."""
        if (other := self._only_other(receivers)) is not None:
            peer = self._roster.graft_rank(self._role, other)
            self.refuse(key, reason)
            self._mutual.leave(store_keys(self._hall, key.digest), self._role_rank, other, peer, reason)
            return
        self.vote(key, receivers, reason)
        if len(receivers) > 1 and self._role_rank == min(receivers):
            others = [rank for rank in receivers if rank != self._role_rank]
            self._tell(store_keys(self._hall, key.digest), others, reason)

    def _decide(self, keys: StoreKeys, no: str | None) -> str | None:
        """The leader's part: put the outcome, unless somebody who gave up came first."""
        if self._courier.mail_inside:
            if no is None:
                self._housekeeping.check()
                no = _GAVE_UP if self._courier.claim(keys.outcome) is not None else None
            return no
        found = self._client.put_if_absent(keys.outcome, COMMIT if no is None else REFUSE, no or "")
        return no if found is None else _reason(found)

    def _obey(self, key: PointKey, keys: StoreKeys, receivers: Sequence[int]) -> str | None:
        others = [rank for rank in receivers if rank != self._role_rank]
        try:
            return _reason(self._fetch(key, others, [keys.outcome])[0])
        except BaseException as error:
            # The leader may have decided just before the run ended, or before Ctrl-C here: whoever gives up must ask,
            # and obey what it finds.
            if not self._leader_has_committed(keys, min(receivers)):
                raise
            if not isinstance(error, RunError):
                self.interrupted_by = error
            return None

    def _leader_has_committed(self, keys: StoreKeys, leader: int) -> bool:
        """Give this point up, unless the leader has committed it."""
        if self._courier.mail_inside:
            holder = self._courier.claim(keys.outcome)
            if holder is not None:
                return holder == self._roster.side(self._role)[leader].process.pid
            # The leader may have had the place before: then its letter has arrived.
            letter = self._courier.look(keys.outcome)
            return letter is not None and letter.kind == COMMIT
        found = self._client.put_if_absent(keys.outcome, REFUSE, _GAVE_UP)
        return found is not None and found.kind == COMMIT

    def _bring(self, role_ranks: Sequence[int], place: str, kind: str, payload: str) -> None:
        receivers = [self._roster.graft_rank(self._role, rank) for rank in role_ranks]
        self._courier.bring(receivers, place, kind, payload, by_mail=self._courier.mail_inside)

    def _fetch(self, key: PointKey, others: Sequence[int], places: Sequence[str]) -> list[Sealed]:
        def make_wait() -> Wait:
            needs = frozenset(self._roster.graft_rank(self._role, rank) for rank in others)
            return Wait("agreement", key, self._timeout, needs=needs)

        return self._courier.fetch(make_wait, places, by_mail=self._courier.mail_inside)

    def keys_to_delete(self, key: PointKey, receivers: Sequence[int], *, committed: bool) -> list[str]:
        """What the receivers' leader deletes of a point that is over. The reason of a failed one stays until close."""
        if len(receivers) == 1 or self._role_rank != min(receivers):
            return []
        if self._courier.mail_inside:
            return []
        keys = store_keys(self._hall, key.digest)
        ballots = [keys.vote(rank) for rank in receivers if rank != self._role_rank]
        return [*ballots, keys.outcome] if committed else ballots


def _reason(outcome: Sealed) -> str | None:
    return None if outcome.kind == COMMIT else outcome.payload
