"""Pairing: before any payload moves, every participant has the manifests of both sides, and so makes the same decision.

For one point: each participant describes its part in a `Header`. The lowest participant of each role, its leader,
collects the headers into a `Manifest`. The two leaders swap manifests, and send both to their own sides.

A side that does not wait for the other (`wait="job"`) uses the same store keys (`nonblocking_rendezvous`).
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import NamedTuple

from grafter.core.messages.manifest import Header, Manifest, Pair, StoreKeys, manifest_text, store_keys
from grafter.core.messages.roster import Roster, other_role
from grafter.core.messages.states import NOT_MET, ONE_SIDED, NotMet, read_not_met
from grafter.core.messages.wire import Sealed
from grafter.core.points import PointKey
from grafter.core.roles import Role
from grafter.wire.monitor.absence import only_one_job_came
from grafter.wire.monitor.monitor_thread import MonitorThread
from grafter.wire.monitor.waits import ABSENT, GivenUp, Wait
from grafter.wire.pairing.manifest_cache import ManifestCache, ManifestChecks
from grafter.wire.pairing.nonblocking_rendezvous import MANIFEST, NonblockingRendezvous
from grafter.wire.rendezvous.message_router import MessageRouter
from grafter.wire.store_client import StoreClient


class _OwnSide(NamedTuple):
    """One set of participants of this rank's job, as this rank sees it. Most points have the same set.

    leader: a role rank. others: all participants but this rank. `..._graft` are the same as graft ranks.
    """

    leader: int
    leader_graft: int
    others: tuple[int, ...]
    others_graft: tuple[int, ...]


class Pairing:
    """Pairs one point after another. Called by the dump thread of every participant."""

    def __init__(
        self, client: StoreClient, router: MessageRouter, monitor: MonitorThread, roster: Roster, timeout: float
    ) -> None:
        self._client, self._router, self._monitor = client, router, monitor
        self._roster, self._timeout = roster, timeout
        self._run_prefix = client.run_prefix
        self._cache = ManifestCache()
        self._checks = ManifestChecks(client, monitor, self._cache)
        self._nonblocking = NonblockingRendezvous(client, router, monitor, roster, self._cache, self._checks)
        self.claims, self.tombstones = self._nonblocking.claims, self._nonblocking.tombstones
        # By own role, rank and participants.
        self._own_sides: dict[tuple[Role, int, tuple[int, ...]], _OwnSide] = {}
        # By own participants: the graft rank of the other side's leader at their last point.
        self._last_other_leader: dict[tuple[int, ...], int] = {}
        # The keys that this rank has put into the store for the current point.
        self._left_in_store: list[str] = []
        # Whether the current point is skipped if not all participants reach it in its step.
        self._one_sided = False

    def meet(self, key: PointKey, header: Header, *, one_sided: bool = False) -> Pair | NotMet:
        """Wait for all participants of both sides, or, with `header.wait` "job", for those of its own side.

        Called by every participant. one_sided: wait only as long as they may reach the point in this step. Returns
        NotMet if a side that does not wait was here at another time, or not all have reached a one-sided point. Raises
        what ended the run.
        """
        # First: once the run is over, the other side must not find a header of this point.
        self._monitor.check()
        self._one_sided = one_sided
        keys, own = store_keys(self._run_prefix, key.digest), self._own_side(header)
        if header.role_rank == own.leader:
            met = self._lead(key, header, own, keys)
        else:
            self._send_header(header, own, keys)
            met = self._follow(key, header, own, keys)
        if isinstance(met, Pair) and "checked" not in met.memo:
            self._checks.check_pair(key, met)
        return met

    def _own_side(self, header: Header) -> _OwnSide:
        known = (header.role, header.role_rank, header.participants)
        own = self._own_sides.get(known)
        if own is None:
            leader, others = min(header.participants), tuple(r for r in header.participants if r != header.role_rank)
            leader_graft, *others_graft = (self._roster.graft_rank(header.role, r) for r in (leader, *others))
            own = self._own_sides[known] = _OwnSide(leader, leader_graft, others, tuple(others_graft))
        return own

    def _lead(self, key: PointKey, header: Header, own: _OwnSide, keys: StoreKeys) -> Pair | NotMet:
        mine = None
        try:
            mine = self._collect(key, header, own, keys)
            return self._swap_manifests(key, header, own, mine, keys)
        except GivenUp as given_up:
            written_to = self._last_other_leader.pop(header.participants, None)
            if written_to is not None:
                # The other leader may never read its messages for this point.
                self._router.recall(written_to, keys.second)
            if mine is not None and not self._have_passed(key, header):
                # The other side may still reach the point, and must not post what no rank waits for.
                self._left_in_store = [place for place in self._left_in_store if place != keys.first]
                self._nonblocking.give_up(header, keys, mine)
            # Not to ranks that have passed the step: they would keep the message for ever.
            reached = self._monitor.step_ends.reached(self._client, header.role)
            here = [r for r in header.participants if r != header.role_rank and reached[r] <= key.step]
            others = [self._roster.graft_rank(header.role, r) for r in here]
            return self._send_to_own_side(NotMet("skipped", str(given_up)), "", header, others, keys)

    def _follow(self, key: PointKey, header: Header, own: _OwnSide, keys: StoreKeys) -> Pair | NotMet:
        try:
            sealed = self._wait_for_own_side(key, header, [keys.pair(header.role)], [own.leader_graft])[0]
        except GivenUp as given_up:
            self._withdraw_header(key, header, own, keys)
            return NotMet("skipped", str(given_up))
        return read_not_met(sealed.payload) if sealed.kind == NOT_MET else self._cache.pair(sealed.payload)

    def _withdraw_header(self, key: PointKey, header: Header, own: _OwnSide, keys: StoreKeys) -> None:
        """This follower has given the point up: if its leader still reaches it, it must not count this rank."""
        place = keys.header(header.role, header.role_rank)
        if self._monitor.step_ends.reached(self._client, header.role)[own.leader] <= key.step:
            self._send([own.leader_graft], place, ABSENT, _gave_up_before(header))
        elif self._router.channels_within_job:
            self._router.recall(own.leader_graft, place)
        else:
            self._monitor.delete_later([place])

    def post(self, key: PointKey, header: Header, *, one_sided: bool = False) -> tuple[str, str] | None:
        """Announce that the entry is in this rank's outbox. Called by every sender of a point whose senders do not
        wait.

        The leader waits for the other ranks of its own job, and posts for all. Returns (state, reason) if the entry has
        ended already; all ranks of this side then find that state. Raises what ended the run.
        """
        self._monitor.check()
        self._one_sided = one_sided
        keys, own = store_keys(self._run_prefix, key.digest), self._own_side(header)
        if header.role_rank != own.leader:
            self._send_header(header, own, keys)
            return None
        try:
            mine = self._collect(key, header, own, keys)
        except GivenUp as given_up:
            self._monitor.delete_later(self._router.take_left_in_store())
            found = self._client.put_if_absent(keys.state, ONE_SIDED, str(given_up))
            return (ONE_SIDED, str(given_up)) if found is None else (found.kind, found.payload)
        if own.others and not self._router.channels_within_job:
            self._monitor.delete_later([keys.header(header.role, rank) for rank in own.others])
        return self._nonblocking.post(key, header, keys, mine)

    def _collect(self, key: PointKey, header: Header, own: _OwnSide, keys: StoreKeys) -> str:
        """The manifest of this side as text: its headers, checked against each other. Called by its leader."""
        if not own.others:
            return manifest_text(header.role, [header.text], None)
        places = [keys.header(header.role, rank) for rank in own.others]
        came = self._wait_for_own_side(key, header, places, own.others_graft, collects=True)
        return self._cache.collected(header, [sealed.payload for sealed in came])

    def _send_header(self, header: Header, own: _OwnSide, keys: StoreKeys) -> None:
        self._send([own.leader_graft], keys.header(header.role, header.role_rank), "header", header.text)

    def _swap_manifests(
        self, key: PointKey, header: Header, own: _OwnSide, mine: str, keys: StoreKeys
    ) -> Pair | NotMet:
        """Swap manifests with the other leader, and send both to its own side. Called by each leader."""
        theirs: Sealed | None = None
        written_to: int | None = None
        others = own.others_graft
        if header.wait == "job":
            early = self._nonblocking.find_early(mine)
            if early is not None:
                return self._send_to_own_side(
                    self._nonblocking.pass_over(key, header, keys, early), "", header, others, keys
                )
            theirs = self._nonblocking.look(header, keys)
        if theirs is None:
            if self._router.channels_between_jobs:
                theirs, written_to = self._swap_by_channel(key, header, mine, keys)
            else:
                theirs = self._swap_in_store(key, header, mine, keys)
        text = f"[{mine},{theirs.payload}]" if header.role == "baseline" else f"[{theirs.payload},{mine}]"
        if theirs.kind != MANIFEST:
            return self._send_to_own_side(
                self._nonblocking.meet(key, header, keys, theirs, text), text, header, others, keys
            )
        if others:
            self._send(others, keys.pair(header.role), "pair", text)
        pair = self._cache.pair(text) if others else self._cache.pair_with(header, theirs.payload, text)
        if self._router.channels_between_jobs:
            self._answer(header, pair.target if header.role == "baseline" else pair.baseline, mine, keys, written_to)
        return pair

    def _send_to_own_side(
        self, met: Pair | NotMet, text: str, header: Header, others: Sequence[int], keys: StoreKeys
    ) -> Pair | NotMet:
        """Send the result to the ranks of this side, if one side does not wait. text: of the pair."""
        if others and isinstance(met, NotMet):
            self._send(others, keys.pair(header.role), NOT_MET, met.text)
        elif others:
            self._send(others, keys.pair(header.role), "pair", text)
        return met

    def _swap_by_channel(self, key: PointKey, header: Header, mine: str, keys: StoreKeys) -> tuple[Sealed, int | None]:
        """Returns (their manifest, the graft rank that this leader has written to).

        It writes to the leader of these participants' last point, which has usually written as well. If that is the
        wrong leader, or there is none, the two find each other through the store: the second one finds the manifest of
        the first, and writes to it. A manifest is the same whichever way it arrives.
        """
        written_to = self._last_other_leader.get(header.participants)
        other = None
        if written_to is not None:
            self._router.send([written_to], keys.second, MANIFEST, mine, by_channel=True)
            # Not for long: a wait in the store takes more time, but finds any leader.
            other = self._router.receive_shortly(lambda: self._make_wait(key, header), [keys.second])
        if other is None:
            found = self._client.put_if_absent(keys.first, MANIFEST, mine)
            if found is not None:
                other = [found]
                if found.kind == MANIFEST:
                    self._router.discard(keys.second)
            else:
                self._left_in_store.append(keys.first)
                self._check_whether_alone(key, header, keys)
                other = self._wait_for(key, header, [keys.second], by_channel=True)
        if other[0].kind != MANIFEST and written_to is not None:
            # The other side does not wait, and may never read its messages.
            self._router.recall(written_to, keys.second)
            del self._last_other_leader[header.participants]
        return other[0], written_to

    def _answer(self, header: Header, other: Manifest, mine: str, keys: StoreKeys, written_to: int | None) -> None:
        """Write to the leader that was found, unless that is done already, and write to it first next time."""
        leader = self._roster.graft_rank(other.role, other.headers[0].role_rank)
        if leader != written_to:
            if written_to is not None:
                self._router.recall(written_to, keys.second)
            self._router.send([leader], keys.second, MANIFEST, mine, by_channel=True)
            self._last_other_leader[header.participants] = leader

    def _swap_in_store(self, key: PointKey, header: Header, mine: str, keys: StoreKeys) -> Sealed:
        found = self._client.put_if_absent(keys.first, MANIFEST, mine)
        if found is not None:
            if found.kind == MANIFEST:
                self._client.set(keys.second, MANIFEST, mine)
                self._left_in_store.append(keys.second)
            return found
        self._left_in_store.append(keys.first)
        self._check_whether_alone(key, header, keys)
        theirs = self._wait_for(key, header, [keys.second], by_channel=False)[0]
        if theirs.kind != MANIFEST:
            # Its sender does not wait for the point any more.
            self._left_in_store.append(keys.second)
        return theirs

    def _check_whether_alone(self, key: PointKey, header: Header, keys: StoreKeys) -> None:
        """Raises GivenUp if the other job has passed the end of a one-sided point's step, and has left nothing here.

        Else it finds this rank's manifest when it reaches the point.
        """
        if self._one_sided and self._have_passed(key, header):
            is_answered = self._router.has(keys.second) or self._client.exists(keys.second)
            if not is_answered:
                raise GivenUp(only_one_job_came(header.role))

    def _have_passed(self, key: PointKey, header: Header) -> bool:
        return self._monitor.step_ends.have_passed(self._client, other_role(header.role), key.step)

    def _wait_for(self, key: PointKey, header: Header, places: Sequence[str], *, by_channel: bool) -> list[Sealed]:
        return self._router.receive(lambda: self._make_wait(key, header), places, by_channel=by_channel)

    def _wait_for_own_side(
        self, key: PointKey, header: Header, places: Sequence[str], writers: Sequence[int], *, collects: bool = False
    ) -> list[Sealed]:
        """The messages of other ranks of this job: one for each place. writers: their graft ranks."""
        by_channel = self._router.channels_within_job
        make_wait = partial(self._make_wait, key, header, collects=collects)
        return self._router.receive(make_wait, places, by_channel=by_channel, writers=writers)

    def _make_wait(self, key: PointKey, header: Header, *, collects: bool = False) -> Wait:
        return Wait(
            "pairing",
            key,
            self._timeout,
            leader=header.role_rank == min(header.participants),
            digest=key.digest,
            participants=header.participants,
            call_site=header.call_site,
            own_side=header.wait == "job",
            one_sided=self._one_sided,
            step=key.step,
            collects=collects,
        )

    def _send(self, receivers: Sequence[int], place: str, kind: str, payload: str) -> None:
        self._router.send(receivers, place, kind, payload, by_channel=self._router.channels_within_job)

    def is_asked_by_channel(self, digest: str) -> bool:
        """Whether the other side's leader has reached a point that this rank has not. Never waits."""
        return self._router.channels_between_jobs and self._router.has(store_keys(self._run_prefix, digest).second)

    def is_asked_in_store(self, digest: str) -> bool:
        """The same for a leader that does not know this side's leader yet. One round trip."""
        return self._client.exists(store_keys(self._run_prefix, digest).first)

    def keys_to_delete(self, key: PointKey, header: Header) -> list[str]:
        """The keys that this rank deletes of a point, once a later point proves that all participants are done with
        it."""
        if header.role_rank != min(header.participants):
            return self._router.take_left_in_store()
        keys = store_keys(self._run_prefix, key.digest)
        mine, self._left_in_store = self._left_in_store + self._router.take_left_in_store(), []
        if not self._router.channels_within_job and len(header.participants) > 1:
            mine += [keys.header(header.role, rank) for rank in header.participants if rank != header.role_rank]
            mine.append(keys.pair(header.role))
        return mine


def _gave_up_before(header: Header) -> str:
    return (
        f"not all ranks of the {header.role} reached this point at the same time: {header.who} had given it up before "
        f"({header.call_site})"
    )
