"""Points inside a compiled region, without a break in its graph: operators that the compiler leaves where they are.

An operator declares that it changes a token, so that it is neither removed nor moved past another point. It does not
declare that it changes the value: a comparison returns nothing, and a graft a new tensor. A point's name, and whether
any filter could ever match it, are known when the code is traced. Filters are evaluated at each call, since the step
and the context change. Hooks of several modules may share a graph, so an argument says which of them is called.

    grafter::compare    compares a value
    grafter::point      returns what replaces a value, and the number of the gradient to come
    grafter::gradient   the same for that gradient, in the backward graph
    grafter::notice     reports an event between points: a call of a model begins or ends
"""

from __future__ import annotations

import itertools
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from grafter.capture.operators import define
from grafter.core.points import PointKey, is_passed_over, split_options, traced_call_site
from grafter.errors import UsageError
from grafter.runtime.gradients.watched import SavedGradient, WatchedGradient
from grafter.runtime.point_host import PointHost
from grafter.runtime.recompute.regions import current_recomputation

# Results of `find_site` that are not the number of a site.
BREAK, NOTHING = -1, -2

_NO_GRADIENT = -1
# The phase under which a checkpointed region keeps the numbers of gradients.
_NUMBERS = "number of the gradient"


@dataclass(frozen=True)
class Site:
    """One point in compiled code, which its operator executes.

    suffix: for a hook's point, its path in the module's inputs or outputs. The module is known when the operator runs.
    """

    grafter: PointHost
    name: str
    arguments: tuple[tuple[str, Any], ...]
    call_site: str
    has_gradient: bool
    only_compares: bool
    suffix: str | None


class Hooked(Protocol):
    """A module's points, as the operators of its hooks use them."""

    fired: bool

    def tags_and_key(self, suffix: str) -> tuple[dict[str, Any], str]:
        """The tags of the point with this suffix, and the announcement that it counts as."""
        ...


@dataclass(frozen=True)
class _OperatorCall:
    """One run of an operator."""

    site: Site
    arguments: dict[str, Any]
    module: str | None


@dataclass(frozen=True)
class _KeptNumber:
    """The number of a gradient, kept by a checkpointed region, whose recomputation returns it again."""

    key: PointKey
    number: int


_sites: list[Site] = []
_known: dict[Site, int] = {}
# The operators declare that they change these, in the forward graph and in the backward graph.
_token, _backward_token = torch.zeros(0), torch.zeros(0)
# The expected gradients, by a number that the graph carries from a point to its gradient.
_expected: dict[int, tuple[PointHost, WatchedGradient | SavedGradient]] = {}
_numbers = itertools.count()
_hooked: weakref.WeakValueDictionary[int, Hooked] = weakref.WeakValueDictionary()
_hook_numbers = itertools.count()
_noticed: list[Callable[[], None]] = []
# For a point that is not a hook's.
NO_HOOK = torch.tensor(-1)


def number_of_hooks(points: Hooked) -> torch.Tensor:
    """The number by which operators know the module of a hook: a tensor, int64, without dimensions.

    A Python number would be a constant of the graph, which could then serve only this module.
    """
    number = next(_hook_numbers)
    _hooked[number] = points
    return torch.tensor(number)


def notice_in_graph(happens: Callable[[], None]) -> Callable[[], None]:
    """A function that traced code can call, and that becomes an operator which calls `happens`."""
    # Dynamo guards on this string, so that no graph is reused for another function.
    number = str(len(_noticed))
    _noticed.append(happens)

    def notice() -> None:
        _notice_op(_token, _as_constant(number))

    return notice


def _as_constant(number: str) -> int:
    return int(number)


_as_constant._dynamo_marked_constant = True  # type: ignore[attr-defined]


