"""Meetings: one rank's, numbered in their order, with what became of each in its ledger and its tally.

meet              now: both sides are there, or this one sends and does not wait
make_up           the early points, once both jobs have joined
record_skipped    no rank of the other job has the module
"""

from __future__ import annotations

import time
from dataclasses import replace
from typing import Any, Literal

from grafter.config.options import PointOptions
from grafter.core.messages.manifest import Header
from grafter.core.messages.offer import Offer
from grafter.core.messages.participants import own_participants
from grafter.core.messages.roster import other_role
from grafter.core.messages.states import OutboxPlace
from grafter.core.points import PHASE, PointKey
from grafter.core.records import LedgerRecord
from grafter.core.roles import Direction, Place
from grafter.core.untraced import unobserved
from grafter.runtime.early_points import EarlyPoints
from grafter.runtime.meeting import Meeting
from grafter.runtime.offer import OfferMaker
from grafter.runtime.posting import Posting
from grafter.runtime.rank_summary import Tally
from grafter.runtime.recompute.recompute import Recomputations
from grafter.runtime.session import Session
from grafter.store.dumps.pending_record import PendingRecord
from grafter.store.dumps.rank_dumps import RankDumps


class Meetings:
    """Of one rank. Used under the lock of its points."""

    def __init__(
        self,
        place: Place,
        offers: OfferMaker,
        dumps: RankDumps,
        recomputations: Recomputations,
        tally: Tally,
        stats: Literal["full", "light", "off"],
        says_steps: bool,
    ) -> None:
        """stats: how much is measured of each. says_steps: whether points may be one-sided."""
        self.says_steps = says_steps
        self._place, self._offers, self._dumps, self._recomputations = place, offers, dumps, recomputations
        self._tally, self.stats = tally, stats
        self._sequence = 0

    def meet(
        self,
        session: Session,
        key: PointKey,
        direction: Direction,
        offer: Offer,
        options: PointOptions,
        tags: dict[str, Any],
        site: str,
        taken: PendingRecord | None = None,
    ) -> Any:
        """Meet the other side at one point; what `dump` returns. taken: the point as it is saved, where it is."""
        named = {**tags, "name": key.name, "step": key.step, "phase": key.phase}
        self._sequence += 1
        if options.is_posted(session.place.role, direction):
            one_sided = options.one_sided == "skip"
            posting = Posting(
                session, key, direction, named, one_sided=one_sided, is_kept=one_sided and options.wait == "both"
            )
            return self._post(posting, offer, replace(options, wait="job"), site, taken)
        header = self._offers.describe(session, offer, options, direction, site)
        meeting = Meeting(session, key, direction, header, options, named)
        try:
            with unobserved():
                grafted, outcome = meeting.hold(offer.leaves, offer.extras, self.stats, self._sequence)
        except BaseException as error:
            self._dumps.finish_failed(taken, error)
            raise
        self._dumps.finish(taken, outcome, grafted)
        if options.new_rows_only and meeting.rows is not None and outcome in ("grafted", "compared", "sent"):
            self._offers.windows.advance(key, meeting.rows.reached(header))
        if key.phase == PHASE:
            self._recomputations.keep(key, options, offer.leaves if outcome == "grafted" else None, grafted)
        self._tally.outcomes[outcome] += 1
        session.housekeeping.board.last_points.append((key, outcome))
        return grafted

    def _post(
        self, posting: Posting, offer: Offer, options: PointOptions, site: str, taken: PendingRecord | None
    ) -> Any:
        """The part of a sender that does not wait; what `dump` returns: the value."""

        def describe(told: Offer, place: OutboxPlace | None) -> Header:
            return self._offers.describe(posting.session, told, options, posting.direction, site, place)

        try:
            with unobserved():
                outcome = posting.hold(offer, describe, self._sequence)
        except BaseException as error:
            self._dumps.finish_failed(taken, error)
            raise
        self._dumps.finish(taken, outcome)
        if posting.key.phase == PHASE:
            self._recomputations.keep(posting.key, options, None, None)
        self._tally.outcomes[outcome] += 1
        posting.session.housekeeping.board.last_points.append((posting.key, outcome))
        return offer.value

    def say_step(self, session: Session, step: int) -> None:
        """This rank has come to all points of the steps before `step`. Said only where points may be one-sided."""
        if self.says_steps:
            session.housekeeping.step_ends.say(session.client, step)

    def make_up(self, session: Session, early: EarlyPoints) -> None:
        """The points that came before both jobs had joined, in their order."""
        while (point := early.next()) is not None:
            options, missing = point.options, None
            if point.module is not None:
                options, missing = among_holders(session, point.module, options)
            if missing is not None:
                early.give_up(point)
                self.record_skipped(session, point.key, point.direction, point.tags, point.header.call_site, missing)
                continue
            self._sequence += 1
            with unobserved():
                outcome = point.hold(session, own_participants(self._place, options.ranks), self._sequence)
            self._tally.outcomes[outcome] += 1
            session.housekeeping.board.last_points.append((point.key, outcome))

    def record_skipped(
        self, session: Session, key: PointKey, direction: Direction, tags: dict[str, Any], site: str, reason: str
    ) -> None:
        """A point that cannot meet anybody is in the ledger, too."""
        self._sequence += 1
        self._tally.outcomes["skipped"] += 1
        session.write_line(
            LedgerRecord(
                sequence=self._sequence, time=time.time(), name=key.name, tags=tags, step=key.step, phase=key.phase,
                occurrence=key.occurrence, direction=direction, role=session.place.role,
                role_rank=session.place.role_rank, outcome="skipped", reason=reason, call_site=site, participants={},
            )
        )  # fmt: skip


def among_holders(session: Session, module: str, options: PointOptions) -> tuple[PointOptions, str | None]:
    """The participants are the ranks that have the module; and why the point is skipped, if that is so."""
    place, roster = session.place, session.roster
    own = roster.ranks_with(place.role, module)
    other = roster.ranks_with(other_role(place.role), module)
    if not own or other is None:
        return options, None
    if not other:
        return options, f"no rank of the {other_role(place.role)} has a module of this name"
    if options.ranks is None and len(own) < place.role_world_size:
        options = replace(options, ranks=own)
    return options, None
