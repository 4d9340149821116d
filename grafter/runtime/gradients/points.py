"""Points of phase backward: which gradients are points, settled in the forward pass, and the meeting of each.

When they meet, and in which order, is `gradients`' to say.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch

from grafter.config.names import PointName
from grafter.config.options import PointOptions
from grafter.core.messages.offer import Offer
from grafter.core.messages.participants import own_participants
from grafter.core.points import call_site, check_tags, point_context, split_options
from grafter.core.roles import Direction, receiver_role
from grafter.errors import RunError, UsageError
from grafter.runtime.gradients.gradients import BACKWARD, PendingGradients, SavedGradient, WatchedGradient
from grafter.runtime.meetings import among_holders
from grafter.runtime.recompute.regions import current_recomputation
from grafter.runtime.session import Session

if TYPE_CHECKING:
    from grafter.runtime.point_host import PointHost


NO_GRADIENT = "no gradient came to this point"


class BackwardPoints:
    """The gradients of one rank's points, and of its parameters."""

    def __init__(self, grafter: PointHost) -> None:
        self._grafter = grafter
        self.pending = PendingGradients(self)

    @property
    def lock(self) -> Any:
        return self._grafter.lock

    @property
    def session(self) -> Session:
        return self._grafter.session

    @property
    def is_warming_up(self) -> bool:
        """Whether points are left out, since the models are not warm yet."""
        return self._grafter.is_warming_up

    @property
    def waits_for_optimizer(self) -> bool:
        """Whether gradients of weights are points when an optimizer steps, and not before."""
        return self._grafter.config.weight_gradients == "optimizer_step"

    # In the forward pass.

    def watch(self, name: str, value: Any, arguments: dict[str, Any], module: str | None) -> None:
        """Called after a point whose value autograd will differentiate, or may, once it is recomputed."""
        register = self._register(name, arguments, module)
        with self.lock:
            if torch.is_grad_enabled():
                self.pending.watch(value, register)
            else:
                self._grafter.recomputations.keep_gradients(value, register)

    def _register(
        self, name: str, arguments: dict[str, Any], module: str | None
    ) -> Callable[[str], WatchedGradient | SavedGradient | None]:
        """Of the path of a tensor in the point's value: its gradient's point, where a filter matches that."""
        grafter = self._grafter
        steps, key_tags = grafter.steps, grafter.config.key_tags
        around = point_context.get()
        own, _ = split_options(arguments)
        tags, given = split_options({**around.tags, **arguments})
        told_save = given.pop("save", None)
        given = {option: told for option, told in {**around.options, **given}.items() if option != "extras"}

        def register(path: str) -> WatchedGradient | SavedGradient | None:
            point = name + path
            recomputation = current_recomputation()
            if recomputation is not None:
                # Its place in the order of the program is that of the forward pass.
                return recomputation.next_kept(steps, point, own, key_tags, BACKWARD)  # type: ignore[no-any-return]
            full = {**tags, "name": point, "step": steps.step, "phase": BACKWARD}
            direction = grafter.filters.direction_of(full)
            saves = grafter.filters.saves({**full, "save": told_save}) and grafter.dumps.limits.allows_step(steps.step)
            saves = saves or (grafter.config.record and direction is not None)
            if direction is None and not saves:
                return None
            options = grafter.options.options_of(point, given)
            if not options.gradients:
                return None
            check_tags(tags)
            key = steps.next_key({**tags, "name": point}, key_tags, BACKWARD)
            options = replace(options, write="return", gradient="straight_through")
            if direction is None or grafter.config.records_alone:
                return SavedGradient(key, dict(tags), options, call_site(), module, direction)
            return WatchedGradient(key, direction, dict(tags), options, call_site(), module, saves)

        return register

    def expect(
        self, name: str, arguments: dict[str, Any], module: str | None = None
    ) -> WatchedGradient | SavedGradient | None:
        """Of a point in compiled code, which tells by itself when its gradient comes."""
        with self.lock:
            watched = self._register(name, arguments, module)("")
            if isinstance(watched, WatchedGradient):
                self.pending.watched[watched.key.digest] = watched
            elif watched is not None and watched.direction is not None:
                self.pending.recorded.append(watched)
            return watched

    # In the backward pass.

    def came(self, watched: WatchedGradient | SavedGradient, gradient: torch.Tensor) -> torch.Tensor | None:
        """What takes its place; None: it stays as it is."""
        with self.lock, torch.no_grad():
            if isinstance(watched, SavedGradient):
                self._save(watched, gradient)
                return None
            self._take(watched, gradient)
            return self.pending.came(watched, gradient)

    def _take(self, watched: WatchedGradient, gradient: torch.Tensor) -> None:
        if watched.saves and watched.taken is None and not (watched.met or watched.ended):
            watched.taken = self._grafter.dumps.take(
                watched.key, watched.direction, gradient, watched.options, watched.tags, watched.call_site,
                self._recorded_part(watched, gradient),
            )  # fmt: skip

    def _save(self, saved: SavedGradient, gradient: torch.Tensor) -> None:
        grafter, key = self._grafter, saved.key
        if saved.came:
            # Backward through one graph twice: another firing of the same point.
            key = grafter.steps.next_key({**saved.tags, "name": key.name}, grafter.config.key_tags, BACKWARD)
        saved.came = True
        options = saved.options
        if saved.module is not None and not grafter.config.only_dumps and not self.is_early(options):
            options, _ = among_holders(self.session, saved.module, options)
        part = self._recorded_part(saved, gradient)
        taken = grafter.dumps.take(key, saved.direction, gradient, options, saved.tags, saved.call_site, part)
        grafter.dumps.finish(taken)

    def _recorded_part(self, point: WatchedGradient | SavedGradient, gradient: torch.Tensor | None) -> str | None:
        if point.direction is None:
            return None
        grafter, options = self._grafter, point.options
        offer = grafter.offers.take_up(gradient, options, point.key)
        if gradient is None:
            offer = Offer(None, nothing=NO_GRADIENT)
        return grafter.matched.recorded_part(
            offer, options, point.direction, point.call_site, point.module, point.is_parameter
        )

    def record_missing(self, saved: SavedGradient) -> None:
        """No gradient came to a point that is recorded in its step: whoever grafts from the recording must know."""
        part = self._recorded_part(saved, None)
        self._grafter.dumps.finish(
            self._grafter.dumps.take(saved.key, saved.direction, None, saved.options, saved.tags, saved.call_site, part)
        )

    def wants_parameter(self, name: PointName) -> bool:
        """Whether the gradient of a parameter is a point in this step."""
        direction, saves, options = self._choice_of(name)
        return (direction is not None or saves) and options.gradients

    def _choice_of(self, name: PointName) -> tuple[Direction | None, bool, PointOptions]:
        grafter = self._grafter
        full = {**name.tags, "name": name.name, "step": grafter.steps.step, "phase": BACKWARD}
        direction = grafter.filters.direction_of(full)
        saves = grafter.filters.saves(full) and grafter.dumps.limits.allows_step(grafter.steps.step)
        saves = saves or (grafter.config.record and direction is not None)
        return direction, saves, grafter.options.options_of(name.name, {})

    def dump_parameter(self, name: PointName, gradient: torch.Tensor, *, is_used: bool = False) -> None:
        """The gradient of a parameter as a point: both sides come to it in the order of names, and wait.

        is_used: `gradient` is a copy, and an optimizer has used the original within the backward pass.
        """
        grafter = self._grafter
        direction, saves, options = self._choice_of(name)
        if (direction is None and not saves) or not options.gradients:
            return
        key = grafter.steps.next_key({**name.tags, "name": name.name}, grafter.config.key_tags, BACKWARD)
        options = replace(options, write="in_place", gradient="straight_through")
        site = f"the parameter {name.name}"
        if direction is None or grafter.config.records_alone:
            self._save(
                SavedGradient(key, dict(name.tags), options, site, direction=direction, is_parameter=True), gradient
            )
            return
        watched = WatchedGradient(key, direction, dict(name.tags), options, site, saves=saves, is_parameter=True)
        self._take(watched, gradient)
        if self.is_early(options):
            self.defer(watched, gradient)
            return
        session = self.session
        if is_used and direction != "compare" and session.place.role == receiver_role(direction):
            raise UsageError(
                f"the gradient of {key} is to be grafted ({direction}), but an optimizer has used it within the "
                "backward pass already, so the graft would change nothing. Graft it when the optimizer steps "
                "(GRAFTER_WEIGHT_GRADIENTS=optimizer_step), compare it, or step after backward."
            )
        self.meet(session, watched, gradient)

    def participants_of(self, session: Session, watched: WatchedGradient) -> tuple[int, ...]:
        """Role ranks of this side."""
        options = watched.options
        if watched.module is not None:
            options, _ = among_holders(session, watched.module, options)
        return own_participants(session.place, options.ranks)

    def is_early(self, options: PointOptions) -> bool:
        """Whether a point does not wait, and both jobs have not joined yet."""
        return options.wait == "job" and self._grafter.entry.is_waiting

    def defer(self, watched: WatchedGradient, gradient: torch.Tensor | None) -> None:
        """Keep a gradient, or that none came, until both jobs have joined."""
        grafter = self._grafter
        offer = Offer(None, nothing=NO_GRADIENT)
        if gradient is not None:
            offer = grafter.offers.take_up(gradient, watched.options, watched.key)
        taken, watched.taken = watched.taken, None
        outcome = grafter.early.add(
            watched.key, watched.direction, offer, watched.options, watched.tags, watched.call_site, watched.module
        )
        grafter.dumps.finish(taken, outcome)
        if offer.failure is not None:
            raise offer.failure

    def skip(self, session: Session, watched: WatchedGradient, reason: str) -> None:
        """A gradient that meets nobody is in the ledger, too."""
        self._grafter.meetings.record_skipped(
            session, watched.key, watched.direction, watched.tags, watched.call_site, reason
        )
        self._grafter.dumps.finish(watched.taken, "skipped", reason=reason)
        watched.taken = None

    def meet(self, session: Session, watched: WatchedGradient, gradient: torch.Tensor | None) -> torch.Tensor | None:
        """One point of phase backward; what takes the gradient's place, if something does. None offers nothing."""
        grafter, options = self._grafter, watched.options
        if grafter.rank_status.detached is not None:
            return None
        try:
            if watched.module is not None:
                options, missing = among_holders(session, watched.module, options)
                if missing is not None:
                    self.skip(session, watched, missing)
                    return None
            offer = grafter.offers.take_up(gradient, options, watched.key)
            if gradient is None:
                offer = Offer(None, nothing=NO_GRADIENT)
            taken, watched.taken = watched.taken, None
            grafted = grafter.meetings.meet(
                session, watched.key, watched.direction, offer, options, watched.tags, watched.call_site, taken
            )
        except RunError as error:
            return grafter.rank_status.end_run(error, None, grafter.entry.session)  # type: ignore[no-any-return]
        if offer.failure is not None:
            raise offer.failure
        return grafted if grafted is not None and grafted is not gradient else None