def find_site(
    grafter: PointHost,
    name: str,
    arguments: tuple[tuple[str, Any], ...],
    *,
    has_gradient: bool,
    suffix: str | None = None,
) -> int:
    """The number of the site of a point in code that is being traced.

    Or BREAK (the call breaks the graph and runs as in eager code), or NOTHING (no filter can ever match, and the call
    is left out).
    """
    verdict = grafter.trace(name, dict(arguments))
    if verdict.kind != "operator":
        return BREAK if verdict.kind == "break" else NOTHING
    only_compares = not has_gradient and verdict.only_compares
    site = Site(grafter, name, arguments, _users_line(), has_gradient, only_compares, suffix)
    number = _known.get(site)
    if number is None:
        number = _known[site] = len(_sites)
        _sites.append(site)
    return number


def _users_line() -> str:
    frames = torch._guards.TracingContext.extract_stack()
    own = [frame for frame in frames if not is_passed_over(frame.filename)]
    if not own:
        return "compiled code"
    return f"{own[-1].filename}:{own[-1].lineno} in {own[-1].name} (compiled)"


def _compare(value: torch.Tensor, token: torch.Tensor, hook: torch.Tensor, site: int) -> None:
    call = _call_of(site, hook)
    if call is not None and not _is_replayed():
        _meet(call, value)


def _point(
    value: torch.Tensor, token: torch.Tensor, hook: torch.Tensor, site: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """The value to use instead, and the number of the gradient to come (below 0: none)."""
    call = _call_of(site, hook)
    if call is None:
        return value.clone(), torch.tensor(_NO_GRADIENT)
    if _is_replayed():
        raise UsageError(
            f"the point {call.site.name!r} at {call.site.call_site} is in a part of compiled code that the backward "
            "pass repeats, by other means than torch.utils.checkpoint's regions. Grafted values are not kept for that, "
            "and gradients there are not points. Dump it outside of that part, compile without recomputation, or only "
            "compare its forward value."
        )
    result = _meet(call, value)
    number = _number_of_gradient(call) if call.site.has_gradient else _NO_GRADIENT
    return _as_promised(value, result), torch.tensor(number)


def _notice(token: torch.Tensor, number: int) -> None:
    _refuse_capture("a call of a model whose calls are counted as steps")
    if torch._C._current_graph_task_id() == -1:
        _noticed[number]()


def _call_of(number: int, hook: torch.Tensor) -> _OperatorCall | None:
    """One run of an operator; None if its hook was removed, or while the rank warms up."""
    site = _sites[number]
    if site.grafter.is_warming_up:
        return None
    if site.suffix is None:
        return _OperatorCall(site, dict(site.arguments), None)
    points = _hooked.get(int(hook))
    if points is None:
        return None
    points.fired = True
    tags, module = points.tags_and_key(site.suffix)
    return _OperatorCall(site, {**dict(site.arguments), **tags}, module)


def _is_replayed() -> bool:
    """Whether the backward pass repeats a part of the forward pass whose grafted values no region has kept."""
    if torch._C._current_graph_task_id() == -1:
        return False
    with torch.no_grad():
        return current_recomputation() is None


def _refuse_capture(what: str) -> None:
    """Raise UsageError in a CUDA graph capture, even if nothing matches now: a replay would not evaluate filters."""
    if torch.cuda.is_initialized() and torch.cuda.is_current_stream_capturing():  # type: ignore[no-untyped-call]
        raise UsageError(
            f"{what} is in a CUDA graph capture, whose replay would repeat this call's values without the other job. "
            "Compile this part without CUDA graphs (`mode='default'`) while grafting."
        )


def _meet(call: _OperatorCall, value: torch.Tensor) -> torch.Tensor:
    _refuse_capture(f"the point {call.site.name!r} at {call.site.call_site}")
    reset = traced_call_site.set(call.site.call_site)
    try:
        # The graph around the operator records gradients.
        with torch.no_grad():
            result: torch.Tensor = call.site.grafter.dump_point(
                call.site.name, value, dict(call.arguments), call.module
            )
    finally:
        traced_call_site.reset(reset)
    return result


def _as_promised(value: torch.Tensor, result: torch.Tensor) -> torch.Tensor:
    """The result with the strides that the compiler expects, in memory that is not the value's."""
    if result is not value and result.stride() == torch.empty_like(value, device="meta").stride():
        return result
    return torch.empty_like(value).copy_(result)


def _number_of_gradient(call: _OperatorCall) -> int:
    grafter, name = call.site.grafter, call.site.name
    assert grafter.gradients is not None
    recomputation = current_recomputation()
    if recomputation is not None and not recomputation.region.is_differentiated:
        # The forward pass's graph is differentiated, and has this number.
        own, _ = split_options(call.arguments)
        steps, key_tags = grafter.context.steps, grafter.context.config.key_tags
        kept: _KeptNumber | None = recomputation.next_kept(steps, name, own, key_tags, _NUMBERS)
        return _NO_GRADIENT if kept is None else kept.number
    reset = traced_call_site.set(call.site.call_site)
    try:
        watched = grafter.gradients.expect(name, call.arguments, call.module)
    finally:
        traced_call_site.reset(reset)
    if watched is None:
        return _NO_GRADIENT
    number = next(_numbers)
    _expected[number] = grafter, watched
    grafter.recomputations.keep_entry(_KeptNumber(watched.key._replace(phase=_NUMBERS), number))
    return number


def _gradient(gradient: torch.Tensor, token: torch.Tensor, number: torch.Tensor) -> torch.Tensor:
    _refuse_capture("the gradient of a point")
    grafter, watched = _expected.pop(int(number), (None, None))
    if grafter is None or watched is None or grafter.gradients is None:
        return gradient.clone()
    replaced = grafter.gradients.came(watched, gradient)
    return _as_promised(gradient, gradient if replaced is None else replaced)


def _fake_point(value: torch.Tensor, *_: Any) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.empty_like(value), torch.empty((), dtype=torch.int64)


_SCHEMA = "(Tensor value, Tensor(a!) token, Tensor hook, int site)"
_compare_op = define(f"compare{_SCHEMA} -> ()", _compare, lambda *_: None)
_point_op = define(f"point{_SCHEMA} -> (Tensor, Tensor)", _point, _fake_point)
_notice_op = define("notice(Tensor(a!) token, int number) -> ()", _notice, lambda *_: None)
_gradient_op = define(
    "gradient(Tensor gradient, Tensor(a!) token, Tensor number) -> Tensor",
    _gradient,
    lambda gradient, *_: torch.empty_like(gradient),
)


class _Graft(torch.autograd.Function):
    """A graft whose gradient passes unchanged to the replaced tensor, as with `write=return` in eager code."""

    @staticmethod
    def forward(ctx: Any, value: torch.Tensor, token: torch.Tensor, hook: torch.Tensor, site: int) -> torch.Tensor:
        result: torch.Tensor = _point_op(value, token, hook, site)[0]
        return result

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor, None, None, None]:
        return gradients[0], None, None, None


