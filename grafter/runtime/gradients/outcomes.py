"""The outcome of one gradient that is a point: saved, recorded, deferred, skipped or exchanged, as its fate says."""

from __future__ import annotations

import torch

from grafter.core.messages.local_value import LocalValue
from grafter.core.messages.participants import own_participants
from grafter.core.point_fate import PointFate, fate_of
from grafter.errors import RunError
from grafter.runtime.dispatch import Dispatch, among_holders
from grafter.runtime.gradients.watched import BACKWARD, NO_GRADIENT, SavedGradient, WatchedGradient
from grafter.runtime.point_preparation import Point, PointTools
from grafter.runtime.rank_context import RankContext
from grafter.runtime.session import Session
from grafter.store.dumps.pending_record import PendingRecord


class GradientOutcomes:
    """What one rank does with each of its gradients. Used under the lock of its points."""

    def __init__(self, context: RankContext, tools: PointTools, dispatch: Dispatch) -> None:
        self._context, self._preparer, self._dumps, self._dispatch = context, tools.preparer, tools.dumps, dispatch

    @property
    def session(self) -> Session:
        """Waits until both jobs have joined. Raises what kept them from it."""
        return self._dispatch.joined()

    def fate_of(self, gradient: WatchedGradient | SavedGradient) -> PointFate:
        """The fate of a gradient that is there now, as long as the other job's modules do not matter."""
        point, is_saved = gradient.point, isinstance(gradient, SavedGradient) or gradient.saves
        return fate_of(self._dispatch.lifecycle.situation_of(point.direction, point.options, is_saved=is_saved))

    def participants_of(self, session: Session, watched: WatchedGradient) -> tuple[int, ...]:
        """Role ranks of this side."""
        options = watched.point.options
        if watched.point.module is not None:
            options, _ = among_holders(session, watched.point.module, options)
        return own_participants(session.place, options.ranks)

    def snapshot(self, watched: WatchedGradient, gradient: torch.Tensor) -> None:
        """Keep the gradient as it has arrived, where it is saved."""
        if watched.saves and watched.taken is None and not (watched.met or watched.ended):
            watched.taken = self._take(watched.point, gradient)

    def save(self, saved: SavedGradient, gradient: torch.Tensor) -> None:
        """A gradient that is not exchanged."""
        point = saved.point
        if saved.came:
            # Backward through one graph twice: another firing of the same point.
            tags, key_tags = {**point.tags, "name": point.key.name}, self._context.config.key_tags
            point = point._replace(key=self._context.steps.next_key(tags, key_tags, BACKWARD))
        saved.came = True
        self._dumps.finish(self._take(self._dispatch.with_holders(point), gradient))

    def record_missing(self, saved: SavedGradient) -> None:
        """No gradient reached a point that is recorded in its step: whoever grafts from the recording must know it."""
        self._dumps.finish(self._take(saved.point, None))

    def _take(self, point: Point, gradient: torch.Tensor | None) -> PendingRecord | None:
        recorded_part = None
        if self._context.config.record and point.direction is not None:
            recorded_part = self._dispatch.recorded_part(point, self._prepare(point, gradient))
        return self._dumps.take(
            point.key, point.direction, gradient, point.options, point.tags, point.call_site, recorded_part
        )

    def _prepare(self, point: Point, gradient: torch.Tensor | None) -> LocalValue:
        if gradient is None:
            return LocalValue(None, nothing=NO_GRADIENT)
        return self._preparer.prepare(gradient, point.options, point.key)

    def defer(self, watched: WatchedGradient, gradient: torch.Tensor | None) -> None:
        """Keep a gradient, or that none arrived, until both jobs have joined."""
        local = self._prepare(watched.point, gradient)
        taken, watched.taken = watched.taken, None
        self._dispatch.defer(watched.point, local, taken)
        if local.failure is not None:
            raise local.failure

    def skip(self, session: Session, watched: WatchedGradient, reason: str) -> None:
        """A gradient that is not exchanged is in the ledger, too."""
        self._dispatch.record_skipped(session, watched.point, reason)
        self._dumps.finish(watched.taken, "skipped", reason=reason)
        watched.taken = None

    def exchange(
        self, session: Session, watched: WatchedGradient, gradient: torch.Tensor | None
    ) -> torch.Tensor | None:
        """What replaces the gradient; None if nothing does. gradient: None offers nothing."""
        point, missing = watched.point, None
        situation = self._dispatch.lifecycle.situation_of(point.direction, point.options, is_saved=watched.saves)
        if point.module is not None:
            options, missing = among_holders(session, point.module, point.options)
            point = point._replace(options=options)
        fate = fate_of(situation._replace(has_counterpart=missing is None))
        if fate == "skip":
            self.skip(session, watched, missing or "")
            return None
        taken, watched.taken = watched.taken, None
        if fate != "exchange":
            self._dumps.finish(taken)
            return None
        try:
            local = self._prepare(point, gradient)
            grafted = self._dispatch.exchange(session, point, local, taken)
        except RunError as error:
            self._context.status.end_run(error, session)
            return None
        if local.failure is not None:
            raise local.failure
        return grafted if grafted is not None and grafted is not gradient else None
