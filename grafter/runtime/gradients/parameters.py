"""Gradients of parameters: points that are read when a backward pass ends, or when an optimizer is about to step."""

from __future__ import annotations

import logging
from collections import Counter
from dataclasses import replace
from typing import Any

import torch
from torch.optim.optimizer import register_optimizer_step_pre_hook

from grafter.config.names import PointName
from grafter.config.options import PointOptions
from grafter.core.roles import Direction, receiver_role
from grafter.core.untraced import untraced
from grafter.errors import UsageError
from grafter.runtime.gradients.outcomes import GradientOutcomes
from grafter.runtime.gradients.watched import BACKWARD, SavedGradient, WatchedGradient
from grafter.runtime.point_preparation import Point, PointTools
from grafter.runtime.rank_context import RankContext

logger = logging.getLogger("grafter")


class ParameterGradients:
    """The gradients of one rank's parameters, which each backward pass adds to. Both sides reach them by name order."""

    def __init__(self, context: RankContext, tools: PointTools, outcomes: GradientOutcomes) -> None:
        self._context, self._dumps, self._outcomes = context, tools.dumps, outcomes
        # Whether they are points when an optimizer steps, and not before.
        self.waits_for_optimizer = context.config.weight_gradients == "optimizer_step"
        self._arrived: dict[str, tuple[PointName, torch.Tensor]] = {}
        # Copies of what an optimizer used within the backward pass: the program may clear or change it before its end.
        self._used: dict[str, torch.Tensor] = {}
        # Gradients that had been cleared before they could be read: name -> how many.
        self.lost: Counter[str] = Counter()
        # What ends the watch over optimizers, where there is one.
        self._optimizer_hook: Any = None

    @property
    def is_empty(self) -> bool:
        """Whether none has arrived since they were read last."""
        return not self._arrived

    def came(self, name: PointName, parameter: torch.Tensor) -> None:
        """The gradient of a parameter has been added to. It is read once, after all of the pass have arrived."""
        self._arrived[name.key] = (name, parameter)
        if self._optimizer_hook is None:
            self._optimizer_hook = register_optimizer_step_pre_hook(untraced(self._before_optimizer))

    def _before_optimizer(self, optimizer: Any, args: Any, kwargs: Any) -> None:
        """Read all that has arrived since the last time, whichever optimizer steps: it may have copies of the weights
        instead of the weights, and where one job has two optimizers, the other may have one."""
        if self.waits_for_optimizer:
            self.read()
        elif self._arrived:
            self._keep_used(optimizer)

    def _keep_used(self, optimizer: Any) -> None:
        """An optimizer steps within the backward pass. An exchange here could make each job wait for the other, so
        copies are kept until the pass ends."""
        stepped = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
        with self._context.lock, torch.no_grad():
            for key, (name, parameter) in self._arrived.items():
                gradient = _gradient_of(parameter)
                if id(parameter) in stepped and gradient is not None and self._is_point(name):
                    self._used[key] = gradient.detach().clone()

    def read(self) -> None:
        """Each gradient that has arrived is a point now, in the order of names."""
        with self._context.lock, torch.no_grad():
            arrived, self._arrived = self._arrived, {}
            used, self._used = self._used, {}
            for key, (name, parameter) in sorted(arrived.items()):
                gradient = used.get(key, _gradient_of(parameter))
                if gradient is not None:
                    self._dump(name, gradient, is_used=key in used)
                elif self._is_point(name):
                    self.lost[name.name] += 1

    def end_step(self) -> None:
        """Called at the end of a step: a backward pass that failed has never been followed by `read`."""
        if not self.waits_for_optimizer:
            self._arrived.clear()
            self._used.clear()

    def _is_point(self, name: PointName) -> bool:
        """Whether the gradient of a parameter is a point in this step."""
        direction, saves, options = self._choose(name)
        return (direction is not None or saves) and options.gradients

    def _choose(self, name: PointName) -> tuple[Direction | None, bool, PointOptions]:
        """(direction, whether it is saved, options)."""
        rules, step = self._context.rules, self._context.steps.step
        full = {**name.tags, "name": name.name, "step": step, "phase": BACKWARD}
        direction = rules.filters.direction_of(full)
        saves = self._dumps.accepts(direction, step, is_chosen=rules.filters.saves(full))
        return direction, saves, rules.options.options_of(name.name, {})

    def _dump(self, name: PointName, gradient: torch.Tensor, *, is_used: bool) -> None:
        """The gradient of a parameter as a point: both sides reach it in the order of names, and wait.

        is_used: `gradient` is a copy, and an optimizer has used the original within the backward pass.
        """
        context, outcomes = self._context, self._outcomes
        direction, saves, options = self._choose(name)
        if (direction is None and not saves) or not options.gradients:
            return
        key = context.steps.next_key({**name.tags, "name": name.name}, context.config.key_tags, BACKWARD)
        options = replace(options, write="in_place", gradient="straight_through")
        site = f"the parameter {name.name}"
        point = Point(key, direction, options, dict(name.tags), site, is_parameter=True)
        saved = SavedGradient(point)
        if direction is None or outcomes.fate_of(saved) in ("save", "record"):
            outcomes.save(saved, gradient)
            return
        watched = WatchedGradient(point, saves)
        outcomes.snapshot(watched, gradient)
        if outcomes.fate_of(watched) == "defer":
            outcomes.defer(watched, gradient)
            return
        session = outcomes.session
        if is_used and direction != "compare" and session.place.role == receiver_role(direction):
            raise UsageError(
                f"the gradient of {key} is to be grafted ({direction}), but an optimizer has used it within the "
                "backward pass already, so the graft would change nothing. Graft it when the optimizer steps "
                "(GRAFTER_WEIGHT_GRADIENTS=optimizer_step), compare it, or step after backward."
            )
        outcomes.exchange(session, watched, gradient)

    def close(self) -> None:
        """The run is over: log the gradients that still wait for an optimizer, and those that were lost."""
        if self.lost:
            counts = ", ".join(f"{name}: {count}" for name, count in self.lost.most_common(3))
            logger.warning(
                "grafter: %d gradients of weights (%s%s) came, and were gone when they were to be taken, so they are "
                "not points: the program clears .grad within the backward pass. Clear it after backward, or call "
                "grafter.dump where it is used (an optimizer of torch's that steps there is seen)",
                self.lost.total(), counts, ", ..." if len(self.lost) > 3 else "",
            )  # fmt: skip
        if self._optimizer_hook is not None:
            self._optimizer_hook.remove()
            self._optimizer_hook = None
        if self._arrived:
            names = ", ".join(name.name for name, _ in list(self._arrived.values())[:3])
            logger.warning(
                "grafter: %d gradients of weights (%s%s) were to be taken when an optimizer steps, and none has "
                "stepped since they came, so they are not points. Of an optimizer that is none of torch's, call "
                "grafter.dump yourself, or take them at each backward pass (GRAFTER_WEIGHT_GRADIENTS=backward)",
                len(self._arrived), names, ", ..." if len(self._arrived) > 3 else "",
            )  # fmt: skip
            self._arrived.clear()


def _gradient_of(parameter: torch.Tensor) -> torch.Tensor | None:
    """Megatron adds to a buffer of its own."""
    return parameter.grad if parameter.grad is not None else getattr(parameter, "main_grad", None)
