"""Departure: how one rank leaves its run. It ends its step, tells the other ranks, deletes what is its, and sums up."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass

from grafter.config.direction_filters import DirectionFilters
from grafter.config.settings.config import GrafterConfig
from grafter.core.roles import RankIdentity
from grafter.errors import RunError
from grafter.runtime.early_points import EarlyPoints
from grafter.runtime.entry import Entry
from grafter.runtime.gradients.points import BackwardPoints
from grafter.runtime.hooked_models import HookedModels
from grafter.runtime.meetings import Meetings
from grafter.runtime.rank_status import RankStatus
from grafter.runtime.rank_summary import Tally, last_error, say_goodbye, summarise
from grafter.runtime.session import Session
from grafter.store.dumps.rank_dumps import RankDumps
from grafter.wire.monitor.step_ends import LEFT


@dataclass(frozen=True)
class Departure:
    """Of one rank that has begun. filters: those in force at the end."""

    config: GrafterConfig
    place: RankIdentity
    rank_status: RankStatus
    entry: Entry
    models: HookedModels
    filters: DirectionFilters
    dumps: RankDumps
    gradients: BackwardPoints | None
    early: EarlyPoints
    meetings: Meetings
    tally: Tally

    def leave(self) -> None:
        """Called once, under the lock of the rank's points."""
        error = last_error(self.rank_status.fault)
        # First: whatever keeps this rank from leaving, what it dumped is on disk.
        self.dumps.flush()
        session = self.entry.finished(patient=error is None)
        try:
            if self.gradients is not None and error is None and (session is not None or self.config.only_dumps):
                self.gradients.pending.end_step(session)
        finally:
            if self.gradients is not None:
                self.gradients.pending.close()
                self.tally.gradients_lost.update(self.gradients.pending.lost)
                self.tally.gradients_late.update(self.gradients.pending.late)
            self.tally.dumps.update(self.dumps.close())
            self.tally.left_out.update(self.dumps.limits.left_out)
        self._end_early(session, is_orderly=error is None)
        if session is not None:
            if error is None:
                with contextlib.suppress(RunError):
                    self.meetings.say_step(session, LEFT)
            session.outbox.close(session.client, patient=error is None)
            self.tally.replace_posted(session.outbox.settled)
        summary = summarise(
            self.place, session.roster if session is not None else None, self.tally, self.filters,
            self.models.attachments, self.rank_status.detached, error, only_dumps=self.config.only_dumps,
        )  # fmt: skip
        role_directory = self.entry.write_last(session, summary)
        if session is not None:
            session.close(
                f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}" if error else ""
            )
        self.entry.close()
        self.models.warn_of_unused_settings()
        say_goodbye(self.place, self.tally, self.filters, role_directory, only_dumps=self.config.only_dumps)

    def _end_early(self, session: Session | None, *, is_orderly: bool) -> None:
        """What came before both jobs had joined is made up for now, or never."""
        if session is not None and is_orderly:
            with contextlib.suppress(RunError):
                self.meetings.make_up(session, self.early)
        self.early.give_up_all()
        self.tally.outcomes.update(self.early.forgotten)
        if session is None:
            self.early.memory.release()
