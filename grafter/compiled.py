"""Points inside a compiled region, without a break in its graph: an operator that the compiler leaves where it is.

The operator declares that it changes a token, so that it is neither removed nor moved past another point, and never
that it changes the value: it returns a new tensor. What a point is called, and whether any filter could ever match it,
is settled when the code is traced; what matches is asked again at each call, since the step and the context change.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import Any

import torch

from grafter.backward.gradients import WatchedGradient
from grafter.errors import UsageError
from grafter.grafter import Grafter
from grafter.points import traced_call_site

# What the code is traced into, in place of the number of a site.
BREAK, NOTHING = -1, -2


@dataclass(frozen=True)
class Site:
    """One `dump` in compiled code: what its operator does when it runs."""

    name: str
    arguments: tuple[tuple[str, Any], ...]
    call_site: str
    has_gradient: bool


_sites: list[Site] = []
_known: dict[Site, int] = {}
_grafter: Grafter | None = None
_token = torch.zeros(0)
_NO_GRADIENT = -1
# Gradients that are to come, by a number that the graph carries from the point to its gradient.
_expected: dict[int, WatchedGradient] = {}
_numbers = itertools.count()


def find_site(grafter: Grafter, name: str, arguments: tuple[tuple[str, Any], ...], *, has_gradient: bool) -> int:
    """Called while code is traced: the number of a site, or BREAK (the call breaks the graph and runs as in eager
    code),

    or NOTHING (no filter can ever match: the call is left out).
    """
    global _grafter
    _grafter = grafter
    verdict = grafter.compiled_verdict(name, dict(arguments))
    if verdict != "operator":
        return BREAK if verdict == "break" else NOTHING
    site = Site(name, arguments, _users_line(), has_gradient)
    number = _known.get(site)
    if number is None:
        number = _known[site] = len(_sites)
        _sites.append(site)
    return number


def _users_line() -> str:
    frames = torch._guards.TracingContext.extract_stack()
    own = [frame for frame in frames if "/grafter/__init__.py" not in frame.filename.replace("\\", "/")]
    if not own:
        return "compiled code"
    return f"{own[-1].filename}:{own[-1].lineno} in {own[-1].name} (compiled)"


@torch.library.custom_op("grafter::point", mutates_args=("token",))
def _point(value: torch.Tensor, token: torch.Tensor, site: int) -> tuple[torch.Tensor, torch.Tensor]:
    """What is handed on, and the number of the gradient that is to come (below 0: none is)."""
    assert _grafter is not None
    point = _sites[site]
    if torch._C._current_graph_task_id() != -1:
        _refuse_replay(point)
        return value.clone(), torch.tensor(_NO_GRADIENT)
    reset = traced_call_site.set(point.call_site)
    try:
        # The graph around the operator records gradients; in here is only the value.
        result: torch.Tensor = _grafter.dump_point(point.name, value, dict(point.arguments))
        number = _expect_gradient(_grafter, point) if point.has_gradient else _NO_GRADIENT
    finally:
        traced_call_site.reset(reset)
    # An operator's result has memory of its own.
    return value.clone() if result is value else result, torch.tensor(number)


@_point.register_fake
def _(value: torch.Tensor, token: torch.Tensor, site: int) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.empty_like(value), torch.empty((), dtype=torch.int64)


def _refuse_replay(point: Site) -> None:
    """The backward pass repeats this part of the forward pass (checkpointing). A comparison was made already."""
    assert _grafter is not None
    if point.has_gradient or not _grafter.is_only_compared(point.name, dict(point.arguments)):
        raise UsageError(
            f"the point {point.name!r} at {point.call_site} is in a checkpointed region of compiled code, which the "
            "backward pass repeats. What was grafted there is not kept for that, nor is its gradient a point. Dump it "
            "outside of the region, compile without checkpointing, or only compare its forward value."
        )


def _expect_gradient(grafter: Grafter, point: Site) -> int:
    assert grafter.gradients is not None
    watched = grafter.gradients.expect(point.name, dict(point.arguments))
    if watched is None:
        return _NO_GRADIENT
    number = next(_numbers)
    _expected[number] = watched
    return number


@torch.library.custom_op("grafter::gradient", mutates_args=("token",))
def _gradient(gradient: torch.Tensor, token: torch.Tensor, number: torch.Tensor) -> torch.Tensor:
    watched = _expected.pop(int(number), None)
    if watched is None or _grafter is None or _grafter.gradients is None:
        return gradient.clone()
    replaced = _grafter.gradients.came(watched, gradient)
    return gradient.clone() if replaced is None or replaced is gradient else replaced


@_gradient.register_fake
def _(gradient: torch.Tensor, token: torch.Tensor, number: torch.Tensor) -> torch.Tensor:
    like: torch.Tensor = torch.empty_like(gradient)
    return like


class _StraightThrough(torch.autograd.Function):
    """The gradient of what comes out is that of what went in, as a graft with `write=return` has it in eager code."""

    @staticmethod
    def forward(ctx: Any, value: torch.Tensor, token: torch.Tensor, site: int) -> torch.Tensor:
        result: torch.Tensor = _point(value, token, site)[0]
        return result

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        return gradients[0], None, None


class _WithGradient(torch.autograd.Function):
    """The same, where the gradient is a point, too: an operator in the backward graph."""

    @staticmethod
    def forward(ctx: Any, value: torch.Tensor, token: torch.Tensor, site: int) -> torch.Tensor:
        result, number = _point(value, token, site)
        ctx.save_for_backward(number)
        handed_on: torch.Tensor = result
        return handed_on

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        (number,) = ctx.saved_tensors
        return _gradient(gradients[0], _token, number), None, None


def offer_traced(value: torch.Tensor, site: int, has_gradient: bool) -> torch.Tensor:
    """What traced code calls."""
    function: Any = _WithGradient if has_gradient else _StraightThrough
    through: torch.Tensor = function.apply(value, _token, site)
    return through
