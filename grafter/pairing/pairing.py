"""Pairing: before a byte of payload moves, every participant holds both sides' manifests and decides alike.

For one key: each participant describes its part in a `Header`. The lowest participant of each role, its leader,
collects them into a `Manifest`. The two leaders swap manifests, and hand both to their own sides.

A side that does not wait for the other (`wait="job"`) uses the same meeting place, the key of the store where the first
of two leaders leaves its manifest: its senders post there and go on; its receivers take what is posted, or leave word
that they were there (`grafter.outbox`).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from pydantic import TypeAdapter

from grafter.direction import sender_role
from grafter.errors import PairingError, ProtocolError
from grafter.outbox.claims import Claims
from grafter.outbox.places import Words
from grafter.outbox.states import (
    DISPLACED,
    GONE,
    MISSED,
    NOT_MET,
    OPEN,
    POSTED,
    WITHDRAWN,
    NotMet,
    gone_text,
    open_state,
    read_not_met,
    receivers_account,
)
from grafter.pairing.manifest import (
    Header,
    Manifest,
    Pair,
    StoreKeys,
    manifest_text,
    store_keys,
    with_tokens_told_once,
)
from grafter.pairing.mismatch import find_conflict, two_leaders
from grafter.points import PointKey
from grafter.rendezvous.courier import Courier
from grafter.rendezvous.roster import Roster
from grafter.rendezvous.store import StoreClient
from grafter.rendezvous.wire import Sealed, read_message
from grafter.watching.housekeeping import Housekeeping
from grafter.watching.waits import Wait

_MOST_REMEMBERED = 4096
_MOST_REMEMBERED_WITH_TOKENS = 16
_MANIFESTS = TypeAdapter(tuple[Manifest, Manifest])
_MANIFEST = "manifest"


def _word_of(header: Header) -> str:
    """What receivers leave at the meeting place when they go on."""
    return Header(
        role=header.role, role_rank=header.role_rank, participants=header.participants, direction=header.direction,
        call_site=header.call_site, wait=header.wait,
    ).text  # fmt: skip


def _remember(known: dict[Any, Any], text: Any, found: Any, has_tokens: bool) -> None:
    if len(known) >= (_MOST_REMEMBERED_WITH_TOKENS if has_tokens else _MOST_REMEMBERED):
        known.clear()
    known[text] = found


class Pairing:
    """Meets the other side at one point after another. Called by the dump thread of every participant."""

    def __init__(
        self, client: StoreClient, courier: Courier, housekeeping: Housekeeping, roster: Roster, timeout: float
    ) -> None:
        self._client, self._courier, self._housekeeping = client, courier, housekeeping
        self._roster, self._timeout = roster, timeout
        self._hall = client.hall
        # By own participants: the graft rank of the leader that they met.
        self._last_other_leader: dict[tuple[int, ...], int] = {}
        # What came again is not worked out again: pairs by their text, manifests by the texts of their headers.
        self._pairs: dict[str, Pair] = {}
        self._manifests: dict[tuple[str, ...], str] = {}
        # Those with tokens are long, and others in each step: few are kept, for the next layers.
        self._pairs_of_tokens: dict[str, Pair] = {}
        self._manifests_of_tokens: dict[tuple[str, ...], str] = {}
        self._read_manifests: dict[str, Manifest] = {}
        # What this rank has put into the store for the point under way.
        self._left_in_store: list[str] = []
        self.claims = Claims(client)
        self.words = Words(housekeeping.delete_later)

    def meet(self, key: PointKey, header: Header) -> Pair | NotMet:
        """Wait for all participants of both sides, or, with `header.wait` "job", for those of the own side.

        NotMet: a side that does not wait has come here at another time. Raises what ended the run, if something does.
        """
        # Before anything is offered: once the run is over, the other side must not take this for a point to come.
        self._housekeeping.check()
        keys = store_keys(self._hall, key.digest)
        leader = min(header.participants)
        if header.role_rank == leader:
            met = self._meet_other_leader(key, header, self._collect(key, header, keys), keys)
        else:
            self._bring_header(header, keys)
            told = self._wait_for(key, header, [keys.pair(header.role)], by_mail=self._courier.mail_inside)[0]
            met = read_not_met(told.payload) if told.kind == NOT_MET else self._read_pair(told.payload)
        if isinstance(met, Pair) and "checked" not in met.memo:
            self._check(key, met)
        return met

    def post(self, key: PointKey, header: Header) -> tuple[str, str] | None:
        """The senders' part where they do not wait: say that the entry is in this rank's outbox.

        The leader waits for the other ranks of its own job, and posts for all. (state, reason) where the entry has
        ended already: then all ranks of this side find that state. Raises what ended the run, if something does.
        """
        self._housekeeping.check()
        keys = store_keys(self._hall, key.digest)
        if header.role_rank != min(header.participants):
            self._bring_header(header, keys)
            return None
        mine = self._collect(key, header, keys)
        if len(header.participants) > 1 and not self._courier.mail_inside:
            others = [rank for rank in header.participants if rank != header.role_rank]
            self._housekeeping.delete_later([keys.header(header.role, rank) for rank in others])
        own = self._read_own(mine)
        if own.conflict is not None:
            raise self._housekeeping.abort(PairingError(f"at the point {key}: {own.conflict}"), self._client)
        failed = next((each for each in own.headers if each.failure is not None), None)
        if failed is not None:
            reason = f"{failed.who} failed before the exchange: {failed.failure}"
            return self._withdraw(key, header, keys, WITHDRAWN, reason)
        early = next((each for each in own.headers if each.early), None)
        if early is not None:
            reason = f"{early.who} had no room to keep it until both jobs had joined (GRAFTER_OUTBOX_BYTES)"
            return self._withdraw(key, header, keys, DISPLACED, reason)
        if len(header.participants) == 1:
            self._client.set(keys.state, OPEN, "")
        elif (ended := self._client.put_if_absent(keys.state, OPEN, "")) is not None:
            # Another rank came long before this one, and could not keep it for so long.
            self._post_at(key, header, keys, GONE, gone_text(ended.kind, ended.payload))
            return ended.kind, ended.payload
        missed = self._post_at(key, header, keys, POSTED, mine)
        if missed is None or len(header.participants) == 1:
            return missed
        found = self._client.exchange(keys.state, open_state(header.role, header.role_rank), *missed)
        return missed if found is None else (found.kind, found.payload)

    def _withdraw(self, key: PointKey, header: Header, keys: StoreKeys, state: str, reason: str) -> tuple[str, str]:
        """One rank of this side could not: nothing is posted, and all others are told. What the entry's state is."""
        if len(header.participants) > 1:
            found = self._client.put_if_absent(keys.state, state, reason)
            if found is not None:
                state, reason = found.kind, found.payload
        self._post_at(key, header, keys, GONE, gone_text(state, reason))
        return state, reason

    def _post_at(self, key: PointKey, header: Header, keys: StoreKeys, kind: str, text: str) -> tuple[str, str] | None:
        found = self._client.put_if_absent(keys.first, kind, text)
        if found is None:
            if kind == GONE:
                self.words.left_at(keys.first)
            return None
        self._refuse_second_leader(key, header, found)
        if found.kind == MISSED:
            self._housekeeping.delete_later([keys.first])
            receivers = self._read_header(found.payload)
            return MISSED, f"{receivers.who} had been here before, found nothing, and went on ({receivers.call_site})"
        if found.kind == _MANIFEST:
            self._tell_who_waits(found.payload, keys, kind, text)
        return None

    def _tell_who_waits(self, manifest: str, keys: StoreKeys, kind: str, text: str) -> None:
        """The other side waits at the meeting place, with this manifest."""
        waiting = self._read_own(manifest).headers[0]
        leader = self._roster.graft_rank(waiting.role, waiting.role_rank)
        if self._courier.mail_across:
            # It may have written here before it looked in the store.
            self._courier.look(keys.second)
        self._courier.bring([leader], keys.second, kind, text, by_mail=self._courier.mail_across)

    def _refuse_second_leader(self, key: PointKey, header: Header, found: Sealed) -> None:
        """What lies at the meeting place must be the other side's, or tell that an entry of the own side is gone."""
        if found.kind == GONE or found.writer.partition("/")[0] != header.role:
            return
        if found.kind == MISSED:
            other = self._read_header(found.payload)
        else:
            other = self._read_own(found.payload).headers[0]
        error = PairingError(f"at the point {key}: {two_leaders(other, header)}")
        raise self._housekeeping.abort(error, self._client)

    def _read_own(self, text: str) -> Manifest:
        """A manifest from its text, which comes again in every step."""
        known = self._read_manifests.get(text)
        if known is None:
            known = read_message(Manifest.model_validate_json, text, "a manifest")
            _remember(self._read_manifests, text, known, known.headers[0].tokens is not None)
        return known

    def _read_header(self, text: str) -> Header:
        return read_message(Header.model_validate_json, text, "a header")

    def _bring_header(self, header: Header, keys: StoreKeys) -> None:
        leader = self._roster.graft_rank(header.role, min(header.participants))
        self._bring([leader], keys.header(header.role, header.role_rank), "header", header.text)

    def is_asked_by_mail(self, digest: str) -> bool:
        """Whether the other side's leader has come to a point that this one has not. Never waits."""
        return self._courier.mail_across and self._courier.has(store_keys(self._hall, digest).second)

    def is_asked_in_store(self, digest: str) -> bool:
        """The same, of a leader that does not know yet whom to write to. One round trip."""
        return self._client.exists(store_keys(self._hall, digest).first)

    def _read_pair(self, text: str) -> Pair:
        """Both manifests from `[baseline's,target's]`. The same text gives the same object, with what it remembers."""
        pair = self._pairs.get(text) or self._pairs_of_tokens.get(text)
        if pair is None:
            pair = Pair(*read_message(_MANIFESTS.validate_json, text, "a pair of manifests"))
            has_tokens = any(header.tokens is not None for header in pair.headers)
            _remember(self._pairs_of_tokens if has_tokens else self._pairs, text, pair, has_tokens)
        return pair

    def _pair_with(self, header: Header, theirs: str, text: str) -> Pair:
        """The same of a rank that is alone in its manifest, of which it need not read its own part."""
        pair = self._pairs.get(text) or self._pairs_of_tokens.get(text)
        if pair is None:
            mine = Manifest(role=header.role, headers=(header,))
            other = read_message(Manifest.model_validate_json, theirs, "a manifest")
            pair = Pair(mine, other) if header.role == "baseline" else Pair(other, mine)
            has_tokens = any(header.tokens is not None for header in pair.headers)
            _remember(self._pairs_of_tokens if has_tokens else self._pairs, text, pair, has_tokens)
        return pair

    def _bring(self, receivers: Sequence[int], place: str, kind: str, payload: str) -> None:
        self._courier.bring(receivers, place, kind, payload, by_mail=self._courier.mail_inside)

    def _make_wait(self, key: PointKey, header: Header) -> Wait:
        return Wait(
            "pairing",
            key,
            self._timeout,
            leader=header.role_rank == min(header.participants),
            digest=key.digest,
            participants=header.participants,
            call_site=header.call_site,
            own_side=header.wait == "job",
        )

    def _wait_for(self, key: PointKey, header: Header, places: Sequence[str], *, by_mail: bool) -> list[Sealed]:
        return self._courier.fetch(lambda: self._make_wait(key, header), places, by_mail=by_mail)

    def _collect(self, key: PointKey, header: Header, keys: StoreKeys) -> str:
        """The leader's part: its own role's headers, checked against each other, as the text of a manifest."""
        places = [keys.header(header.role, rank) for rank in header.participants if rank != header.role_rank]
        if not places:
            return manifest_text(header.role, [header.text], None)
        came = self._wait_for(key, header, places, by_mail=self._courier.mail_inside)
        texts = (header.text, *(sealed.payload for sealed in came))
        manifest = self._manifests.get(texts) or self._manifests_of_tokens.get(texts)
        if manifest is None:
            read = [read_message(Header.model_validate_json, text, "a header") for text in texts[1:]]
            headers, told = [header, *read], texts
            has_tokens = any(own.tokens is not None for own in headers)
            if has_tokens:
                told = tuple(own.text for own in with_tokens_told_once(headers))
            manifest = manifest_text(header.role, told, find_conflict(headers))
            _remember(self._manifests_of_tokens if has_tokens else self._manifests, texts, manifest, has_tokens)
        return manifest

    def _meet_other_leader(self, key: PointKey, header: Header, mine: str, keys: StoreKeys) -> Pair | NotMet:
        """The leaders' part: each gets the other's manifest, and hands both to its own side."""
        told: int | None = None
        others = [self._roster.graft_rank(header.role, r) for r in header.participants if r != header.role_rank]
        early = self._find_early(header, mine) if header.wait == "job" else None
        if early is not None:
            return self._pass_by(key, header, keys, early, others)
        theirs = self._look(header, keys) if header.wait == "job" else None
        if theirs is None:
            if self._courier.mail_across:
                theirs, told = self._swap_by_mail(key, header, mine, keys)
            else:
                theirs = self._swap_in_store(key, header, mine, keys)
        if theirs.kind != _MANIFEST:
            return self._meet_without_waiting(key, header, mine, keys, theirs, others)
        text = f"[{mine},{theirs.payload}]" if header.role == "baseline" else f"[{theirs.payload},{mine}]"
        if others:
            self._bring(others, keys.pair(header.role), "pair", text)
        pair = self._read_pair(text) if others else self._pair_with(header, theirs.payload, text)
        if self._courier.mail_across:
            self._answer(header, pair.target if header.role == "baseline" else pair.baseline, mine, keys, told)
        return pair

    def _look(self, header: Header, keys: StoreKeys) -> Sealed | None:
        """What the senders have left at the meeting place. Nothing: leave word. None: they wait here, or write now."""
        if self._courier.mail_across and self._courier.has(keys.second):
            return None
        found = self._leave_word(header, keys)
        if found is None:
            return Sealed(MISSED, self._client.seal.writer, "")
        return None if found.kind == _MANIFEST else found

    def _leave_word(self, header: Header, keys: StoreKeys) -> Sealed | None:
        """That the receivers were here and have gone on, unless something lies there: then that."""
        found = self._client.put_if_absent(keys.first, MISSED, _word_of(header))
        if found is None:
            self.words.left_at(keys.first)
        return found

    def _find_early(self, header: Header, mine: str) -> Header | None:
        """A rank of this side that came before both jobs had joined, and has gone on."""
        # Within a string of JSON the quotes would be escaped.
        if '"early":true' not in mine:
            return None
        return next((own for own in self._read_own(mine).headers if own.early), None)

    def _pass_by(self, key: PointKey, header: Header, keys: StoreKeys, early: Header, others: Sequence[int]) -> NotMet:
        """One rank of this side has gone on, so nobody of it takes the point, whatever was posted."""
        reason = f"{early.who} was here before both jobs had joined, and went on ({early.call_site})"
        found = self._leave_word(header, keys)
        if found is not None:
            self._refuse_second_leader(key, header, found)
            if found.kind == _MANIFEST:
                self._tell_who_waits(found.payload, keys, MISSED, _word_of(header))
            elif found.kind == POSTED:
                sender = self._read_own(found.payload).headers[0]
                self._client.exchange(keys.state, open_state(sender.role, sender.role_rank), MISSED, reason)
            if found.kind != _MANIFEST:
                # Whoever comes second removes what was left for it.
                self._housekeeping.delete_later([keys.first])
        not_met = NotMet("missed", reason)
        if others:
            self._bring(others, keys.pair(header.role), NOT_MET, not_met.text)
        return not_met

    def _meet_without_waiting(
        self, key: PointKey, header: Header, mine: str, keys: StoreKeys, theirs: Sealed, others: Sequence[int]
    ) -> Pair | NotMet:
        """One side does not wait: the senders' entry is claimed for all receivers, or the two have not met."""
        if theirs.payload:
            self._refuse_second_leader(key, header, theirs)
        not_met, pair, text = None, None, ""
        if theirs.kind == POSTED:
            text = f"[{mine},{theirs.payload}]" if header.role == "baseline" else f"[{theirs.payload},{mine}]"
            pair = self._read_pair(text)
            if "checked" not in pair.memo:
                self._check(key, pair)
            receivers = [self._roster.graft_rank(header.role, rank) for rank in header.participants]
            sender = pair.side(sender_role(header.direction)).headers[0]
            posted = open_state(sender.role, sender.role_rank)
            not_met = self.claims.claim(keys, key.digest, posted, receivers)
        else:
            not_met = self._why_not_met(header, keys, theirs)
        if others and not_met is not None:
            self._bring(others, keys.pair(header.role), NOT_MET, not_met.text)
        elif others:
            self._bring(others, keys.pair(header.role), "pair", text)
        return not_met or pair  # type: ignore[return-value]

    def _why_not_met(self, header: Header, keys: StoreKeys, theirs: Sealed) -> NotMet:
        if theirs.kind == MISSED and not theirs.payload:
            return NotMet("missed", f"the {sender_role(header.direction)} had posted nothing when this side came")
        # Whoever comes second removes the word that was left for it.
        self._housekeeping.delete_later([keys.first])
        if theirs.kind == MISSED:
            came = self._read_header(theirs.payload)
            return NotMet("missed", f"{came.who} was here before, found nothing posted, and went on ({came.call_site})")
        if theirs.kind == GONE:
            return receivers_account(*theirs.payload.partition("\n")[::2])
        raise ProtocolError(
            f"{theirs.kind[:40]!r} lies where the senders' manifest should; both jobs need one grafter."
        )

    def _swap_in_store(self, key: PointKey, header: Header, mine: str, keys: StoreKeys) -> Sealed:
        found = self._client.put_if_absent(keys.first, _MANIFEST, mine)
        if found is not None:
            if found.kind == _MANIFEST:
                self._client.set(keys.second, _MANIFEST, mine)
                self._left_in_store.append(keys.second)
            return found
        self._left_in_store.append(keys.first)
        theirs = self._wait_for(key, header, [keys.second], by_mail=False)[0]
        if theirs.kind != _MANIFEST:
            # Its sender has gone on.
            self._left_in_store.append(keys.second)
        return theirs

    def _swap_by_mail(self, key: PointKey, header: Header, mine: str, keys: StoreKeys) -> tuple[Sealed, int | None]:
        """(their manifest, the graft rank that was written to).

        Write to the leader that these participants met last time; it has usually written, too.

        Where that was the wrong one, or there was no last time, the store brings the two together: whoever comes second
        there finds the first, and writes to it. A manifest is the same whichever way it comes.
        """
        told = self._last_other_leader.get(header.participants)
        other = None
        if told is not None:
            self._courier.bring([told], keys.second, _MANIFEST, mine, by_mail=True)
            # A wait in the store costs more, but finds any leader.
            other = self._courier.fetch_shortly(lambda: self._make_wait(key, header), [keys.second])
        if other is None:
            found = self._client.put_if_absent(keys.first, _MANIFEST, mine)
            if found is not None:
                other = [found]
                if found.kind == _MANIFEST:
                    self._courier.discard(keys.second)
            else:
                self._left_in_store.append(keys.first)
                other = self._wait_for(key, header, [keys.second], by_mail=True)
        if other[0].kind != _MANIFEST and told is not None:
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
            self._courier.bring([leader], keys.second, _MANIFEST, mine, by_mail=True)
            self._last_other_leader[header.participants] = leader

    def _check(self, key: PointKey, pair: Pair) -> None:
        conflict = pair.baseline.conflict or pair.target.conflict
        if conflict is None and pair.baseline.role == pair.target.role:
            conflict = two_leaders(pair.baseline.headers[0], pair.target.headers[0])
        if conflict is not None:
            raise self._housekeeping.abort(PairingError(f"at the point {key}: {conflict}"), self._client)
        directions = {header.direction for header in pair.headers}
        if len(directions) != 1:
            error_text = f"the point {key} came with the directions {sorted(directions)}; the two jobs' filters differ."
            raise self._housekeeping.abort(ProtocolError(error_text), self._client)
        pair.memo["checked"] = True

    def keys_to_delete(self, key: PointKey, header: Header) -> list[str]:
        """What this rank deletes of a point, once a later point proves that all participants are done with it."""
        if header.role_rank != min(header.participants):
            return self._courier.take_left_in_store()
        keys = store_keys(self._hall, key.digest)
        mine, self._left_in_store = self._left_in_store + self._courier.take_left_in_store(), []
        if not self._courier.mail_inside and len(header.participants) > 1:
            mine += [keys.header(header.role, rank) for rank in header.participants if rank != header.role_rank]
            mine.append(keys.pair(header.role))
        return mine
