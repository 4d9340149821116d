"""The outcome of one gradient that is a point: saved, recorded, deferred, skipped or exchanged, as its fate says."""

from __future__ import annotations

import torch

from grafter.core.messages.offer import Offer
from grafter.core.messages.participants import own_participants
from grafter.core.point_fate import PointFate, fate_of
from grafter.errors import RunError
from grafter.runtime.gradients.watched import NO_GRADIENT, PHASE, SavedGradient, WatchedGradient
from grafter.runtime.matched_points import MatchedPoints
from grafter.runtime.meetings import among_holders
from grafter.runtime.offer import PointTools
from grafter.runtime.rank_context import RankContext
from grafter.runtime.session import Session


class GradientOutcomes:
    """What one rank does with each of its gradients. Used under the lock of its points."""

    def __init__(self, context: RankContext, tools: PointTools, matched: MatchedPoints) -> None:
        self._context, self._tools, self._matched = context, tools, matched

    @property
    def session(self) -> Session:
        """Waits until both jobs have joined. Raises what kept them from it."""
        return self._matched.joined()

    def fate_of(self, point: WatchedGradient | SavedGradient) -> PointFate:
        """What becomes of a gradient that is there now, as far as the other job's modules do not matter."""
        is_saved = isinstance(point, SavedGradient) or point.saves
        return fate_of(self._matched.lifecycle.situation_of(point.direction, point.options, is_saved=is_saved))

    def participants_of(self, session: Session, watched: WatchedGradient) -> tuple[int, ...]:
        """Role ranks of this side."""
        options = watched.options
        if watched.module is not None:
            options, _ = among_holders(session, watched.module, options)
        return own_participants(session.place, options.ranks)

    def snapshot(self, watched: WatchedGradient, gradient: torch.Tensor) -> None:
        """Keep the gradient as it has arrived, where it is saved."""
        if watched.saves and watched.taken is None and not (watched.met or watched.ended):
            watched.taken = self._tools.dumps.take(
                watched.key, watched.direction, gradient, watched.options, watched.tags, watched.call_site,
                self._recorded_part(watched, gradient),
            )  # fmt: skip

    def save(self, saved: SavedGradient, gradient: torch.Tensor) -> None:
        """A gradient that is exchanged with no one."""
        steps, key_tags, key = self._context.steps, self._context.config.key_tags, saved.key
        if saved.came:
            # Backward through one graph twice: another firing of the same point.
            key = steps.next_key({**saved.tags, "name": key.name}, key_tags, PHASE)
        saved.came = True
        options = saved.options
        if saved.module is not None and not (
            self._context.config.only_dumps or self._matched.lifecycle.is_too_early(options)
        ):
            options, _ = among_holders(self.session, saved.module, options)
        part = self._recorded_part(saved, gradient)
        dumps = self._tools.dumps
        dumps.finish(dumps.take(key, saved.direction, gradient, options, saved.tags, saved.call_site, part))

    def record_missing(self, saved: SavedGradient) -> None:
        """No gradient reached a point that is recorded in its step: whoever grafts from the recording must know it."""
        part, dumps = self._recorded_part(saved, None), self._tools.dumps
        dumps.finish(dumps.take(saved.key, saved.direction, None, saved.options, saved.tags, saved.call_site, part))

    def _recorded_part(self, point: WatchedGradient | SavedGradient, gradient: torch.Tensor | None) -> str | None:
        if point.direction is None:
            return None
        return self._matched.recorded_part(
            self._offer(point, gradient), point.options, point.direction, point.call_site, point.module,
            point.is_parameter,
        )  # fmt: skip

    def _offer(self, point: WatchedGradient | SavedGradient, gradient: torch.Tensor | None) -> Offer:
        if gradient is None:
            return Offer(None, nothing=NO_GRADIENT)
        return self._tools.offers.take_up(gradient, point.options, point.key)

    def defer(self, watched: WatchedGradient, gradient: torch.Tensor | None) -> None:
        """Keep a gradient, or that none arrived, until both jobs have joined."""
        offer = self._offer(watched, gradient)
        taken, watched.taken = watched.taken, None
        outcome = self._matched.early.add(
            watched.key, watched.direction, offer, watched.options, watched.tags, watched.call_site, watched.module
        )
        self._tools.dumps.finish(taken, outcome)
        if offer.failure is not None:
            raise offer.failure

    def skip(self, session: Session, watched: WatchedGradient, reason: str) -> None:
        """A gradient that is not exchanged is in the ledger, too."""
        self._matched.meetings.record_skipped(
            session, watched.key, watched.direction, watched.tags, watched.call_site, reason
        )
        self._tools.dumps.finish(watched.taken, "skipped", reason=reason)
        watched.taken = None

    def exchange(
        self, session: Session, watched: WatchedGradient, gradient: torch.Tensor | None
    ) -> torch.Tensor | None:
        """What replaces the gradient; None if nothing does. gradient: None offers nothing."""
        situation = self._matched.lifecycle.situation_of(watched.direction, watched.options, is_saved=watched.saves)
        options, missing = watched.options, None
        if watched.module is not None:
            options, missing = among_holders(session, watched.module, options)
        match fate_of(situation._replace(has_counterpart=missing is None)):
            case "skip":
                self.skip(session, watched, missing or "")
                return None
            case "ignore" | "save":
                self._tools.dumps.finish(watched.taken)
                watched.taken = None
                return None
        try:
            offer = self._offer(watched, gradient)
            taken, watched.taken = watched.taken, None
            grafted = self._matched.meetings.meet(
                session, watched.key, watched.direction, offer, options, watched.tags, watched.call_site, taken
            )
        except RunError as error:
            self._context.status.end_run(error, session)
            return None
        if offer.failure is not None:
            raise offer.failure
        return grafted if grafted is not None and grafted is not gradient else None
