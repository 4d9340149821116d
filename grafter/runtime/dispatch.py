"""The dispatch of matched points: each is treated by its fate (`core/point_fate.py`), counted and recorded.

save        written to disk; not exchanged
record      the same, with what a later graft needs
defer       kept until both jobs have joined; caught up on before the next point is exchanged
skip        no rank of the other job has the point's module: a line in the ledger
exchange    now: both sides meet (`PointExchange`), or this one sends and does not wait (`PointPosting`)

Values come here from `Grafter.dump_point`, gradients from `grafter.runtime.gradients`.
"""

from __future__ import annotations

import contextlib
import logging
import time
from dataclasses import astuple, replace
from typing import Any

import torch

from grafter.config.options import PointOptions
from grafter.core.messages.counts import Pending
from grafter.core.messages.local_value import LocalValue
from grafter.core.messages.participants import own_participants
from grafter.core.messages.roster import other_role
from grafter.core.point_fate import PointSituation, fate_of
from grafter.core.points import FORWARD, PointKey, call_site, check_tags, split_options
from grafter.core.records import LedgerRecord, PointOutcome
from grafter.core.roles import Direction, receiver_role
from grafter.core.untraced import unobserved
from grafter.errors import GrafterError, RunError
from grafter.runtime.deferred_points import DeferredPoints, PointPosting
from grafter.runtime.lifecycle import Lifecycle
from grafter.runtime.point_exchange import PointExchange, SentPoint
from grafter.runtime.point_preparation import Point, PointTools
from grafter.runtime.point_receiver import ReceivedPoint
from grafter.runtime.rank_context import RankContext
from grafter.runtime.session import Session
from grafter.runtime.windows import ends_of
from grafter.store.dumps.pending_record import PendingRecord
from grafter.store.recording import RecordedPart
from grafter.wire.monitor.absence import LEFT

logger = logging.getLogger("grafter")


