"""One recorded rank, played: it reaches every point that it recorded, in order, through an ordinary Grafter.

    points of the forward   in program order; points that no filter matches here are not exchanged
    gradients               all of a step are known: a sender serves them as they are asked for, like a live one; a
                            receiver follows the recorded order
    the end                 after its last point the rank leaves

It is not an error if the live job leaves first.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import replace
from itertools import groupby
from typing import Any, cast

import torch

from grafter.config.options import PointOptions
from grafter.config.settings.config import GrafterConfig
from grafter.core.messages.announced_models import AnnouncedHooks
from grafter.core.messages.local_value import LocalValue
from grafter.core.messages.roster import PlayedFrom, other_role
from grafter.core.point_fate import fate_of
from grafter.core.points import PointKey, identify, traced_call_site
from grafter.core.roles import receiver_role, sender_role
from grafter.errors import GrafterError, RunError, UsageError
from grafter.rank.grafter import Grafter
from grafter.runtime.dispatch import Dispatch
from grafter.runtime.gradients.watched import BACKWARD, WatchedGradient
from grafter.runtime.point_preparation import Point, PointPreparer
from grafter.runtime.session import Session
from grafter.store.dumps.pending_record import PendingRecord
from grafter.store.recording import RecordedFailure, RecordedPoint, RecordedRank
from grafter.wire.store_client import StoreClient

logger = logging.getLogger("grafter")

_LONGEST_STEP_SECONDS = 7 * 24 * 3600.0
# After waiting this long, a rank checks whether the live job has left and the wait is in vain.
_PATIENCE_SECONDS = 0.5


class RecordedPreparer(PointPreparer):
    """The values that a recorded rank recorded."""

    def prepare(self, value: Any, options: PointOptions, key: PointKey | None = None) -> LocalValue:
        if not isinstance(value, RecordedPoint):
            return super().prepare(value, options, key)
        recorded = value.offer()
        if recorded.tokens is None or not value.part.new_rows_only:
            return recorded
        try:
            windowed = recorded.tokens.read()
            options = replace(options, tokens=windowed.tokens, start=list(windowed.starts) or None, new_rows_only=True)
            return replace(recorded, tokens=self.windows.announce(options, key))
        except GrafterError as error:
            return LocalValue(value, nothing=f"the recording cannot be used here: {error}")


class RecordedDispatch(Dispatch):
    """The dispatch of a recorded rank's points to the live job."""

    def exchange(self, session: Session, point: Point, local: LocalValue, taken: PendingRecord | None = None) -> Any:
        recorded = local.value
        # It has nothing else to do, whatever the live job waits for.
        options = replace(point.options, wait="both")
        if isinstance(recorded, RecordedPoint):
            options = replace(options, new_rows_only=options.new_rows_only or recorded.part.new_rows_only)
            if point.direction is not None and receiver_role(point.direction) == session.place.role:
                local = _with_its_transform(recorded, local, options)
        return super().exchange(session, point._replace(options=options), local, taken)


def _with_its_transform(recorded: RecordedPoint, local: LocalValue, options: PointOptions) -> LocalValue:
    """The local value. A receiver without the transform that it was recorded with would get other tensors than it asks
    for.
    """
    if recorded.part.header.needs == "identity" or options.transform is not None:
        return local
    return replace(
        local,
        failure=UsageError(
            "the recorded call was given a transform. A function cannot be part of a recording. Name it by "
            "path: GRAFTER_TRANSFORM_PATH, or `transform` in a rule of the plan file"
        ),
    )


