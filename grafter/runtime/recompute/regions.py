"""Regions: parts of the program that backward computes again, and where in them this thread is.

A region begins with its forward pass. What its points do there is kept on it, in the order of their firing; its step
and context are those of its start. A recomputation goes through the points again and counts their firings anew.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextvars import ContextVar
from dataclasses import dataclass, field
from types import FrameType
from typing import Any

import torch
import torch.utils.checkpoint

from grafter.core.points import FORWARD, PointContext, PointKey, StepCounter, identify, point_context
from grafter.errors import UsageError

# Whose point (the id of a Grafter's counter), its phase, its name, its identifying tags.
Point = tuple[int, str, str, str]

# The step counters of all open Grafters.
open_counters: list[StepCounter] = []

_ON_CONTEXT = "_grafter_region"


@dataclass(eq=False)
class Region:
    """What was around the start of a region's forward pass, and what its points did.

    is_differentiated: autograd differentiates the recomputed graph (reentrant regions, the user's own), rather than the
        graph of the forward pass, for which the recomputation only supplies saved tensors.
    is_whole: its recomputation has a start that is seen, so that its points come with the same tags again.
    is_adopted: its forward pass began before it was seen; what was around its start is found out from its points.
    """

    is_differentiated: bool
    is_whole: bool = True
    is_adopted: bool = False
    around: PointContext = field(default_factory=point_context.get)
    steps: dict[int, int] = field(default_factory=lambda: {id(counter): counter.step for counter in open_counters})
    kept: dict[Point, list[Any]] = field(default_factory=dict)
    # Of a user's own Function, whose recomputation has no start that we see: (graph task, recomputation).
    last_run: tuple[int, Recomputation] | None = None

    def keep(self, counter: StepCounter, entry: Any) -> None:
        """entry: what is to be known of a point when it fires again; `entry.key` says which point it is."""
        key: PointKey = entry.key
        self.kept.setdefault((id(counter), key.phase, key.name, repr(key.identifying)), []).append(entry)

    def forget(self) -> None:
        """Its graph is gone."""
        self.kept.clear()
        self.last_run = None


class Recomputation:
    """One recomputation of a region, from its start to where it has made what was needed."""

    def __init__(self, region: Region) -> None:
        self.region = region
        self.has_cut = False
        self._fired: dict[Point, int] = {}

    def step_of(self, counter: StepCounter) -> int:
        return self.region.steps.get(id(counter), counter.step)

    def next_kept(
        self,
        counter: StepCounter,
        name: str,
        own: dict[str, Any],
        identifying_tags: frozenset[str] | None,
        phase: str = FORWARD,
    ) -> Any:
        """What the same firing of this point has kept in the forward pass; None if it did not fire or match there.

        own: the tags of the call itself. Raises UsageError where several points of the forward pass fit.
        """
        tags = {**point_context.get().tags, **own}
        point = (id(counter), phase, name, repr(identify(tags, identifying_tags)))
        if not self.region.is_whole and point not in self.region.kept:
            point = self._fitting(point, dict(identify(own, identifying_tags)))
        firings = self.region.kept.get(point, ())
        number = self._fired.get(point, 0)
        self._fired[point] = number + 1
        return firings[number] if number < len(firings) else None

    def _fitting(self, point: Point, own: dict[str, Any]) -> Point:
        """The one point of the forward pass with the tags of this call, whatever else was around it."""
        fitting = [
            known
            for known, firings in self.region.kept.items()
            if known[:3] == point[:3] and own.items() <= dict(firings[0].key.identifying).items()
        ]
        if len(fitting) > 1:
            keys = ", ".join(str(self.region.kept[known][0].key) for known in fitting[:4])
            raise UsageError(
                f"the point {point[2]!r} fires in a recomputation, and {len(fitting)} points of the forward pass fit: "
                f"{keys}. Give the call itself tags that tell them apart (of a `context` outside of a recomputed "
                f"function nothing is known here), or use torch.utils.checkpoint."
            )
        return fitting[0] if fitting else point

    def why_unknown(self, name: str, site: str) -> str:
        """Of a point that matches a filter, and has no counterpart."""
        known = sorted({str(firings[0].key) for point, firings in self.region.kept.items() if point[1] == FORWARD})
        if known:
            return (
                f"the point {name!r} at {site} fires in a recomputation, and did not fire (so often) in the forward "
                f"pass of this region, where these did: {', '.join(known[:8])}. The other job does not come to it "
                "again. A recomputed region must do the same both times, with the same tags."
            )
        return (
            f"the point {name!r} at {site} is in a recomputation (code that runs with grad enabled during backward) "
            "of which grafter has not seen the forward pass, or nothing of it matched; the other job does not come "
            "to it again. Known are regions of torch.utils.checkpoint, and a torch.autograd.Function whose "
            "`forward(ctx, ...)` ran the point and whose `backward` runs it again. Dump outside of the recomputed "
            "part, or switch recomputation off."
        )


# The regions in whose forward pass, and the recomputations in which, this thread is now; the innermost is the last.
scopes: ContextVar[tuple[Region | Recomputation, ...]] = ContextVar("grafter_scopes", default=())


def begin(region: Region) -> None:
    scopes.set((*scopes.get(), region))


def end(region: Region) -> None:
    scopes.set(tuple(scope for scope in scopes.get() if scope is not region))


def current_recomputation() -> Recomputation | None:
    """The recomputation in which this thread is; None in a forward pass, and in plain backward code."""
    around = scopes.get()
    if around:
        if any(isinstance(scope, Region) and scope.is_adopted for scope in around):
            _look_after_adopted()
        for scope in reversed(around):
            if isinstance(scope, Recomputation):
                return scope
    # Autograd runs backward code with grad disabled, unless a graph of it is asked for.
    if torch._C._current_graph_task_id() != -1 and torch.is_grad_enabled():
        return _recomputation_of_a_function()
    return None


def is_graph_differentiated() -> bool:
    """Whether autograd goes backward through the graph that is recorded now, and not through an earlier one."""
    recomputation = current_recomputation()
    return recomputation is None or recomputation.region.is_differentiated


def regions_in_forward() -> list[Region]:
    """The regions to which a point that fires now belongs: those begun since the innermost recomputation began."""
    regions: list[Region] = []
    for scope in reversed(scopes.get()):
        if isinstance(scope, Recomputation):
            break
        regions.append(scope)
    if not torch.is_grad_enabled() and not torch.is_inference_mode_enabled():
        regions += _regions_of_functions(sys._getframe(1))
    return regions


# Adopted regions. Nobody tells us when they end, so the stack is searched for them.


def _look_after_adopted() -> None:
    functions = [getattr(holder, attribute) for holder, attribute in checkpoint_calls(sys._getframe(1))]
    running = [getattr(function, "region", None) for function in functions]
    for scope in scopes.get():
        if isinstance(scope, Region) and scope.is_adopted:
            if scope in running:
                scope.around = _common(scope.around, point_context.get())
            else:
                end(scope)


def _common(one: PointContext, other: PointContext) -> PointContext:
    """The innermost context that both are in."""
    others = []
    outer: PointContext | None = other
    while outer is not None:
        others.append(outer)
        outer = outer.outer
    while one.outer is not None and not any(one is known for known in others):
        one = one.outer
    return one


def checkpoint_calls(frame: FrameType | None) -> Iterator[tuple[Any, str]]:
    """Each running forward pass of a region, innermost first: (object that has the function, its attribute)."""
    own_file = torch.utils.checkpoint.__file__
    while frame is not None:
        if frame.f_code.co_filename == own_file:
            for local in list(frame.f_locals.values()):
                if isinstance(local, torch.autograd.function.FunctionCtx) and hasattr(local, "run_function"):
                    yield local, "run_function"
                generator_frame = getattr(local, "gi_frame", None)
                for inner in list(generator_frame.f_locals.values()) if generator_frame is not None else ():
                    if isinstance(inner, torch.utils.checkpoint._CheckpointFrame):
                        yield inner, "recompute_fn"
        frame = frame.f_back


# A user's own autograd.Function, which may run its forward again in its backward. Its context is the graph's node.


def _regions_of_functions(frame: FrameType | None) -> Iterator[Region]:
    """A region for each autograd.Function in whose `forward` this thread is, innermost first."""
    while frame is not None:
        code = frame.f_code
        if code.co_name == "forward" and code.co_argcount and code.co_varnames[0] != "self":
            context = frame.f_locals.get(code.co_varnames[0])
            # That of torch.utils.checkpoint has regions that begin and end; those of compiled code repeat no Python.
            is_torchs = getattr(getattr(context, "_forward_cls", None), "__module__", "").startswith("torch.")
            if isinstance(context, torch.autograd.function.FunctionCtx) and not is_torchs:
                if not hasattr(context, _ON_CONTEXT):
                    setattr(context, _ON_CONTEXT, Region(is_differentiated=True, is_whole=False))
                yield getattr(context, _ON_CONTEXT)
        frame = frame.f_back


def _recomputation_of_a_function() -> Recomputation:
    """The recomputation in a Function's backward; or of a region that knows no point, where there is no such one."""
    region = getattr(torch._C._current_autograd_node(), _ON_CONTEXT, None)
    if region is None:
        return Recomputation(Region(is_differentiated=True))
    graph_task = torch._C._current_graph_task_id()
    if region.last_run is None or region.last_run[0] != graph_task:
        region.last_run = (graph_task, Recomputation(region))
        if not keeps_graph():
            torch.autograd.Variable._execution_engine.queue_callback(region.forget)
    run: Recomputation = region.last_run[1]
    return run


def keeps_graph() -> bool:
    """Whether the backward pass that runs leaves its graph for another one."""
    return bool(torch._C._autograd._get_current_graph_task_keep_graph())