class Dispatch:
    """The dispatch of one rank's points. All but `catch_up_in_background` is called under their lock."""

    def __init__(self, context: RankContext, tools: PointTools, lifecycle: Lifecycle, deferred: DeferredPoints) -> None:
        self._context, self._steps, self._tally = context, context.steps, context.tally
        self._preparer, self._dumps, self._recomputations = tools.preparer, tools.dumps, tools.recomputations
        self.lifecycle, self.deferred = lifecycle, deferred
        # Whether points may be one-sided, so that the other job must know which steps this rank has ended.
        self._says_steps = bool(context.config.one_sided_settings)
        self._place = context.place
        # The number of the last line in the ledger.
        self._sequence = 0

    def take(
        self,
        name: str,
        value: Any,
        arguments: dict[str, Any],
        context_options: dict[str, Any],
        direction: Direction | None,
        saves: bool,
        module: str | None,
    ) -> Any:
        """A value that a filter matches; what `dump` returns. context_options: from the enclosing `context` blocks.

        direction: None where it is only saved.
        """
        site, status = call_site(), self._context.status
        status.refuse_where_impossible(name, site)
        tags, given = split_options(arguments) if arguments else ({}, {})
        check_tags(tags)
        given.pop("save", None)
        options = self._context.rules.options.options_of(name, {**context_options, **given})
        situation = self.lifecycle.situation_of(direction, options, is_saved=saves)
        fate = fate_of(situation)
        if fate == "ignore":
            return value
        try:
            session = self.joined() if fate == "exchange" else None
            key = self._steps.next_key({**tags, "name": name}, self._context.config.key_tags)
            point = Point(key, direction, options, tags, site, module)
            if fate == "save":
                return self._save(point._replace(direction=None), value)
            if fate == "record":
                return self._record(point, value)
            returned, failure = self._defer_or_exchange(session, point, situation, value)
        except RunError as error:
            status.end_run(error, self.lifecycle.session)
            self.deferred.give_up_all()
            return value
        except BaseException as error:
            status.fault = error
            raise
        if failure is not None:
            raise failure
        return returned

    def _defer_or_exchange(
        self, session: Session | None, point: Point, situation: PointSituation, value: Any
    ) -> tuple[Any, Exception | None]:
        """(what `dump` returns, why the value could not be prepared). session: None where the point is deferred."""
        if session is not None and point.module is not None:
            options, missing = among_holders(session, point.module, point.options)
            point = point._replace(options=options)
            if fate_of(situation._replace(has_counterpart=missing is None)) == "skip":
                self._skip_value(session, point, value, missing or "", saves=situation.is_saved)
                return value, None
        local = self._preparer.prepare(value, point.options, point.key)
        taken = self.save_part(point, local) if situation.is_saved else None
        if session is not None:
            grafted = self.exchange(session, point, local, taken)
        else:
            grafted = local.value
            self.defer(point, local, taken)
        return grafted if local.leaves is not None else local.value, local.failure

    # The other job.

    def joined(self) -> Session:
        """Waits until both jobs have joined. Raises what kept them from it, and what ended the run."""
        try:
            session = self.lifecycle.session or self.lifecycle.joined()
        except GrafterError:
            self.deferred.give_up_all()
            raise
        if self.deferred.points:
            self._catch_up(session)
        if self._says_steps:
            self._say_step(session, self._steps.step)
        return session

    def catch_up_in_background(self) -> None:
        """Called as soon as both jobs have joined: this rank may have no further point for long."""
        status = self._context.status
        with self._context.lock:
            if status.is_closed or not self.deferred.points:
                return
            try:
                self.joined()
            except BaseException as error:
                # The next point raises it, too; so do those of all other ranks.
                self.deferred.give_up_all()
                if not isinstance(error, RunError):
                    logger.exception("grafter: %s could not make up for its first points", status.who)
                    error = RunError(f"{status.who} could not make up for its first points: {error}")
                with contextlib.suppress(RunError):
                    status.end_run(error, self.lifecycle.session)

    def _catch_up(self, session: Session) -> None:
        """Exchange the deferred points, in their order."""
        while (deferred := self.deferred.next()) is not None:
            point, missing = deferred.point, None
            options = point.options
            if point.module is not None:
                options, missing = among_holders(session, point.module, options)
            if missing is not None:
                self.deferred.give_up(deferred)
                self.record_skipped(session, point, missing)
                continue
            self._sequence += 1
            with unobserved():
                outcome = deferred.run(session, own_participants(self._place, options.ranks), self._sequence)
            self._count(session, point.key, outcome)

    @property
    def pending(self) -> Pending:
        """What lies in this rank's outbox. Called on any thread."""
        deferred, session = self.deferred.pending, self.lifecycle.session
        posted = session.outbox.pending if session is not None else Pending()
        return Pending(*map(sum, zip(astuple(deferred), astuple(posted), strict=True)))

    def end_step(self) -> None:
        """A step has ended: tell the other ranks, also where no point of this rank has been exchanged yet."""
        if not self._says_steps:
            return
        attempt = self.lifecycle.join_attempt
        if self.lifecycle.session is None and attempt is not None and attempt.is_over:
            with contextlib.suppress(GrafterError):
                self.joined()
        if self.lifecycle.session is not None:
            self._say_step(self.lifecycle.session, self._steps.step)

    def _say_step(self, session: Session, step: int) -> None:
        """This rank has reached all points of the steps before `step`. Said only where points may be one-sided."""
        if self._says_steps:
            session.monitor.step_ends.say(session.client, step)

    def leave(self, session: Session | None, *, is_orderly: bool) -> None:
        """This rank reaches no further point. What is deferred is exchanged now, or never.

        is_orderly: the program has not ended with an error.
        """
        if session is not None and is_orderly:
            with contextlib.suppress(RunError):
                self._catch_up(session)
        self.deferred.give_up_all()
        self._tally.outcomes.update(self.deferred.forgotten)
        if session is not None and is_orderly:
            with contextlib.suppress(RunError):
                self._say_step(session, LEFT)

    # The fates.

    def exchange(self, session: Session, point: Point, local: LocalValue, taken: PendingRecord | None = None) -> Any:
        """Exchange one point with the other job; what `dump` returns. taken: the point as it is saved, if it is."""
        options = point.options
        assert point.direction is not None
        self._sequence += 1
        if options.is_posted(self._place.role, point.direction):
            return self._post(session, point, local, taken)
        header = self._preparer.build_header(session, point, local)
        if self._place.role == receiver_role(point.direction):
            exchange: PointExchange = ReceivedPoint(session, point, header, self._sequence, self._context.rules.stats)
        else:
            exchange = SentPoint(session, point, header, self._sequence)
        try:
            with unobserved():
                grafted, outcome = exchange.run(local.leaves, local.extras)
        except BaseException as error:
            self._dumps.finish_failed(taken, error)
            raise
        if taken is not None:
            self._dumps.finish(taken, outcome, grafted)
        if options.new_rows_only and exchange.rows is not None and outcome in ("grafted", "compared", "sent"):
            self._preparer.windows.advance(point.key, exchange.rows.reached(header))
        if point.key.phase == FORWARD:
            self._recomputations.keep(point.key, options, local.leaves if outcome == "grafted" else None, grafted)
        self._count(session, point.key, outcome)
        return grafted

    def _post(self, session: Session, point: Point, local: LocalValue, taken: PendingRecord | None) -> Any:
        """The part of a sender that does not wait; what `dump` returns: the value."""
        is_kept = point.options.one_sided == "skip" and point.options.wait == "both"
        point = point._replace(options=replace(point.options, wait="job"))
        try:
            with unobserved():
                outcome = PointPosting(session, point, self._sequence, is_kept=is_kept).run(local, self._preparer)
        except BaseException as error:
            self._dumps.finish_failed(taken, error)
            raise
        self._dumps.finish(taken, outcome)
        if point.key.phase == FORWARD:
            self._recomputations.keep(point.key, point.options, None, None)
        self._count(session, point.key, outcome)
        return local.value

    def _count(self, session: Session, key: PointKey, outcome: PointOutcome) -> None:
        self._tally.outcomes[outcome] += 1
        session.monitor.board.last_points.append((key, outcome))

    def defer(self, point: Point, local: LocalValue, taken: PendingRecord | None) -> None:
        """Keep a point until both jobs have joined. taken: the point as it is saved, if it is."""
        self._dumps.finish(taken, self.deferred.add(point, local))

    def record_skipped(self, session: Session, point: Point, reason: str) -> None:
        """A point that cannot be exchanged is in the ledger, too."""
        key, direction = point.key, point.direction
        assert direction is not None
        self._sequence += 1
        self._tally.outcomes["skipped"] += 1
        session.ledger.write_line(
            LedgerRecord(
                sequence=self._sequence, time=time.time(), name=key.name, tags=point.tags, step=key.step,
                phase=key.phase, occurrence=key.occurrence, direction=direction, role=session.place.role,
                role_rank=session.place.role_rank, outcome="skipped", reason=reason, call_site=point.call_site,
                participants={},
            )
        )  # fmt: skip

    def _skip_value(self, session: Session, point: Point, value: Any, reason: str, *, saves: bool) -> None:
        self.record_skipped(session, point, reason)
        if saves:
            local = self._preparer.prepare(value, point.options, point.key)
            taken = self._take(point, local.value, self.recorded_part(point, local))
            self._dumps.finish(taken, "skipped", reason=reason)
        self._recomputations.keep_nothing(point.key)

    def _save(self, point: Point, value: Any) -> Any:
        """A value that is only saved. What `dump` returns: the value, made if it is a function."""
        key, options, windows = point.key, point.options, self._preparer.windows
        if callable(value) and not isinstance(value, torch.Tensor):
            value = value()
        point = self.with_holders(point)
        starts: tuple[int, ...] = ()
        if options.has_window:
            announced = windows.announce(options, key)
            starts = announced.starts if announced is not None else ()
        self._dumps.finish(self._take(point, value, starts=starts))
        if options.new_rows_only:
            windows.advance(key, ends_of(options.tokens))
        return value

    def _record(self, point: Point, value: Any) -> Any:
        """A value that is kept for a later graft, as it would have been exchanged. What `dump` returns."""
        local = self._preparer.prepare(value, point.options, point.key)
        self._dumps.finish(self._take(point, local.value, self.recorded_part(point, local)))
        self._recomputations.keep_nothing(point.key)
        if local.failure is not None:
            raise local.failure
        return local.value

    def with_holders(self, point: Point) -> Point:
        """A point that is only saved, with the ranks that have its module as its participants.

        Waits for both jobs to join, if there is another one and the point may wait.
        """
        is_alone = self._context.config.only_dumps or self.lifecycle.is_too_early(point.options)
        if point.module is None or is_alone:
            return point
        return point._replace(options=among_holders(self.joined(), point.module, point.options)[0])

    # What is saved of a point.

    def save_part(self, point: Point, local: LocalValue) -> PendingRecord | None:
        """The value of a point that is exchanged, as it is now; `finish` of the dumps is to follow."""
        starts = local.tokens.starts if local.tokens is not None else ()
        return self._take(point, local.value, self.recorded_part(point, local), starts)

    def _take(
        self, point: Point, value: Any, recorded_part: str | None = None, starts: tuple[int, ...] = ()
    ) -> PendingRecord | None:
        return self._dumps.take(
            point.key, point.direction, value, point.options, point.tags, point.call_site, recorded_part, starts
        )

    def recorded_part(self, point: Point, local: LocalValue) -> str | None:
        """What a recording keeps of this rank's part of a point besides its values; None where nothing is recorded."""
        if not self._context.config.record:
            return None
        header = self._preparer.build_header(None, point, local, recorded=True)
        part = RecordedPart(
            header=header, module=point.module, is_parameter=point.is_parameter,
            new_rows_only=bool(point.options.new_rows_only),
        )  # fmt: skip
        return part.model_dump_json(exclude_defaults=True)


def among_holders(session: Session, module: str, options: PointOptions) -> tuple[PointOptions, str | None]:
    """(options, reason): the participants are the ranks that have the module; the reason why the point is skipped."""
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
