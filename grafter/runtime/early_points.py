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

from grafter.config.options import PointOptions
from grafter.core.messages.counts import Pending
from grafter.core.messages.manifest import Header
from grafter.core.messages.offer import Offer
from grafter.core.messages.participants import own_participants
from grafter.core.points import FORWARD, PointKey
from grafter.core.processes import is_from_signal_handler
from grafter.core.records import PointOutcome
from grafter.core.roles import Direction, RankIdentity, sender_role
from grafter.core.untraced import unobserved
from grafter.runtime.meeting import Meeting
from grafter.runtime.offer import OfferMaker
from grafter.runtime.posting import Posting
from grafter.runtime.recompute.recompute import Recomputations
from grafter.runtime.session import Session
from grafter.wire.outbox.keeping import keep
from grafter.wire.outbox.memory import Memory, Slot

logger = logging.getLogger("grafter")

# So many values are kept, whatever their size; and so many points in all, of a kilobyte each: the other job may need
# half an hour. A rank that forgot a point would be waited for by one that did not, so most are never forgotten.
_MOST_KEPT = 16384
_MOST_POINTS = 1 << 18


@dataclass(eq=False)
class EarlyPoint:
    """One that is to be made up for. slot: where a sender's snapshot lies. options: without its tensors."""

    key: PointKey
    direction: Direction
    header: Header
    options: PointOptions
    tags: dict[str, Any]
    module: str | None
    is_sent: bool
    slot: Slot | None = None
    nbytes: int = 0

    def hold(self, session: Session, participants: Sequence[int], sequence: int) -> PointOutcome:
        """Post it, or say that it is missed. Waits for ranks of the own job alone. Raises what ended the run."""
        named = {**self.tags, "name": self.key.name, "step": self.key.step, "phase": self.key.phase}
        header = self.header.changed(participants=tuple(participants))
        if not self.is_sent:
            return Meeting(session, self.key, self.direction, header, self.options, named).hold(
                None, [], "off", sequence
            )[1]
        one_sided = self.options.one_sided == "skip"
        posting = Posting(session, self.key, self.direction, named, one_sided=one_sided)
        return posting.post(header.changed(outbox=posting.place_of(self.slot)), self.slot, self.nbytes, sequence)


class EarlyPoints:
    """One rank's. Used under the lock of its points."""

    def __init__(self, place: RankIdentity, offers: OfferMaker, recomputations: Recomputations, memory: Memory) -> None:
        """memory: the outbox's, which has it to itself once both jobs have joined."""
        self._place, self._offers, self._recomputations, self.memory = place, offers, recomputations, memory
        # Oldest first: all of them, and those of which a value is kept.
        self.points: deque[EarlyPoint] = deque()
        self._kept: deque[EarlyPoint] = deque()
        # Of those that nobody will hear of, by what became of them.
        self.forgotten: Counter[PointOutcome] = Counter()

    @property
    def pending(self) -> Pending:
        # A copy, since another thread may ask.
        kept = self._kept.copy()
        return Pending(len(kept), sum(point.nbytes for point in kept), len(kept))

    def add(
        self,
        key: PointKey,
        direction: Direction,
        offer: Offer,
        options: PointOptions,
        tags: dict[str, Any],
        site: str,
        module: str | None,
    ) -> PointOutcome:
        """Keep a point, of which the value may be changed once this returns. `posted` or `missed`."""
        if options.ranks is not None:
            # Now: a process group may be gone by then.
            options = replace(options, ranks=own_participants(self._place, options.ranks))
        is_sent = self._place.role == sender_role(direction)
        with unobserved():
            kept = keep(offer if is_sent else Offer(None), self._make_room, self._give_back)
        header = self._offers.describe(
            None, kept.offer, options, direction, site, kept.slot.place if kept.slot is not None else None,
            early=not is_sent,
        )  # fmt: skip
        if key.phase == FORWARD:
            self._recomputations.keep(key, options, None, None)
        options = replace(options, extras=None, tokens=None)
        point = EarlyPoint(key, direction, header, options, tags, module, is_sent, kept.slot, kept.nbytes)
        self.points.append(point)
        if is_sent:
            self._kept.append(point)
            if len(self._kept) > _MOST_KEPT:
                self._displace()
        if len(self.points) > _MOST_POINTS:
            self._forget_oldest()
        return "posted" if is_sent else "missed"

    def next(self) -> EarlyPoint | None:
        """The oldest, taken out: it is to be held, or given up."""
        if not self.points:
            return None
        point = self.points.popleft()
        if self._kept and self._kept[0] is point:
            self._kept.popleft()
        return point

    def _forget_oldest(self) -> None:
        oldest = self.next()
        assert oldest is not None
        if not self.forgotten:
            logger.warning(
                "grafter: %s comes to more than %d points before the other job has joined; the oldest are counted in "
                "its summary, and nobody will hear of them, of %s first", self._place.who, _MOST_POINTS, oldest.key,
            )  # fmt: skip
        self._forget(oldest, "displaced")

    def give_up(self, point: EarlyPoint) -> None:
        """It meets nobody."""
        self._give_back(point.slot)

    def give_up_all(self) -> None:
        """The run ends for this rank before they could be made up for."""
        while (point := self.next()) is not None:
            self._forget(point, "expired")

    def _forget(self, point: EarlyPoint, sent: PointOutcome) -> None:
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
                if is_from_signal_handler(error):
                    raise
                return None, f"{nbytes} bytes cannot be had for the outbox: {error}"
            if slot is not None:
                return slot, None
            if not self._kept:
                return None, f"the outbox has no room for {nbytes} bytes (GRAFTER_OUTBOX_BYTES)"
            self._displace()
        return None, None

    def _displace(self) -> None:
        """Of the oldest whose value is kept, only that it came."""
        point = self._kept.popleft()
        self._give_back(point.slot)
        point.slot, point.nbytes = None, 0
        point.header = self._offers.describe(
            None, Offer(None), point.options, point.direction, point.header.call_site, early=True
        )

    def _give_back(self, slot: Slot | None) -> None:
        if slot is not None:
            self.memory.give_back(slot)
