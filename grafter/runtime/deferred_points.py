"""Points that do not wait for the other job: posted, or deferred until both jobs have joined.

posted      a sender's value is snapshotted into the outbox, and its header goes to the leader          (`PointPosting`)
deferred    before both have joined: a sender's value is snapshotted, a receiver keeps its own        (`DeferredPoints`)
            after that, in their order: each is posted, or reported as missed                          (`DeferredPoint`)

So the ranks of one job decide alike, whichever of them had joined when it reached the point, and the other job learns
of each.
"""

from __future__ import annotations

import logging
import time
from collections import Counter, deque
from collections.abc import Sequence
from dataclasses import dataclass, replace

from grafter.core.messages.counts import Pending
from grafter.core.messages.local_value import LocalValue
from grafter.core.messages.manifest import Header, store_keys
from grafter.core.messages.participants import own_participants
from grafter.core.messages.states import OutboxPlace, open_state
from grafter.core.points import FORWARD
from grafter.core.processes import is_from_signal_handler
from grafter.core.records import LedgerRecord, PointOutcome
from grafter.core.roles import sender_role
from grafter.core.untraced import unobserved
from grafter.runtime.point_preparation import Point, PointPreparer, PointTools
from grafter.runtime.point_receiver import ReceivedPoint
from grafter.runtime.rank_context import RankContext
from grafter.runtime.session import Session
from grafter.wire.outbox.entries import OutboxEntry
from grafter.wire.outbox.snapshots import Memory, Slot, take_snapshot

logger = logging.getLogger("grafter")

# How many values are kept, whatever their size; and how many points in all, of a kilobyte each: the other job may need
# half an hour. A rank that forgot a point would be waited for by one that did not, so most are never forgotten.
_MOST_KEPT = 16384
_MOST_POINTS = 1 << 18


class PointPosting:
    """One point on one sender that does not wait, from the snapshot to its line in the ledger."""

    def __init__(self, session: Session, point: Point, sequence: int, *, is_kept: bool = False) -> None:
        """sequence: the number of the line in the ledger. is_kept: until all have reached the point or ended its step,
        for receivers that wait; else as the outbox's settings say."""
        assert point.direction is not None
        self._session, self._point, self._direction = session, point, point.direction
        self._sequence, self._is_kept = sequence, is_kept
        self._seconds: dict[str, float] = {}

    def run(self, local: LocalValue, preparer: PointPreparer) -> PointOutcome:
        """`posted`, or the outcome if there is one at once. Waits for ranks of its own job alone, and only where this
        one leads.

        Raises what ended the run.
        """
        session, started = self._session, time.perf_counter()
        # Before memory is taken, which may be a receiver's to read until the run is over.
        session.monitor.check()
        outbox = session.outbox

        def make_room(nbytes: int) -> tuple[Slot | None, str | None]:
            return outbox.make_room(nbytes, session.client, patient=self._is_kept)

        kept = take_snapshot(local, make_room, outbox.give_back)
        self._seconds["snapshot"] = time.perf_counter() - started
        header = preparer.build_header(session, self._point, kept.offer, self.place_of(kept.slot))
        return self.post(header, kept.slot, kept.nbytes)

    def post(self, header: Header, slot: Slot | None, nbytes: int) -> PointOutcome:
        """The same, from what is in the outbox already. header: with its `place_of`."""
        session, started = self._session, time.perf_counter()
        place, roster = session.place, session.roster
        key, options = self._point.key, self._point.options
        participants = tuple(roster.graft_rank(place.role, rank) for rank in header.participants)
        keys = store_keys(session.run_prefix, key.digest)
        posted = open_state(place.role, min(header.participants))
        step = key.step if self._is_kept else None
        entry = OutboxEntry(keys, posted, self._direction, participants, slot, nbytes, step)
        session.outbox.add(entry)
        try:
            ended = session.pairing.post(key, header, one_sided=options.one_sided == "skip")
        except BaseException as error:
            session.outbox.drop(entry, f"{header.who} left with {type(error).__name__}")
            raise
        entry.is_announced = True
        if ended is not None:
            state, reason = ended
            session.outbox.ended(entry, session.client, state, reason)
        self._seconds["pairing"] = time.perf_counter() - started
        return session.outbox.recorded(entry, self._record(header))

    def place_of(self, slot: Slot | None) -> OutboxPlace | None:
        """Where receivers find a snapshot."""
        delivery = self._session.delivery
        if slot is None or delivery is None:
            return slot.place if slot is not None else None
        return slot.place.model_copy(update={"address": delivery.address, "port": delivery.port})

    def _record(self, header: Header) -> LedgerRecord:
        key, place = self._point.key, self._session.place
        return LedgerRecord(
            sequence=self._sequence, time=time.time(), name=key.name, tags=self._point.tags, step=key.step,
            phase=key.phase, occurrence=key.occurrence, direction=self._direction, role=place.role,
            role_rank=place.role_rank, outcome="posted", call_site=header.call_site,
            participants={"baseline": [], "target": [], place.role: list(header.participants)},
            seconds=self._seconds,
        )  # fmt: skip


