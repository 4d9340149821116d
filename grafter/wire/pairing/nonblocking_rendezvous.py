"""The rendezvous of a point for a side that does not wait for the other (`wait="job"`).

It uses the store key at which the first of two waiting leaders leaves its manifest. Senders that do not wait post their
manifest there and continue. Receivers that do not wait take what is posted, or leave a tombstone that says that they
were there (`grafter.wire.outbox`).
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
from grafter.wire.monitor.monitor_thread import MonitorThread
from grafter.wire.outbox.entries import Claims, Tombstones
from grafter.wire.pairing.manifest_cache import ManifestCache, ManifestChecks, read_header
from grafter.wire.rendezvous.message_router import MessageRouter
from grafter.wire.store_client import StoreClient

# The kind of what a waiting leader leaves there.
MANIFEST = "manifest"


class NonblockingRendezvous:
    """The steps of a leader whose side does not wait, or whose other side does not. One per rank, used by its dump
    thread once it has its side's manifest.

    Its methods take a few round trips, and raise what has ended the run if a manifest is not valid.
    """

    def __init__(
        self,
        client: StoreClient,
        router: MessageRouter,
        monitor: MonitorThread,
        roster: Roster,
        cache: ManifestCache,
        checks: ManifestChecks,
    ) -> None:
        self._client, self._router, self._monitor, self._roster = client, router, monitor, roster
        self._cache, self._checks = cache, checks
        self.claims = Claims(client)
        self.tombstones = Tombstones(monitor.delete_later)

    def post(self, key: PointKey, header: Header, keys: StoreKeys, mine: str) -> tuple[str, str] | None:
        """Post the senders' manifest. Returns (state, reason) if the entry has ended already."""
        own = self._cache.manifest(mine)
        self._checks.check_own(key, own)
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
            # Another rank was here long before this one, and could not keep the entry for so long.
            self._post_at(key, header, keys, GONE, gone_text(ended.kind, ended.payload))
            return ended.kind, ended.payload
        missed = self._post_at(key, header, keys, POSTED, mine)
        if missed is None or len(header.participants) == 1:
            return missed
        found = self._client.exchange(keys.state, open_state(header.role, header.role_rank), *missed)
        return missed if found is None else (found.kind, found.payload)

    def _withdraw(self, key: PointKey, header: Header, keys: StoreKeys, state: str, reason: str) -> tuple[str, str]:
        """One rank of this side has no snapshot: post nothing, and end the entry. Returns its state and the reason."""
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
                self.tombstones.add(keys.first)
            return None
        self._checks.check_found(key, header, found)
        if found.kind == MISSED:
            self._monitor.delete_later([keys.first])
            receivers = read_header(found.payload)
            return MISSED, f"{receivers.who} had been here before, found nothing, and continued ({receivers.call_site})"
        if found.kind == MANIFEST:
            self._answer_waiting_leader(found.payload, keys, kind, text)
        return None

    def find_early(self, mine: str) -> Header | None:
        """The header of a rank of this side that was here before both jobs had joined, and has continued."""
        # Within a string of JSON the quotes would be escaped.
        if '"early":true' not in mine:
            return None
        return next((own for own in self._cache.manifest(mine).headers if own.early), None)

    def pass_over(self, key: PointKey, header: Header, keys: StoreKeys, early: Header) -> NotMet:
        """One rank of this side has continued, so no rank of it takes the point, whatever was posted."""
        reason = f"{early.who} was here before both jobs had joined, and continued ({early.call_site})"
        found = self._put_missed(header, keys)
        if found is not None:
            self._checks.check_found(key, header, found)
            if found.kind == MANIFEST:
                self._answer_waiting_leader(found.payload, keys, MISSED, _missed_text(header))
            elif found.kind == POSTED:
                sender = self._cache.manifest(found.payload).headers[0]
                self._client.exchange(keys.state, open_state(sender.role, sender.role_rank), MISSED, reason)
            if found.kind != MANIFEST:
                # The second side at a point deletes what the first has left for it.
                self._monitor.delete_later([keys.first])
        return NotMet("missed", reason)

    def give_up(self, header: Header, keys: StoreKeys, mine: str) -> None:
        """The receivers do not wait here any more: replace their manifest by a tombstone for the senders."""
        manifest = Sealed(MANIFEST, self._client.seal.writer, mine)
        if self._client.exchange(keys.first, manifest, MISSED, _missed_text(header)) is None:
            self.tombstones.add(keys.first)

    def look(self, header: Header, keys: StoreKeys) -> Sealed | None:
        """What the senders have left, or a tombstone put by this rank. None: they wait here, or write now."""
        if self._router.channels_between_jobs and self._router.has(keys.second):
            return None
        found = self._put_missed(header, keys)
        if found is None:
            return Sealed(MISSED, self._client.seal.writer, "")
        return None if found.kind == MANIFEST else found

    def meet(self, key: PointKey, header: Header, keys: StoreKeys, theirs: Sealed, text: str) -> Pair | NotMet:
        """One side does not wait: claim the senders' entry for all receivers, or return why there is none.

        text: of the pair, if `theirs` is what the senders have posted.
        """
        if theirs.payload:
            self._checks.check_found(key, header, theirs)
        if theirs.kind != POSTED:
            return self._why_not_met(header, keys, theirs)
        pair = self._cache.pair(text)
        if "checked" not in pair.memo:
            self._checks.check_pair(key, pair)
        receivers = [self._roster.graft_rank(header.role, rank) for rank in header.participants]
        sender = pair.side(sender_role(header.direction)).headers[0]
        posted = open_state(sender.role, sender.role_rank)
        return self.claims.claim(keys, key.digest, posted, receivers) or pair

    def _why_not_met(self, header: Header, keys: StoreKeys, theirs: Sealed) -> NotMet:
        if theirs.kind == MISSED and not theirs.payload:
            return NotMet("missed", f"the {sender_role(header.direction)} had posted nothing when this side came")
        # The second side at a point deletes the tombstone that the first has left for it.
        self._monitor.delete_later([keys.first])
        if theirs.kind == MISSED:
            came = read_header(theirs.payload)
            reason = f"{came.who} was here before, found nothing posted, and continued ({came.call_site})"
            return NotMet("missed", reason)
        if theirs.kind == GONE:
            return receivers_account(*theirs.payload.partition("\n")[::2])
        raise ProtocolError(
            f"{theirs.kind[:40]!r} is where the senders' manifest should be; both jobs need the same grafter."
        )

    def _put_missed(self, header: Header, keys: StoreKeys) -> Sealed | None:
        """Leave a tombstone that says that the receivers were here, or return what is there already."""
        found = self._client.put_if_absent(keys.first, MISSED, _missed_text(header))
        if found is None:
            self.tombstones.add(keys.first)
        return found

    def _answer_waiting_leader(self, manifest: str, keys: StoreKeys, kind: str, text: str) -> None:
        """Send this to the leader of the other side, which waits here with this manifest."""
        waiting = self._cache.manifest(manifest).headers[0]
        leader = self._roster.graft_rank(waiting.role, waiting.role_rank)
        if self._router.channels_between_jobs:
            # Discard what that leader may have written to this rank before it looked in the store.
            self._router.look(keys.second)
        self._router.send([leader], keys.second, kind, text, by_channel=self._router.channels_between_jobs)


def _missed_text(header: Header) -> str:
    """The payload of the tombstone of receivers that continue."""
    return Header(
        role=header.role, role_rank=header.role_rank, participants=header.participants, direction=header.direction,
        call_site=header.call_site, wait=header.wait,
    ).text  # fmt: skip
