"""Pairing: before a byte of payload moves, every participant holds both sides' manifests and decides alike.

For one key: each participant describes its part in a `Header`. The lowest participant of each role, its leader,
collects them into a `Manifest`. The two leaders swap manifests, and hand both to their own sides.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import overload

from pydantic import TypeAdapter

from grafter.errors import PairingError, ProtocolError
from grafter.pairing.decision import find_conflict, two_leaders
from grafter.pairing.manifest import Header, Manifest, Pair, StoreKeys, manifest_text, store_keys
from grafter.points import PointKey
from grafter.rendezvous.courier import Courier
from grafter.rendezvous.roster import Roster
from grafter.rendezvous.store import StoreClient
from grafter.rendezvous.wire import read_message
from grafter.watching.housekeeping import Housekeeping
from grafter.watching.waits import Wait

# How long a leader waits for the other to write first. A wait in the store costs more, but finds any leader.
_PATIENCE_SECONDS = 0.01
_MOST_REMEMBERED = 4096
_MANIFESTS = TypeAdapter(tuple[Manifest, Manifest])


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
        # What this rank has put into the store for the point under way.
        self._left_in_store: list[str] = []

    def meet(self, key: PointKey, header: Header) -> Pair:
        """Wait for all participants of both sides. Raises what ended the run, if something does."""
        # Before anything is offered: once the run is over, the other side must not take this for a point to come.
        self._housekeeping.check()
        keys = store_keys(self._hall, key.digest)
        leader = min(header.participants)
        if header.role_rank == leader:
            pair = self._meet_other_leader(key, header, self._collect(key, header, keys), keys)
        else:
            own = keys.header(header.role, header.role_rank)
            self._bring([self._roster.graft_rank(header.role, leader)], own, "header", header.text)
            payload = self._wait_for(key, header, [keys.pair(header.role)], by_mail=self._courier.mail_inside)[0]
            pair = self._read_pair(payload)
        if "checked" not in pair.memo:
            self._check(key, pair)
        return pair

    def is_asked_by_mail(self, digest: str) -> bool:
        """Whether the other side's leader has come to a point that this one has not. Never waits."""
        return self._courier.mail_across and self._courier.has(store_keys(self._hall, digest).second)

    def is_asked_in_store(self, digest: str) -> bool:
        """The same, of a leader that does not know yet whom to write to. One round trip."""
        return self._client.exists(store_keys(self._hall, digest).first)

    def _read_pair(self, text: str) -> Pair:
        """Both manifests from `[baseline's,target's]`. The same text gives the same object, with what it remembers."""
        pair = self._pairs.get(text)
        if pair is None:
            pair = Pair(*read_message(_MANIFESTS.validate_json, text, "a pair of manifests"))
            if len(self._pairs) >= _MOST_REMEMBERED:
                self._pairs.clear()
            self._pairs[text] = pair
        return pair

    def _bring(self, receivers: Sequence[int], place: str, kind: str, payload: str) -> None:
        self._courier.bring(receivers, place, kind, payload, by_mail=self._courier.mail_inside)

    @overload
    def _wait_for(self, key: PointKey, header: Header, places: Sequence[str], *, by_mail: bool) -> list[str]: ...
    @overload
    def _wait_for(
        self, key: PointKey, header: Header, places: Sequence[str], *, by_mail: bool, patience: float
    ) -> list[str] | None: ...
    def _wait_for(
        self, key: PointKey, header: Header, places: Sequence[str], *, by_mail: bool, patience: float | None = None
    ) -> list[str] | None:
        wait = Wait(
            "pairing",
            key,
            self._timeout,
            leader=header.role_rank == min(header.participants),
            digest=key.digest,
            participants=header.participants,
            call_site=header.call_site,
        )
        fetched = self._courier.fetch(wait, places, by_mail=by_mail, patience=patience)
        return [sealed.payload for sealed in fetched] if fetched is not None else None

    def _collect(self, key: PointKey, header: Header, keys: StoreKeys) -> str:
        """The leader's part: its own role's headers, checked against each other, as the text of a manifest."""
        places = [keys.header(header.role, rank) for rank in header.participants if rank != header.role_rank]
        if not places:
            return manifest_text(header.role, [header.text], None)
        texts = (header.text, *self._wait_for(key, header, places, by_mail=self._courier.mail_inside))
        manifest = self._manifests.get(texts)
        if manifest is None:
            headers = [read_message(Header.model_validate_json, text, "a header") for text in texts[1:]]
            manifest = manifest_text(header.role, texts, find_conflict([header, *headers]))
            if len(self._manifests) >= _MOST_REMEMBERED:
                self._manifests.clear()
            self._manifests[texts] = manifest
        return manifest

    def _meet_other_leader(self, key: PointKey, header: Header, mine: str, keys: StoreKeys) -> Pair:
        """The leaders' part: each gets the other's manifest, and hands both to its own side."""
        told: int | None = None
        if self._courier.mail_across:
            theirs, told = self._swap_by_mail(key, header, mine, keys)
        else:
            theirs = self._swap_in_store(key, header, mine, keys)
        text = f"[{mine},{theirs}]" if header.role == "baseline" else f"[{theirs},{mine}]"
        if len(header.participants) > 1:
            others = [self._roster.graft_rank(header.role, r) for r in header.participants if r != header.role_rank]
            self._bring(others, keys.pair(header.role), "pair", text)
        pair = self._read_pair(text)
        if self._courier.mail_across:
            self._answer(header, pair.target if header.role == "baseline" else pair.baseline, mine, keys, told)
        return pair

    def _swap_in_store(self, key: PointKey, header: Header, mine: str, keys: StoreKeys) -> str:
        found = self._client.put_if_absent(keys.first, "manifest", mine)
        if found is not None:
            self._client.set(keys.second, "manifest", mine)
            self._left_in_store.append(keys.second)
            return found.payload
        self._left_in_store.append(keys.first)
        return self._wait_for(key, header, [keys.second], by_mail=False)[0]

    def _swap_by_mail(self, key: PointKey, header: Header, mine: str, keys: StoreKeys) -> tuple[str, int | None]:
        """(their manifest, the graft rank that was written to).

        Write to the leader that these participants met last time; it has usually written, too.

        Where that was the wrong one, or there was no last time, the store brings the two together: whoever comes second
        there finds the first, and writes to it. A manifest is the same whichever way it comes.
        """
        told = self._last_other_leader.get(header.participants)
        other = None
        if told is not None:
            self._courier.bring([told], keys.second, "manifest", mine, by_mail=True)
            other = self._wait_for(key, header, [keys.second], by_mail=True, patience=_PATIENCE_SECONDS)
        if other is None:
            found = self._client.put_if_absent(keys.first, "manifest", mine)
            if found is not None:
                other = [found.payload]
                self._courier.discard(keys.second)
            else:
                self._left_in_store.append(keys.first)
                other = self._wait_for(key, header, [keys.second], by_mail=True)
        return other[0], told

    def _answer(self, header: Header, other: Manifest, mine: str, keys: StoreKeys, told: int | None) -> None:
        """Write to the leader that was met, unless that was done already, and write to it first next time."""
        leader = self._roster.graft_rank(other.role, other.headers[0].role_rank)
        if leader != told:
            if told is not None:
                self._courier.recall(told, keys.second)
            self._courier.bring([leader], keys.second, "manifest", mine, by_mail=True)
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