class _GraftWithGradient(torch.autograd.Function):
    """A graft whose gradient is a point, too: an operator in the backward graph."""

    @staticmethod
    def forward(ctx: Any, value: torch.Tensor, token: torch.Tensor, hook: torch.Tensor, site: int) -> torch.Tensor:
        result, number = _point_op(value, token, hook, site)
        ctx.save_for_backward(number)
        handed_on: torch.Tensor = result
        return handed_on

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor, None, None, None]:
        (number,) = ctx.saved_tensors
        return _gradient_op(gradients[0], _backward_token, number), None, None, None


def offer_traced(value: torch.Tensor, site: int, hook: torch.Tensor = NO_HOOK) -> torch.Tensor:
    """The value to use instead; the value itself if it is only compared."""
    kind = _kind_of(site)
    if kind == "compare":
        _compare_op(value, _token, hook, site)
        return value
    if kind == "gradient":
        watched: torch.Tensor = _GraftWithGradient.apply(value, _token, hook, site)  # type: ignore[no-untyped-call]
        return watched
    if torch.is_grad_enabled() and value.requires_grad:
        through: torch.Tensor = _Graft.apply(value, _token, hook, site)  # type: ignore[no-untyped-call]
        return through
    result: torch.Tensor = _point_op(value, _token, hook, site)[0]
    return result


def _kind_of(site: int) -> str:
    point = _sites[site]
    return "gradient" if point.has_gradient else "compare" if point.only_compares else "graft"


_kind_of._dynamo_marked_constant = True  # type: ignore[attr-defined]
