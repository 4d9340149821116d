"""Early points: a rank that does not wait (`wait="job"`) comes to them before both jobs have joined.

at the call   a sender's value is snapshotted; a receiver goes on with its own              (`EarlyPoints.add`)
once joined   in their order, each is posted, or told to be missed, as if it came only now  (`EarlyPoint.hold`)

So the ranks of one job decide alike, whichever of them had joined when it came, and the other job hears of each.
"""

from __future__ import annotations

import logging
from collections import Counter, deque
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from grafter.backward.kept_writes import unobserved
from grafter.backward.recompute import Recomputations
from grafter.direction import Direction, sender_role
from grafter.ledger import Outcome
from grafter.meeting import Meeting
from grafter.offer import Offer, OfferMaker
from grafter.options import PointOptions
from grafter.outbox.counts import Pending
from grafter.outbox.keeping import keep
from grafter.outbox.memory import Memory, Slot
from grafter.outbox.posting import Posting
from grafter.pairing.manifest import Header
from grafter.pairing.participants import own_participants
from grafter.points import PHASE, PointKey
from grafter.rendezvous.join import Place
from grafter.session import Session

logger = logging.getLogger("grafter")

# Small ones take a kilobyte each, and the other job may not come for half an hour.
_MOST_POINTS = 16384


@dataclass(eq=False)
class EarlyPoint:
    """One that is to be made up for. slot: where a sender's snapshot lies. options: but for tensors of the call."""

    key: PointKey
    direction: Direction
    header: Header
    options: PointOptions
    tags: dict[str, Any]
    module: str | None
    is_sent: bool
    slot: Slot | None = None
    nbytes: int = 0

    def hold(self, session: Session, participants: Sequence[int], sequence: int) -> Outcome:
        """Post it, or say that it is missed. Waits for ranks of the own job alone. Raises what ended the run."""
        named = {**self.tags, "name": self.key.name, "step": self.key.step, "phase": self.key.phase}
        header = self.header.changed(participants=tuple(participants))
        if not self.is_sent:
            return Meeting(session, self.key, self.direction, header, self.options, named).hold(
                None, [], "off", sequence
            )[1]
        posting = Posting(session, self.key, self.direction, named)
        return posting.post(header.changed(outbox=posting.place_of(self.slot)), self.slot, self.nbytes, sequence)


class EarlyPoints:
    """One rank's. Used under the lock of its points."""

    def __init__(self, place: Place, offers: OfferMaker, recomputations: Recomputations, memory: Memory) -> None:
        """memory: the outbox's, which has it to itself once both jobs have joined."""
        self._place, self._offers, self._recomputations, self.memory = place, offers, recomputations, memory
        # Oldest first.
        self.points: deque[EarlyPoint] = deque()
        # Of those that nobody will hear of, by what became of them.
        self.forgotten: Counter[Outcome] = Counter()

    @property
    def pending(self) -> Pending:
        sent = [point for point in self.points if point.is_sent and not point.header.early]
        return Pending(len(sent), sum(point.nbytes for point in sent), len(sent))

    def add(
        self,
        key: PointKey,
        direction: Direction,
        offer: Offer,
        options: PointOptions,
        tags: dict[str, Any],
        site: str,
        module: str | None,
    ) -> Outcome:
        """Keep a point, of which the value may be changed once this returns. `posted` or `missed`."""
        own_participants(self._place, options.ranks)
        with unobserved():
            outcome = self._append(key, direction, offer, options, tags, site, module)
        if key.phase == PHASE:
            self._recomputations.keep(key, options, None, None)
        return outcome

    def _append(
        self,
        key: PointKey,
        direction: Direction,
        offer: Offer,
        options: PointOptions,
        tags: dict[str, Any],
        site: str,
        module: str | None,
    ) -> Outcome:
        is_sent = self._place.role == sender_role(direction)
        kept = keep(offer if is_sent else Offer(None), self._make_room, self._give_back)
        header = self._offers.describe(
            None, kept.offer, options, direction, site, kept.slot.place if kept.slot is not None else None,
            early=not is_sent,
        )  # fmt: skip
        options = replace(options, extras=None, tokens=None)
        self.points.append(EarlyPoint(key, direction, header, options, tags, module, is_sent, kept.slot, kept.nbytes))
        if len(self.points) > _MOST_POINTS:
            oldest = self.points.popleft()
            if not self.forgotten:
                logger.warning(
                    "grafter: %s comes to more than %d points before the other job has joined; the oldest are counted "
                    "in its summary, and nobody will hear of them, of %s first", self._place.who, _MOST_POINTS,
                    oldest.key,
                )  # fmt: skip
            self._forget(oldest, "displaced")
        return "posted" if is_sent else "missed"

    def next(self) -> EarlyPoint | None:
        """The oldest, taken out: it is to be held, or given up."""
        return self.points.popleft() if self.points else None

    def give_up(self, point: EarlyPoint) -> None:
        """It meets nobody."""
        self._give_back(point.slot)

    def give_up_all(self) -> None:
        """The run ends for this rank before they could be made up for."""
        while (point := self.next()) is not None:
            self._forget(point, "expired")

    def _forget(self, point: EarlyPoint, sent: Outcome) -> None:
        self.give_up(point)
        self.forgotten[sent if point.is_sent else "missed"] += 1

    def _make_room(self, nbytes: int) -> tuple[Slot | None, str | None]:
        """As `Outbox.make_room`, before there is anybody to agree with: the oldest make room."""
        limit = self.memory.limit_bytes
        if nbytes > limit:
            return None, f"{nbytes} bytes do not fit into an outbox of {limit} (GRAFTER_OUTBOX_BYTES)"
        while nbytes:
            try:
                slot = self.memory.take(nbytes)
            except (OSError, ValueError, OverflowError) as error:
                return None, f"{nbytes} bytes cannot be had for the outbox: {error}"
            if slot is not None:
                return slot, None
            oldest = next((point for point in self.points if point.slot is not None), None)
            if oldest is None:
                return None, f"the outbox has no room for {nbytes} bytes (GRAFTER_OUTBOX_BYTES)"
            self._displace(oldest)
        return None, None

    def _displace(self, point: EarlyPoint) -> None:
        self._give_back(point.slot)
        point.slot, point.nbytes = None, 0
        point.header = point.header.changed(outbox=None, early=True)

    def _give_back(self, slot: Slot | None) -> None:
        if slot is not None:
            self.memory.give_back(slot)
