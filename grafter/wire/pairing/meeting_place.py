"""The meeting place of a point, for a side that does not wait there (`wait="job"`).

It is the key of the store where the first of two leaders that wait leaves its manifest. Senders that do not wait post
there and go on; receivers take what is posted, or leave word that they were there (`grafter.wire.outbox`).
"""

from __future__ import annotations

from grafter.core.messages.manifest import Header, Pair, StoreKeys
from grafter.core.messages.roster import Roster
from grafter.core.messages.states import (
    DISPLACED,
    GONE,
    MISSED,
    OPEN,
    POSTED,
    WITHDRAWN,
    NotMet,
    gone_text,
    open_state,
    receivers_account,
)
from grafter.core.messages.wire import Sealed
from grafter.core.points import PointKey
from grafter.core.roles import sender_role
from grafter.errors import ProtocolError
from grafter.wire.monitor.housekeeping import Housekeeping
from grafter.wire.outbox.claims import Claims
from grafter.wire.outbox.tombstones import Tombstones
from grafter.wire.pairing.known_texts import KnownTexts, read_header
from grafter.wire.pairing.refusals import Refusals
from grafter.wire.rendezvous.courier import Courier
from grafter.wire.store_client import StoreClient

# What a leader that waits leaves there.
MANIFEST = "manifest"


class MeetingPlace:
    """Used by the leader of a side, once it has its side's manifest."""

    def __init__(
        self,
        client: StoreClient,
        courier: Courier,
        housekeeping: Housekeeping,
        roster: Roster,
        known: KnownTexts,
        refusals: Refusals,
    ) -> None:
        self._client, self._courier, self._housekeeping, self._roster = client, courier, housekeeping, roster
        self._known, self._refusals = known, refusals
        self.claims = Claims(client)
        self.words = Tombstones(housekeeping.delete_later)

    def post(self, key: PointKey, header: Header, keys: StoreKeys, mine: str) -> tuple[str, str] | None:
        """The senders' part. (state, reason) where the entry has ended already."""
        own = self._known.manifest(mine)
        self._refusals.check_own(key, own)
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
        self._refusals.check_found(key, header, found)
        if found.kind == MISSED:
            self._housekeeping.delete_later([keys.first])
            receivers = read_header(found.payload)
            return MISSED, f"{receivers.who} had been here before, found nothing, and went on ({receivers.call_site})"
        if found.kind == MANIFEST:
            self._tell_who_waits(found.payload, keys, kind, text)
        return None

    def find_early(self, mine: str) -> Header | None:
        """A rank of this side that came before both jobs had joined, and has gone on."""
        # Within a string of JSON the quotes would be escaped.
        if '"early":true' not in mine:
            return None
        return next((own for own in self._known.manifest(mine).headers if own.early), None)

    def pass_by(self, key: PointKey, header: Header, keys: StoreKeys, early: Header) -> NotMet:
        """One rank of this side has gone on, so nobody of it takes the point, whatever was posted."""
        reason = f"{early.who} was here before both jobs had joined, and went on ({early.call_site})"
        found = self._leave_word(header, keys)
        if found is not None:
            self._refusals.check_found(key, header, found)
            if found.kind == MANIFEST:
                self._tell_who_waits(found.payload, keys, MISSED, _word_of(header))
            elif found.kind == POSTED:
                sender = self._known.manifest(found.payload).headers[0]
                self._client.exchange(keys.state, open_state(sender.role, sender.role_rank), MISSED, reason)
            if found.kind != MANIFEST:
                # Whoever comes second removes what was left for it.
                self._housekeeping.delete_later([keys.first])
        return NotMet("missed", reason)

    def give_up(self, header: Header, keys: StoreKeys, mine: str) -> None:
        """The receivers do not wait here any more: in the place of their manifest is a word, for senders that come."""
        manifest = Sealed(MANIFEST, self._client.seal.writer, mine)
        if self._client.exchange(keys.first, manifest, MISSED, _word_of(header)) is None:
            self.words.left_at(keys.first)

    def look(self, header: Header, keys: StoreKeys) -> Sealed | None:
        """What the senders have left. Nothing: leave word. None: they wait here, or write now."""
        if self._courier.mail_across and self._courier.has(keys.second):
            return None
        found = self._leave_word(header, keys)
        if found is None:
            return Sealed(MISSED, self._client.seal.writer, "")
        return None if found.kind == MANIFEST else found

    def meet(self, key: PointKey, header: Header, keys: StoreKeys, theirs: Sealed, text: str) -> Pair | NotMet:
        """One side does not wait: the senders' entry is claimed for all receivers, or the two have not met.

        text: of the pair, where `theirs` is what the senders have posted.
        """
        if theirs.payload:
            self._refusals.check_found(key, header, theirs)
        if theirs.kind != POSTED:
            return self._why_not_met(header, keys, theirs)
        pair = self._known.pair(text)
        if "checked" not in pair.memo:
            self._refusals.check_pair(key, pair)
        receivers = [self._roster.graft_rank(header.role, rank) for rank in header.participants]
        sender = pair.side(sender_role(header.direction)).headers[0]
        posted = open_state(sender.role, sender.role_rank)
        return self.claims.claim(keys, key.digest, posted, receivers) or pair

    def _why_not_met(self, header: Header, keys: StoreKeys, theirs: Sealed) -> NotMet:
        if theirs.kind == MISSED and not theirs.payload:
            return NotMet("missed", f"the {sender_role(header.direction)} had posted nothing when this side came")
        # Whoever comes second removes the word that was left for it.
        self._housekeeping.delete_later([keys.first])
        if theirs.kind == MISSED:
            came = read_header(theirs.payload)
            return NotMet("missed", f"{came.who} was here before, found nothing posted, and went on ({came.call_site})")
        if theirs.kind == GONE:
            return receivers_account(*theirs.payload.partition("\n")[::2])
        raise ProtocolError(
            f"{theirs.kind[:40]!r} lies where the senders' manifest should; both jobs need one grafter."
        )

    def _leave_word(self, header: Header, keys: StoreKeys) -> Sealed | None:
        """That the receivers were here and have gone on, unless something lies there: then that."""
        found = self._client.put_if_absent(keys.first, MISSED, _word_of(header))
        if found is None:
            self.words.left_at(keys.first)
        return found

    def _tell_who_waits(self, manifest: str, keys: StoreKeys, kind: str, text: str) -> None:
        """The other side waits here, with this manifest."""
        waiting = self._known.manifest(manifest).headers[0]
        leader = self._roster.graft_rank(waiting.role, waiting.role_rank)
        if self._courier.mail_across:
            # It may have written here before it looked in the store.
            self._courier.look(keys.second)
        self._courier.bring([leader], keys.second, kind, text, by_mail=self._courier.mail_across)


def _word_of(header: Header) -> str:
    """What receivers leave when they go on."""
    return Header(
        role=header.role, role_rank=header.role_rank, participants=header.participants, direction=header.direction,
        call_site=header.call_site, wait=header.wait,
    ).text  # fmt: skip
