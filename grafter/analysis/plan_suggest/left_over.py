"""Why a module was left without a pair, in words."""

from __future__ import annotations

from collections.abc import Callable

from grafter.analysis.plan_suggest.judgement import shapes_of
from grafter.analysis.plan_suggest.pairs import Found, Fused, Left, Side
from grafter.analysis.plan_suggest.shapes import Relation
from grafter.analysis.plan_suggest.tree import Module, Region


def reasons_left(
    baseline: Region,
    target: Region,
    found: Found,
    fused: list[Fused],
    relation: Callable[[Module, Module], Relation],
) -> list[Left]:
    """For both sides, all modules that are in no pair, and the lists of layers without a partner."""
    partner = {pair.baseline: pair.target for pair in found.pairs}
    partner |= {pair.target: pair.baseline for pair in found.pairs}
    in_stacks = {stack for a, b, _ in found.stacks for stack in (a, b)}
    parts = {part: one for one in fused for part in one.parts}
    wholes = {one.whole: one for one in fused}
    left = []
    sides: tuple[tuple[Side, Region, Region], ...] = (("baseline", baseline, target), ("target", target, baseline))
    for side, own, other in sides:
        for stack in own.stacks:
            if stack not in in_stacks:
                left.append(Left(side, stack, f"no list of layers there is like these {len(stack.children)}"))
        for module in own.modules:
            if module in partner or module in in_stacks or not module.node.can_be_called:
                continue
            if module in wholes:
                reason = _whole_reason(wholes[module])
            elif module in parts:
                reason = f"is a part of {parts[module].whole.segment} there"
            elif module.weights:
                fitting = [o for o in other.leaves if _fits(relation, side, module, o)]
                reason = _leaf_reason(module, fitting, partner, {*parts, *wholes})
            elif module.shapes:
                reason = "nothing there holds the same"
            else:
                reason = "it has no weights, and none in its place there has a like name"
            left.append(Left(side, module, reason))
    return left


def _fits(relation: Callable[[Module, Module], Relation], side: Side, own: Module, other: Module) -> bool:
    return relation(own, other).fits if side == "baseline" else relation(other, own).fits


def _whole_reason(one: Fused) -> str:
    names = ", ".join(part.segment for part in one.parts)
    divided = f", divided by {abs(one.ratio)}" if one.ratio != 1 else ""
    return f"holds {names} of there in one (their rows{divided})"


def _leaf_reason(module: Module, fitting: list[Module], partner: dict[Module, Module], fused: set[Module]) -> str:
    shapes = shapes_of(module)
    if not fitting:
        return f"no module there has weights of {shapes}"
    taken = [f"{other.segment} ({partner[other].segment})" for other in fitting if other in partner]
    if taken and len(taken) == len([other for other in fitting if other not in fused]):
        return f"those of {shapes} there have other partners: {', '.join(taken[:3])}"
    return f"of {shapes} there is {fitting[0].segment}, which means something else"
