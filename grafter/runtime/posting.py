"""Posting: the point of a sender that does not wait. Snapshot, header to the leader, a line in the ledger."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

from grafter.core.messages.manifest import Header, store_keys
from grafter.core.messages.offer import Offer
from grafter.core.messages.states import OutboxPlace, open_state
from grafter.core.points import PointKey
from grafter.core.records import LedgerRecord, PointOutcome
from grafter.core.roles import Direction
from grafter.runtime.session import Session
from grafter.wire.outbox.entries import Entry
from grafter.wire.outbox.keeping import keep
from grafter.wire.outbox.memory import Slot

Describe = Callable[[Offer, OutboxPlace | None], Header]


class Posting:
    """One point on one sender, from the snapshot to its line in the ledger. Called by the dump thread."""

    def __init__(
        self,
        session: Session,
        key: PointKey,
        direction: Direction,
        tags: dict[str, Any],
        *,
        one_sided: bool = False,
        is_kept: bool = False,
    ) -> None:
        """one_sided: it is skipped where not all come to it in its step. is_kept: until then, for receivers that wait;
        else as the outbox's settings say."""
        self._one_sided, self._is_kept = one_sided, is_kept
        self.session, self.key, self.direction, self._tags = session, key, direction, tags
        self._seconds: dict[str, float] = {}

    def hold(self, offer: Offer, describe: Describe, sequence: int) -> PointOutcome:
        """`posted`, or what became of it at once. Waits for ranks of the own job alone, and only where this one leads.

        describe: makes the header of an offer that lies in the outbox, or nowhere.

        Raises what ended the run.
        """
        session, started = self.session, time.perf_counter()
        # Before memory is taken, which may be a receiver's to read until the run is over.
        session.housekeeping.check()
        outbox = session.outbox

        def make_room(nbytes: int) -> tuple[Slot | None, str | None]:
            return outbox.make_room(nbytes, session.client, patient=self._is_kept)

        kept = keep(offer, make_room, outbox.give_back)
        self._seconds["snapshot"] = time.perf_counter() - started
        header = describe(kept.offer, self.place_of(kept.slot))
        return self.post(header, kept.slot, kept.nbytes, sequence)

    def post(self, header: Header, slot: Slot | None, nbytes: int, sequence: int) -> PointOutcome:
        """The same, from what is in the outbox already. header: with its `place_of`."""
        session, started = self.session, time.perf_counter()
        place, roster = session.place, session.roster
        participants = tuple(roster.graft_rank(place.role, rank) for rank in header.participants)
        keys = store_keys(session.client.run_prefix, self.key.digest)
        posted = open_state(place.role, min(header.participants))
        step = self.key.step if self._is_kept else None
        entry = Entry(keys, posted, self.direction, participants, slot, nbytes, step)
        session.outbox.add(entry)
        try:
            ended = session.pairing.post(self.key, header, one_sided=self._one_sided)
        except BaseException as error:
            session.outbox.drop(entry, f"{header.who} left with {type(error).__name__}")
            raise
        entry.is_told = True
        if ended is not None:
            state, reason = ended
            session.outbox.ended(entry, session.client, state, reason)
        self._seconds["pairing"] = time.perf_counter() - started
        return session.outbox.recorded(entry, self._record(header, sequence))

    def place_of(self, slot: Slot | None) -> OutboxPlace | None:
        """Where receivers find a snapshot."""
        delivery = self.session.delivery
        if slot is None or delivery is None:
            return slot.place if slot is not None else None
        return slot.place.model_copy(update={"address": delivery.address, "port": delivery.port})

    def _record(self, header: Header, sequence: int) -> LedgerRecord:
        key, place = self.key, self.session.place
        return LedgerRecord(
            sequence=sequence, time=time.time(), name=key.name,
            tags={tag: value for tag, value in self._tags.items() if tag not in ("name", "step", "phase")},
            step=key.step, phase=key.phase, occurrence=key.occurrence, direction=self.direction, role=place.role,
            role_rank=place.role_rank, outcome="posted", call_site=header.call_site,
            participants={"baseline": [], "target": [], place.role: list(header.participants)},
            seconds=self._seconds,
        )  # fmt: skip
