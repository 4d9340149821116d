"""Gradients: the gradient of a point is a point, too, of phase backward, with the tags of its forward point.

Which points there are is settled in the forward pass, in the order of the program; autograd's own order may differ
between the two jobs (eager and compiled code differ). So senders never wait inside of the backward pass: they keep a
copy of each gradient, and serve the receivers at its end, in the order in which those ask. Receivers wait where the
gradient is, and hand the grafted one on.

    forward     register: key, direction and options of each tensor's gradient      (this file)
    backward    a gradient arrives; at the end of the pass senders serve            (pending, requests)
    outcome     saved, deferred, skipped or exchanged                               (outcomes)
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch.utils import _pytree as pytree

from grafter.config.names import PointName
from grafter.core.point_fate import fate_of
from grafter.core.points import call_site, check_tags, point_context, split_options
from grafter.runtime.dispatch import Dispatch
from grafter.runtime.gradients.outcomes import GradientOutcomes
from grafter.runtime.gradients.parameters import ParameterGradients
from grafter.runtime.gradients.pending import PendingGradients
from grafter.runtime.gradients.watched import BACKWARD, SavedGradient, WatchedGradient
from grafter.runtime.point_preparation import Point, PointTools
from grafter.runtime.rank_context import RankContext
from grafter.runtime.recompute.regions import current_recomputation
from grafter.runtime.session import Session

Register = Callable[[str], WatchedGradient | SavedGradient | None]


class GradientPoints:
    """The gradients of one rank's points, and of its parameters."""

    def __init__(self, context: RankContext, tools: PointTools, dispatch: Dispatch) -> None:
        self._context, self._tools, self._lifecycle = context, tools, dispatch.lifecycle
        self.outcomes = GradientOutcomes(context, tools, dispatch)
        self.pending = PendingGradients(self.outcomes)
        self._parameters = ParameterGradients(context, tools, self.outcomes)
        self._end_is_queued = self._parameters_are_queued = False

    # In the forward pass.

    def watch(self, name: str, value: Any, arguments: dict[str, Any], module: str | None) -> None:
        """Called after a point whose value autograd will differentiate, or may, once it is recomputed."""
        register = self._register(name, arguments, module)
        with self._context.lock:
            if torch.is_grad_enabled():
                self._hook_tensors(value, register)
            else:
                self._tools.recomputations.keep_gradients(value, register)

    def _hook_tensors(self, value: Any, register: Register) -> None:
        for path, tensor in _tensors_in(value):
            if tensor.requires_grad and tensor.dtype.is_floating_point | tensor.dtype.is_complex:
                watched = register(path)
                self.pending.add(watched)
                if watched is not None:
                    tensor.register_hook(_Hook(self, watched))  # type: ignore[no-untyped-call]

    def _register(self, name: str, arguments: dict[str, Any], module: str | None) -> Register:
        """Of the path of a tensor in the point's value: its gradient's point, where a filter matches that."""
        context, rules = self._context, self._context.rules
        steps, key_tags = context.steps, context.config.key_tags
        around = point_context.get()
        own, _ = split_options(arguments)
        tags, given = split_options({**around.tags, **arguments})
        save_option = given.pop("save", None)
        given = {option: value for option, value in {**around.options, **given}.items() if option != "extras"}

        def register(path: str) -> WatchedGradient | SavedGradient | None:
            point = name + path
            recomputation = current_recomputation()
            if recomputation is not None:
                # Its place in the order of the program is that of the forward pass.
                return recomputation.next_kept(steps, point, own, key_tags, BACKWARD)  # type: ignore[no-any-return]
            full = {**tags, "name": point, "step": steps.step, "phase": BACKWARD}
            direction = rules.filters.direction_of(full)
            is_chosen = rules.filters.saves({**full, "save": save_option})
            saves = self._tools.dumps.accepts(direction, steps.step, is_chosen=is_chosen)
            if direction is None and not saves:
                return None
            options = rules.options.options_of(point, given)
            fate = fate_of(self._lifecycle.situation_of(direction, options, is_saved=saves))
            if fate == "ignore" or not options.gradients:
                return None
            check_tags(tags)
            key = steps.next_key({**tags, "name": point}, key_tags, BACKWARD)
            options = replace(options, write="return", gradient="straight_through")
            gradient = Point(key, direction, options, dict(tags), call_site(), module)
            if fate in ("save", "record"):
                return SavedGradient(gradient)
            return WatchedGradient(gradient, saves)

        return register

    def expect(
        self, name: str, arguments: dict[str, Any], module: str | None = None
    ) -> WatchedGradient | SavedGradient | None:
        """The gradient of a point in compiled code, which calls `came` itself; None if it is not a point."""
        with self._context.lock:
            watched = self._register(name, arguments, module)("")
            self.pending.add(watched)
            return watched

    # In the backward pass.

    def came(self, watched: WatchedGradient | SavedGradient, gradient: torch.Tensor) -> torch.Tensor | None:
        """A gradient has arrived; what replaces it, or None if it stays as it is."""
        with self._context.lock, torch.no_grad():
            if isinstance(watched, SavedGradient):
                self.outcomes.save(watched, gradient)
                return None
            self.outcomes.snapshot(watched, gradient)
            replacement = self.pending.came(watched, gradient)
            if watched.gradient is not None:
                # It is offered, and served at the end of the pass.
                self._queue_end()
            return replacement

    def parameter_came(self, name: PointName, parameter: torch.Tensor) -> None:
        """The gradient of a parameter has been added to."""
        self._parameters.came(name, parameter)
        if not self._parameters.waits_for_optimizer:
            self._queue_end()

    def _queue_end(self) -> None:
        if not self._end_is_queued:
            self._end_is_queued = True
            _call_after_backward(self._end_of_backward)

    def _end_of_backward(self) -> None:
        self._end_is_queued = False
        with self._context.lock, torch.no_grad():
            self.pending.serve()
        parameters = self._parameters
        if not (parameters.is_empty or parameters.waits_for_optimizer or self._parameters_are_queued):
            # FSDP2 and DDP end their reductions in callbacks of their own, which may be queued behind this one, but
            # before one that is queued now.
            self._parameters_are_queued = True
            _call_after_backward(self._read_parameters)

    def _read_parameters(self) -> None:
        self._parameters_are_queued = False
        self._parameters.read()

    # At the end.

    def end_step(self, session: Session | None) -> None:
        """Nothing of this step arrives any more. Called under the lock. session: None before the first point."""
        # A backward pass that failed has not called back.
        self._end_is_queued = self._parameters_are_queued = False
        self._parameters.end_step()
        self.pending.end_step(session)

    def close(self) -> None:
        """The run is over: log what was lost, and count it."""
        self._parameters.close()
        self._context.tally.gradients_lost.update(self._parameters.lost)
        self._context.tally.gradients_late.update(self.pending.late)


class _Hook:
    """A tensor's hook. A class, so that a graph that is kept shows what it keeps."""

    def __init__(self, points: GradientPoints, watched: WatchedGradient | SavedGradient) -> None:
        self._points, self._watched = points, watched

    def __call__(self, gradient: torch.Tensor) -> torch.Tensor | None:
        return self._points.came(self._watched, gradient)


def _call_after_backward(function: Callable[[], None]) -> None:
    """Autograd calls it once the backward pass that runs now is over, after what was queued before."""
    torch.autograd.Variable._execution_engine.queue_callback(function)


def _tensors_in(value: Any) -> list[tuple[str, torch.Tensor]]:
    if isinstance(value, torch.Tensor):
        return [("", value)]
    flat, _ = pytree.tree_flatten_with_path(value)
    return [(pytree.keystr(path), leaf) for path, leaf in flat if isinstance(leaf, torch.Tensor)]
