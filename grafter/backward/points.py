"""Points of phase backward: which gradients are points, settled in the forward pass, and the meeting of each.

When they meet, and in which order, is `gradients`' to say.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch

from grafter.backward.gradients import PHASE, PendingGradients, WatchedGradient
from grafter.backward.regions import current_recomputation
from grafter.errors import RunError
from grafter.names import PointName
from grafter.offer import Offer
from grafter.pairing.participants import own_participants
from grafter.points import call_site, check_tags, split_options, surroundings
from grafter.session import Session

if TYPE_CHECKING:
    from grafter.grafter import Grafter


class BackwardPoints:
    """The gradients of one rank's points, and of its parameters."""

    def __init__(self, grafter: Grafter) -> None:
        self._grafter = grafter
        self.pending = PendingGradients(self)

    @property
    def lock(self) -> Any:
        return self._grafter.lock

    @property
    def session(self) -> Session:
        return self._grafter.session

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
    ) -> Callable[[str], WatchedGradient | None]:
        """Of the path of a tensor in the point's value: its gradient's point, where a filter matches that."""
        grafter = self._grafter
        steps, key_tags = grafter.steps, grafter.config.key_tags
        around = surroundings.get()
        own, _ = split_options(arguments)
        tags, given = split_options({**around.tags, **arguments})
        given = {option: told for option, told in {**around.options, **given}.items() if option != "extras"}

        def register(path: str) -> WatchedGradient | None:
            point = name + path
            recomputation = current_recomputation()
            if recomputation is not None:
                # Its place in the order of the program is that of the forward pass.
                known: WatchedGradient | None = recomputation.next_kept(steps, point, own, key_tags, PHASE)
                return known
            direction = grafter.filters.direction_of({**tags, "name": point, "step": steps.step, "phase": PHASE})
            if direction is None:
                return None
            options = grafter.options.options_of(point, given)
            if not options.gradients:
                return None
            check_tags(tags)
            key = steps.next_key({**tags, "name": point}, key_tags, PHASE)
            options = replace(options, write="return", gradient="straight_through")
            return WatchedGradient(key, direction, dict(tags), options, call_site(), module)

        return register

    def expect(self, name: str, arguments: dict[str, Any]) -> WatchedGradient | None:
        """Of a point in compiled code, which tells by itself when its gradient comes."""
        with self.lock:
            watched: WatchedGradient | None = self._register(name, arguments, None)("")
            if watched is not None:
                self.pending.watched[watched.key.digest] = watched
            return watched

    # In the backward pass.

    def came(self, watched: WatchedGradient, gradient: torch.Tensor) -> torch.Tensor | None:
        """What takes its place; None: it stays as it is."""
        with self.lock, torch.no_grad():
            return self.pending.came(watched, gradient)

    def dump_parameter(self, name: PointName, gradient: torch.Tensor) -> None:
        """The gradient of a parameter as a point: both sides come to it in the order of names, and wait."""
        grafter = self._grafter
        full = {**name.tags, "name": name.name, "step": grafter.steps.step, "phase": PHASE}
        direction = grafter.filters.direction_of(full)
        options = grafter.options.options_of(name.name, {})
        if direction is None or not options.gradients:
            return
        key = grafter.steps.next_key({**name.tags, "name": name.name}, grafter.config.key_tags, PHASE)
        options = replace(options, write="in_place", gradient="straight_through")
        watched = WatchedGradient(key, direction, dict(name.tags), options, f"the parameter {name.name}")
        self.meet(self.session, watched, gradient)

    def participants_of(self, session: Session, watched: WatchedGradient) -> tuple[int, ...]:
        """Role ranks of this side."""
        options = watched.options
        if watched.module is not None:
            options, _ = self._grafter.among_holders(session, watched.module, options)
        return own_participants(session.place, options.ranks)

    def skip(self, session: Session, watched: WatchedGradient, reason: str) -> None:
        """A gradient that meets nobody is in the ledger, too."""
        self._grafter.record_skipped(session, watched.key, watched.direction, watched.tags, watched.call_site, reason)

    def meet(self, session: Session, watched: WatchedGradient, gradient: torch.Tensor | None) -> torch.Tensor | None:
        """One point of phase backward; what takes the gradient's place, if something does. None offers nothing."""
        grafter, options = self._grafter, watched.options
        if grafter.is_detached:
            return None
        try:
            if watched.module is not None:
                options, missing = grafter.among_holders(session, watched.module, options)
                if missing is not None:
                    self.skip(session, watched, missing)
                    return None
            offer = grafter.offers.take_up(gradient, options)
            if gradient is None:
                offer = Offer(None, nothing="no gradient came to this point")
            grafted = grafter.meet(
                session, watched.key, watched.direction, offer, options, watched.tags, watched.call_site
            )
        except RunError as error:
            return grafter.end_run(error, None)  # type: ignore[no-any-return]
        if offer.failure is not None:
            raise offer.failure
        return grafted if grafted is not None and grafted is not gradient else None
