"""How sure a pair is, and the reasons in words."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from grafter.analysis.plan_suggest.pairs import Confidence, Found, Fused, Left, Pair, Side
from grafter.analysis.plan_suggest.shapes import Relation
from grafter.analysis.plan_suggest.tree import Module, Region
from grafter.analysis.plan_suggest.vocabulary import ALIKE, KNOWN, SAME, class_likeness, name_likeness

# The margin by which a pair's score must exceed the next best one of either module, so that no other is a close match.
_CLEAR, _NARROW = 1.0, 0.3


def judge_leaf(
    baseline: Module,
    target: Module,
    relation: Relation,
    margin: float,
    like_baseline: Sequence[Module],
    like_target: Sequence[Module],
    ratios: tuple[int, ...],
) -> Pair:
    """The pair of two modules with weights.

    like_baseline: modules of the target whose shapes fit the baseline's; like_target: the other way round. The
    confidence is high only if the shapes fit, and either the names agree or there is no other candidate.
    """
    likeness = name_likeness(baseline.segment, target.segment)
    alone = len(like_baseline) == len(like_target) == 1
    reasons = [shape_reason(baseline, target, relation), name_reason(baseline, target)]
    undivided = bool(ratios) and relation.kind == "equal" and likeness < SAME and _could_be_divided(baseline, target)
    in_order = relation.fits and _same_place(baseline, target, like_baseline, like_target)
    if alone:
        reasons.append("no other has this shape")
    elif in_order:
        reasons.append("order equal")
    if undivided:
        reasons.append("not divided, as others are")
    if not relation.fits:
        confidence = Confidence.low
    elif (
        relation.kind in ("equal", "divided")
        and not relation.missing
        and not undivided
        and margin >= _CLEAR
        and (likeness >= KNOWN or (alone and likeness >= 0))
    ):
        confidence = Confidence.high
    elif margin >= _NARROW and (likeness >= ALIKE or alone or in_order):
        confidence = Confidence.medium
    else:
        confidence = Confidence.low
        reasons.append("another fits nearly as well")
    return Pair(baseline, target, confidence, tuple(reasons), relation)


def judge_holder(baseline: Module, target: Module, overlap: float, surest: Confidence, *, alone: bool) -> Pair:
    """The pair of two modules that hold others.

    overlap: the share of their modules that are pairs.
    surest: the confidence of the least sure of these pairs.
    alone: no other module holds the same.
    """
    known = name_likeness(baseline.segment, target.segment) >= KNOWN
    reasons = [holder_reason(overlap), name_reason(baseline, target)]
    if overlap == 1 and (known or alone):
        confidence = max(surest, Confidence.medium) if known else surest
    elif known or overlap == 1:
        confidence = Confidence.medium
    else:
        confidence = Confidence.low
    return Pair(baseline, target, confidence, tuple(reason for reason in reasons if reason), same_inputs=overlap == 1)


def judge_bare(baseline: Module, target: Module) -> Pair:
    """The pair of two modules without weights. Without shapes to compare, the confidence is never high."""
    known = name_likeness(baseline.segment, target.segment) >= KNOWN
    alike = class_likeness(baseline.node.class_name, target.node.class_name) > 0
    confidence = Confidence.medium if known and alike else Confidence.low
    reasons = ("no weights to compare", name_reason(baseline, target), "classes alike" if alike else "classes unlike")
    return Pair(baseline, target, confidence, reasons)


def shape_reason(baseline: Module, target: Module, relation: Relation) -> str:
    if relation.kind == "divided":
        dims = sorted({dim for _, dim in relation.split})
        side = "the target's" if relation.ratio > 1 else "the baseline's"
        return f"shapes equal, {side} divided by {abs(relation.ratio)} in dim {', '.join(map(str, dims))}"
    text = {
        "equal": "shapes equal",
        "padded": f"shapes equal but for padded rows ({shapes_of(baseline)}, {shapes_of(target)})",
        "transposed": f"shapes transposed ({shapes_of(baseline)}, {shapes_of(target)})",
    }.get(relation.kind, f"shapes differ ({shapes_of(baseline)}, {shapes_of(target)})")
    return text + (f" but for {', '.join(relation.missing)}, which only one side has" if relation.missing else "")


def holder_reason(overlap: float) -> str:
    if overlap == 1:
        return "all in it is paired"
    return f"{overlap:.0%} of what is in it is paired" if overlap else "nothing in it is paired"


def name_reason(baseline: Module, target: Module) -> str:
    if not baseline.segment or not target.segment:
        return "" if baseline.segment or target.segment else "the models themselves"
    lists = baseline.parent, target.parent
    if baseline.segment == target.segment and baseline.segment.isdecimal() and all(lists):
        # A number says nothing about the names of the two lists that contain the modules.
        ours, theirs = (module.segment for module in lists if module is not None)
        if ours and theirs and ours != theirs:
            return f"numbers equal, names of the lists {_likeness_in_words(ours, theirs)}"
    return f"names {_likeness_in_words(baseline.segment, target.segment)}"


def _likeness_in_words(ours: str, theirs: str) -> str:
    likeness = name_likeness(ours, theirs)
    if likeness == SAME:
        return "equal"
    return "alike" if likeness >= ALIKE else "unlike"


def shapes_of(module: Module) -> str:
    """`256x128`, or the shapes of several weights."""
    return ", ".join("x".join(map(str, weight.shape)) or "scalar" for weight in module.weights.values())


def _same_place(
    baseline: Module, target: Module, like_baseline: Sequence[Module], like_target: Sequence[Module]
) -> bool:
    return len(like_baseline) == len(like_target) and like_target.index(baseline) == like_baseline.index(target)


def _could_be_divided(baseline: Module, target: Module) -> bool:
    weights = [*baseline.weights.values(), *target.weights.values()]
    return any(len(weight.shape) > 1 for weight in weights) and not all(weight.is_global for weight in weights)


# Why a module was left without a pair, in words.


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