class PlayedGrafter(Grafter):
    """A Grafter whose points are recorded ones. `play` is called once, in a process that acts as this rank."""

    # What is played is on disk already.
    saves_points = False
    preparer_class = RecordedPreparer
    dispatch_class = RecordedDispatch

    def __init__(self, config: GrafterConfig, rank: RecordedRank) -> None:
        # It reaches its next point immediately, and the live job may need long for it, because it computes. A live job
        # that ends, or asks for something else, is noticed nevertheless.
        patient = {"timeout": max(config.timeout, _LONGEST_STEP_SECONDS), "on_peer_loss": "raise"}
        config = config.model_copy(update=patient)
        super().__init__(config)
        self._rank = rank
        self._live_job_left = False

    def play(self) -> None:
        """Play all points. Returns when they are over, or when the live job has left. Raises the error that ended the
        run.
        """
        try:
            # It joins even if nothing matches, because the live job waits for every rank.
            session = self._begin_to_play()
            for step, of_step in groupby(self._rank.points, key=lambda one: one.record.step):
                self._play_step(session, step, list(of_step))
            self._end_gradients(session)
        except RunError as error:
            if not self._has_live_job_left():
                raise
            self.context.status.fault = None
            logger.info("grafter: %s: %s", self._who, self._left_early(error))

    # What a Grafter asks for.

    def announced_hooks(self) -> AnnouncedHooks:
        return AnnouncedHooks(self._rank.facts.modules, self._rank.facts.models)

    def announced_recording(self) -> PlayedFrom:
        return self._rank.played_from

    # The steps.

    @property
    def _who(self) -> str:
        return f"{self.context.place.who}, {self._rank.played_from}"

    def _begin_to_play(self) -> Session:
        self.begin()
        session = self.session
        hear = session.monitor.on_second

        def on_second(client: StoreClient) -> None:
            if hear is not None:
                hear(client)
            self._look_for_live_job(session, client)

        session.monitor.on_second = on_second
        return session

    def _play_step(self, session: Session, step: int, points: Sequence[RecordedPoint]) -> None:
        if step > self.steps.step:
            # A step without a point is skipped, because its end has no effect.
            self.steps.step = step - 1
            self.step()
        gradients = {id(one): watched for one in points if (watched := self._watched(one)) is not None}
        if self.gradients is not None:
            # A live rank knows them from its forward pass on, including those that never arrive.
            in_any_order = {w.key.digest: w for w in gradients.values() if not w.point.is_parameter}
            self.gradients.pending.watched.update(in_any_order)
        for is_gradient, stretch in groupby(points, key=lambda one: one.is_gradient):
            if is_gradient:
                found = [(one, gradients[id(one)]) for one in stretch if id(one) in gradients]
                self._play_gradients(session, found)
            else:
                for one in stretch:
                    self._play_point(one)

    def _play_point(self, one: RecordedPoint) -> None:
        arguments = {**one.tags, **one.given}
        site = traced_call_site.set(one.record.call_site)
        try:
            # Not `self.dump_point`, which would watch for gradients: those are points of the recording.
            Grafter.dump_point(self, one.record.name, one, arguments, one.part.module)
        except RecordedFailure:
            # The recorded program already got this error in its own run.
            logger.debug("grafter: %s: %s had failed when it was recorded", self._who, one.point)
        finally:
            traced_call_site.reset(site)

    # Gradients.

    def _watched(self, one: RecordedPoint) -> WatchedGradient | None:
        """The gradient as a live rank would await it. None for other points, and for gradients that are not exchanged
        here.
        """
        if not one.is_gradient or self.gradients is None:
            return None
        record, tags = one.record, one.tags
        full = {**tags, "name": record.name, "step": record.step, "phase": BACKWARD}
        rules = self.context.rules
        direction, options = rules.filters.direction_of(full), rules.options.options_of(record.name, one.given)
        fate = fate_of(self.lifecycle.situation_of(direction, options, is_saved=False))
        if direction is None or fate == "ignore" or not options.gradients:
            return None
        key = PointKey(record.name, identify(tags, self.config.key_tags), record.step, BACKWARD, record.occurrence)
        options = replace(options, write="return", gradient="straight_through", wait="both")
        part = one.part
        return WatchedGradient(Point(key, direction, options, tags, record.call_site, part.module, part.is_parameter))

    def _play_gradients(self, session: Session, found: Sequence[tuple[RecordedPoint, WatchedGradient]]) -> None:
        gradients = self.gradients
        assert gradients is not None
        with self.lock, torch.no_grad():
            for is_parameter, stretch in groupby(found, key=lambda pair: pair[1].point.is_parameter):
                for one, watched in stretch:
                    # A Grafter passes it on to `prepare` without looking at it.
                    value = cast(torch.Tensor, one)
                    if is_parameter:
                        gradients.outcomes.exchange(session, watched, value)
                    elif one.is_missing:
                        continue
                    elif self.context.place.role == sender_role(watched.direction) and (
                        watched.point.options.one_sided == "raise"
                    ):
                        gradients.pending.offer(watched, value)
                    else:
                        gradients.pending.came(watched, value)
                gradients.pending.serve()

    def _end_gradients(self, session: Session) -> None:
        if self.gradients is not None:
            with self.lock, torch.no_grad():
                self.gradients.end_step(session)

    # The live job's end.

    def _look_for_live_job(self, session: Session, client: StoreClient) -> None:
        """On the housekeeping thread, once per second: end the wait if all live ranks have left."""
        wait = session.monitor.current_wait
        if wait is None or wait.stage not in ("pairing", "gradients") or wait.seconds < _PATIENCE_SECONDS:
            return
        if wait.one_sided:
            # What is left of the recording is in it alone.
            return
        live = other_role(self.context.place.role)
        ranks = [session.roster.graft_rank(live, member.role_rank) for member in session.roster.side(live)]
        lines = session.monitor.read_board(client, ranks)
        # Waits for gradients are not checked anywhere else.
        gone = session.monitor.gone() if wait.stage == "gradients" else {}
        if not all(line.state == "left" or line.graft_rank in gone for line in lines):
            return
        notes = [f"{line.who} has left with {line.note}" for line in lines if line.note]
        notes += [f"{session.roster.who(rank)} {how}" for rank, how in gone.items()]
        if notes:
            session.monitor.abort(RunError(f"the live job is over: {notes[0]}"), client)
            return
        self._live_job_left = True
        session.monitor.abort(RunError(f"the {live} job has left, and {self._who} has more points"), client)

    def _has_live_job_left(self) -> bool:
        """Whether the live job has left normally, whichever rank of this job noticed it first."""
        if self._live_job_left or self.lifecycle.session is None:
            return self._live_job_left
        lines = self.lifecycle.session.monitor.last_seen(other_role(self.context.place.role))
        return bool(lines) and all(line.state == "left" and not line.note for line in lines)

    def _left_early(self, error: RunError) -> str:
        met = sum(self.context.tally.outcomes.values())
        return f"the live job has left; it reached {met} of {len(self._rank.points)} recorded points"