@dataclass(eq=False)
class DeferredPoint:
    """One point that is deferred. slot: where a sender's snapshot lies. point: its options are without tensors."""

    point: Point
    header: Header
    is_sent: bool
    slot: Slot | None = None
    nbytes: int = 0

    def run(self, session: Session, participants: Sequence[int], sequence: int) -> PointOutcome:
        """Post it, or report it as missed. Waits for ranks of its own job alone. Raises what ended the run."""
        header = self.header.changed(participants=tuple(participants))
        if not self.is_sent:
            return ReceivedPoint(session, self.point, header, sequence, "off").run(None, [])[1]
        posting = PointPosting(session, self.point, sequence)
        return posting.post(header.changed(outbox=posting.place_of(self.slot)), self.slot, self.nbytes)


class DeferredPoints:
    """The points of one rank that are deferred until both jobs have joined. Used under the lock of its points."""

    def __init__(self, context: RankContext, tools: PointTools, memory: Memory) -> None:
        """memory: the outbox's, which has it to itself once both jobs have joined."""
        self._place, self._preparer, self._recomputations = context.place, tools.preparer, tools.recomputations
        self.memory = memory
        # Oldest first: all of them, and those of which a value is kept.
        self.points: deque[DeferredPoint] = deque()
        self._kept: deque[DeferredPoint] = deque()
        # The number of those of which the other job will not learn, by their outcome.
        self.forgotten: Counter[PointOutcome] = Counter()

    @property
    def pending(self) -> Pending:
        """The values that are kept. Called on any thread."""
        kept = self._kept.copy()
        return Pending(len(kept), sum(point.nbytes for point in kept), len(kept))

    def add(self, point: Point, local: LocalValue) -> PointOutcome:
        """Defer a point, of which the value may be changed once this returns. `posted` or `missed`."""
        assert point.direction is not None
        options = point.options
        if options.ranks is not None:
            # Now, since a process group may be gone when both have joined.
            options = replace(options, ranks=own_participants(self._place, options.ranks))
        is_sent = self._place.role == sender_role(point.direction)
        with unobserved():
            kept = take_snapshot(local if is_sent else LocalValue(None), self._make_room, self._give_back)
        place = kept.slot.place if kept.slot is not None else None
        header = self._preparer.build_header(
            None, point._replace(options=options), kept.offer, place, early=not is_sent
        )
        if point.key.phase == FORWARD:
            self._recomputations.keep(point.key, options, None, None)
        point = point._replace(options=replace(options, extras=None, tokens=None))
        deferred = DeferredPoint(point, header, is_sent, kept.slot, kept.nbytes)
        self.points.append(deferred)
        if is_sent:
            self._kept.append(deferred)
            if len(self._kept) > _MOST_KEPT:
                self._displace()
        if len(self.points) > _MOST_POINTS:
            self._forget_oldest()
        return "posted" if is_sent else "missed"

    def next(self) -> DeferredPoint | None:
        """Take out the oldest, which is to be run or given up."""
        if not self.points:
            return None
        deferred = self.points.popleft()
        if self._kept and self._kept[0] is deferred:
            self._kept.popleft()
        return deferred

    def _forget_oldest(self) -> None:
        oldest = self.next()
        assert oldest is not None
        if not self.forgotten:
            logger.warning(
                "grafter: %s reaches more than %d points before the other job has joined; the oldest are counted in "
                "its summary, and the other job does not learn of them, of %s first",
                self._place.who, _MOST_POINTS, oldest.point.key,
            )  # fmt: skip
        self._forget(oldest, "displaced")

    def give_up(self, deferred: DeferredPoint) -> None:
        """It is not run."""
        self._give_back(deferred.slot)

    def give_up_all(self) -> None:
        """The run ends for this rank before both have joined."""
        while (deferred := self.next()) is not None:
            self._forget(deferred, "expired")

    def _forget(self, deferred: DeferredPoint, sent: PointOutcome) -> None:
        self.give_up(deferred)
        self.forgotten[sent if deferred.is_sent else "missed"] += 1

    def _make_room(self, nbytes: int) -> tuple[Slot | None, str | None]:
        """Like `Outbox.make_room`, while there is no one to agree with: the oldest values make room."""
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
        """Drop the oldest value; that its point was reached is still reported."""
        oldest = self._kept.popleft()
        self._give_back(oldest.slot)
        oldest.slot, oldest.nbytes = None, 0
        oldest.header = self._preparer.build_header(None, oldest.point, LocalValue(None), early=True)

    def _give_back(self, slot: Slot | None) -> None:
        if slot is not None:
            self.memory.give_back(slot)
