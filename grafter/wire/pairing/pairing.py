"""Pairing: before a byte of payload moves, every participant holds both sides' manifests and decides alike.

For one key: each participant describes its part in a `Header`. The lowest participant of each role, its leader,
collects them into a `Manifest`. The two leaders swap manifests, and hand both to their own sides.

A side that does not wait for the other (`wait="job"`) uses the same meeting place (`meeting_place`).
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
from grafter.core.roles import RoleName
from grafter.wire.monitor.absence import only_one_job_came
from grafter.wire.monitor.housekeeping import Housekeeping
from grafter.wire.monitor.waits import ABSENT, GivenUp, Wait
from grafter.wire.pairing.known_texts import KnownTexts
from grafter.wire.pairing.meeting_place import MANIFEST, MeetingPlace
from grafter.wire.pairing.refusals import Refusals
from grafter.wire.rendezvous.courier import Courier
from grafter.wire.store_client import StoreClient


class _OwnSide(NamedTuple):
    """One set of participants of this rank's job, as this rank sees it. The same ones come again at every point.

    leader: a role rank. others: all but this rank. `..._graft` are the same as graft ranks.
    """

    leader: int
    leader_graft: int
    others: tuple[int, ...]
    others_graft: tuple[int, ...]


class Pairing:
    """Meets the other side at one point after another. Called by the dump thread of every participant."""

    def __init__(
        self, client: StoreClient, courier: Courier, housekeeping: Housekeeping, roster: Roster, timeout: float
    ) -> None:
        self._client, self._courier, self._housekeeping = client, courier, housekeeping
        self._roster, self._timeout = roster, timeout
        self._run_prefix = client.run_prefix
        self._known = KnownTexts()
        self._refusals = Refusals(client, housekeeping, self._known)
        self._place = MeetingPlace(client, courier, housekeeping, roster, self._known, self._refusals)
        self.claims, self.words = self._place.claims, self._place.words
        # By own role, rank and participants.
        self._own_sides: dict[tuple[RoleName, int, tuple[int, ...]], _OwnSide] = {}
        # By own participants: the graft rank of the leader that they met.
        self._last_other_leader: dict[tuple[int, ...], int] = {}
        # What this rank has put into the store for the point under way.
        self._left_in_store: list[str] = []
        # Whether the point under way is skipped where not all come to it in its step.
        self._one_sided = False

    def meet(self, key: PointKey, header: Header, *, one_sided: bool = False) -> Pair | NotMet:
        """Wait for all participants of both sides, or, with `header.wait` "job", for those of the own side.

        one_sided: no longer than it is possible that they come in this step.

        NotMet: a side that does not wait has come here at another time, or not all have come to a one-sided point.
        Raises what ended the run, if something does.
        """
        # Before anything is offered: once the run is over, the other side must not take this for a point to come.
        self._housekeeping.check()
        self._one_sided = one_sided
        keys, own = store_keys(self._run_prefix, key.digest), self._own_side(header)
        if header.role_rank == own.leader:
            met = self._lead(key, header, own, keys)
        else:
            self._bring_header(header, own, keys)
            met = self._follow(key, header, own, keys)
        if isinstance(met, Pair) and "checked" not in met.memo:
            self._refusals.check_pair(key, met)
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
            return self._meet_other_leader(key, header, own, mine, keys)
        except GivenUp as given_up:
            told = self._last_other_leader.pop(header.participants, None)
            if told is not None:
                # It may never look into its mail for this point.
                self._courier.recall(told, keys.second)
            if mine is not None and not self._have_passed(key, header):
                # They may still come, and must not post what nobody waits for.
                self._left_in_store = [place for place in self._left_in_store if place != keys.first]
                self._place.give_up(header, keys, mine)
            # Those that have passed the step would keep the letter for ever.
            reached = self._housekeeping.step_ends.reached(self._client, header.role)
            here = [r for r in header.participants if r != header.role_rank and reached[r] <= key.step]
            others = [self._roster.graft_rank(header.role, r) for r in here]
            return self._hand_on(NotMet("skipped", str(given_up)), "", header, others, keys)

    def _follow(self, key: PointKey, header: Header, own: _OwnSide, keys: StoreKeys) -> Pair | NotMet:
        try:
            told = self._wait_for_own_side(key, header, [keys.pair(header.role)], [own.leader_graft])[0]
        except GivenUp as given_up:
            self._take_back_header(key, header, own, keys)
            return NotMet("skipped", str(given_up))
        return read_not_met(told.payload) if told.kind == NOT_MET else self._known.pair(told.payload)

    def _take_back_header(self, key: PointKey, header: Header, own: _OwnSide, keys: StoreKeys) -> None:
        """This follower has gone on: a leader that still comes must not count it among those that are there."""
        place = keys.header(header.role, header.role_rank)
        if self._housekeeping.step_ends.reached(self._client, header.role)[own.leader] <= key.step:
            self._bring([own.leader_graft], place, ABSENT, _gave_up_before(header))
        elif self._courier.mail_inside:
            self._courier.recall(own.leader_graft, place)
        else:
            self._housekeeping.delete_later([place])

    def post(self, key: PointKey, header: Header, *, one_sided: bool = False) -> tuple[str, str] | None:
        """The senders' part where they do not wait: say that the entry is in this rank's outbox.

        The leader waits for the other ranks of its own job, and posts for all. (state, reason) where the entry has
        ended already: then all ranks of this side find that state. Raises what ended the run, if something does.
        """
        self._housekeeping.check()
        self._one_sided = one_sided
        keys, own = store_keys(self._run_prefix, key.digest), self._own_side(header)
        if header.role_rank != own.leader:
            self._bring_header(header, own, keys)
            return None
        try:
            mine = self._collect(key, header, own, keys)
        except GivenUp as given_up:
            self._housekeeping.delete_later(self._courier.take_left_in_store())
            found = self._client.put_if_absent(keys.state, ONE_SIDED, str(given_up))
            return (ONE_SIDED, str(given_up)) if found is None else (found.kind, found.payload)
        if own.others and not self._courier.mail_inside:
            self._housekeeping.delete_later([keys.header(header.role, rank) for rank in own.others])
        return self._place.post(key, header, keys, mine)

    def _collect(self, key: PointKey, header: Header, own: _OwnSide, keys: StoreKeys) -> str:
        """The leader's part: its own role's headers, checked against each other, as the text of a manifest."""
        if not own.others:
            return manifest_text(header.role, [header.text], None)
        places = [keys.header(header.role, rank) for rank in own.others]
        came = self._wait_for_own_side(key, header, places, own.others_graft, collects=True)
        return self._known.collected(header, [sealed.payload for sealed in came])

    def _bring_header(self, header: Header, own: _OwnSide, keys: StoreKeys) -> None:
        self._bring([own.leader_graft], keys.header(header.role, header.role_rank), "header", header.text)

    def _meet_other_leader(
        self, key: PointKey, header: Header, own: _OwnSide, mine: str, keys: StoreKeys
    ) -> Pair | NotMet:
        """The leaders' part: each gets the other's manifest, and hands both to its own side."""
        theirs: Sealed | None = None
        told: int | None = None
        others = own.others_graft
        if header.wait == "job":
            early = self._place.find_early(mine)
            if early is not None:
                return self._hand_on(self._place.pass_by(key, header, keys, early), "", header, others, keys)
            theirs = self._place.look(header, keys)
        if theirs is None:
            if self._courier.mail_across:
                theirs, told = self._swap_by_mail(key, header, mine, keys)
            else:
                theirs = self._swap_in_store(key, header, mine, keys)
        text = f"[{mine},{theirs.payload}]" if header.role == "baseline" else f"[{theirs.payload},{mine}]"
        if theirs.kind != MANIFEST:
            return self._hand_on(self._place.meet(key, header, keys, theirs, text), text, header, others, keys)
        if others:
            self._bring(others, keys.pair(header.role), "pair", text)
        pair = self._known.pair(text) if others else self._known.pair_with(header, theirs.payload, text)
        if self._courier.mail_across:
            self._answer(header, pair.target if header.role == "baseline" else pair.baseline, mine, keys, told)
        return pair

    def _hand_on(
        self, met: Pair | NotMet, text: str, header: Header, others: Sequence[int], keys: StoreKeys
    ) -> Pair | NotMet:
        """Tell the own side what came of it where one side does not wait. text: of the pair."""
        if others and isinstance(met, NotMet):
            self._bring(others, keys.pair(header.role), NOT_MET, met.text)
        elif others:
            self._bring(others, keys.pair(header.role), "pair", text)
        return met

    def _swap_by_mail(self, key: PointKey, header: Header, mine: str, keys: StoreKeys) -> tuple[Sealed, int | None]:
        """(their manifest, the graft rank that was written to).

        Write to the leader that these participants met last time; it has usually written, too.

        Where that was the wrong one, or there was no last time, the store brings the two together: whoever comes second
        there finds the first, and writes to it. A manifest is the same whichever way it comes.
        """
        told = self._last_other_leader.get(header.participants)
        other = None
        if told is not None:
            self._courier.bring([told], keys.second, MANIFEST, mine, by_mail=True)
            # A wait in the store costs more, but finds any leader.
            other = self._courier.fetch_shortly(lambda: self._make_wait(key, header), [keys.second])
        if other is None:
            found = self._client.put_if_absent(keys.first, MANIFEST, mine)
            if found is not None:
                other = [found]
                if found.kind == MANIFEST:
                    self._courier.discard(keys.second)
            else:
                self._left_in_store.append(keys.first)
                self._check_whether_alone(key, header, keys)
                other = self._wait_for(key, header, [keys.second], by_mail=True)
        if other[0].kind != MANIFEST and told is not None:
            # The other side does not wait, and may never look into its mail.
            self._courier.recall(told, keys.second)
            del self._last_other_leader[header.participants]
        return other[0], told

    def _answer(self, header: Header, other: Manifest, mine: str, keys: StoreKeys, told: int | None) -> None:
        """Write to the leader that was met, unless that was done already, and write to it first next time."""
        leader = self._roster.graft_rank(other.role, other.headers[0].role_rank)
        if leader != told:
            if told is not None:
                self._courier.recall(told, keys.second)
            self._courier.bring([leader], keys.second, MANIFEST, mine, by_mail=True)
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
        theirs = self._wait_for(key, header, [keys.second], by_mail=False)[0]
        if theirs.kind != MANIFEST:
            # Its sender has gone on.
            self._left_in_store.append(keys.second)
        return theirs

    def _check_whether_alone(self, key: PointKey, header: Header, keys: StoreKeys) -> None:
        """Raises GivenUp where the other job has passed the end of a one-sided point's step, and left nothing here.

        Else it finds this rank's manifest when it comes.
        """
        if self._one_sided and self._have_passed(key, header):
            is_answered = self._courier.has(keys.second) or self._client.exists(keys.second)
            if not is_answered:
                raise GivenUp(only_one_job_came(header.role))

    def _have_passed(self, key: PointKey, header: Header) -> bool:
        return self._housekeeping.step_ends.have_passed(self._client, other_role(header.role), key.step)

    def _wait_for(self, key: PointKey, header: Header, places: Sequence[str], *, by_mail: bool) -> list[Sealed]:
        return self._courier.fetch(lambda: self._make_wait(key, header), places, by_mail=by_mail)

    def _wait_for_own_side(
        self, key: PointKey, header: Header, places: Sequence[str], writers: Sequence[int], *, collects: bool = False
    ) -> list[Sealed]:
        """What these ranks of this job, one for each place, bring there. writers: graft ranks."""
        by_mail = self._courier.mail_inside
        make_wait = partial(self._make_wait, key, header, collects=collects)
        return self._courier.fetch(make_wait, places, by_mail=by_mail, writers=writers)

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

    def _bring(self, receivers: Sequence[int], place: str, kind: str, payload: str) -> None:
        self._courier.bring(receivers, place, kind, payload, by_mail=self._courier.mail_inside)

    def is_asked_by_mail(self, digest: str) -> bool:
        """Whether the other side's leader has come to a point that this one has not. Never waits."""
        return self._courier.mail_across and self._courier.has(store_keys(self._run_prefix, digest).second)

    def is_asked_in_store(self, digest: str) -> bool:
        """The same, of a leader that does not know yet whom to write to. One round trip."""
        return self._client.exists(store_keys(self._run_prefix, digest).first)

    def keys_to_delete(self, key: PointKey, header: Header) -> list[str]:
        """What this rank deletes of a point, once a later point proves that all participants are done with it."""
        if header.role_rank != min(header.participants):
            return self._courier.take_left_in_store()
        keys = store_keys(self._run_prefix, key.digest)
        mine, self._left_in_store = self._left_in_store + self._courier.take_left_in_store(), []
        if not self._courier.mail_inside and len(header.participants) > 1:
            mine += [keys.header(header.role, rank) for rank in header.participants if rank != header.role_rank]
            mine.append(keys.pair(header.role))
        return mine


def _gave_up_before(header: Header) -> str:
    return (
        f"not all ranks of the {header.role} came to this point at the same time: {header.who} had given it up before "
        f"({header.call_site})"
    )
