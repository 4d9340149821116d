"""Matches two module trees, region by region. The results of the single layers are merged over all layers."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, replace

from grafter.analysis.plan_suggest.region_matching import match_regions
from grafter.analysis.plan_suggest.shapes import Relation, common_ratios, relate
from grafter.analysis.plan_suggest.suggestion import Confidence, ModulePair, NamedLeft, NamedPair, Suggestion
from grafter.analysis.plan_suggest.tree import Module, linked, region_of
from grafter.analysis.plan_suggest.vocabulary import KNOWN, name_likeness
from grafter.capture.module_tree import ModuleTree
from grafter.core.points import OPTIONS, OWN_TAGS
from grafter.core.roles import Role


def match_trees(baseline: ModuleTree, target: ModuleTree) -> Suggestion:
    """Pair the modules of two models. Pure; the trees may be of models of any size, on any device."""
    ours, theirs = linked(baseline), linked(target)
    ratios = find_ratios(ours, theirs)
    trees = _TreeMatcher(ratios)
    trees.match(_Place(ours, ""), _Place(theirs, ""), Confidence.high, "")
    return Suggestion(
        baseline.class_name,
        target.class_name,
        tuple(trees.pairs()),
        tuple(trees.left()),
        ratios[0] if ratios else 1,
    )


def find_ratios(baseline: Module, target: Module) -> tuple[int, ...]:
    """The numbers by which tensor parallelism divides weights between the two, found from matrices with the same
    meaning.

    Empty if fewer than half of them are divided: two models of different sizes are not two shardings of one model.
    """
    relations: list[Relation] = []
    by_name = list(_matrices(target))
    for ours in _matrices(baseline):
        for theirs in by_name:
            if name_likeness(ours.segment, theirs.segment) >= KNOWN:
                relations.append(relate(ours.weights, theirs.weights))
    ratios = common_ratios(relations)
    divided = sum(relation.kind == "divided" and relation.ratio in ratios for relation in relations)
    return ratios if 2 * divided >= len(relations) else ()


def _matrices(root: Module) -> Iterator[Module]:
    """Modules with a weight of two dims, only from the first layer of each list."""
    if any(len(weight.shape) == 2 for weight in root.weights.values()):
        yield root
    for child in root.children[:1] if root.is_stack else root.children:
        yield from _matrices(child)


@dataclass(frozen=True)
class _Place:
    """A module, and its path as a pattern. captures: the names of the captures in the pattern, outermost first."""

    module: Module
    pattern: str
    captures: tuple[str, ...] = ()

    def below(self, module: Module) -> str:
        return _joined(self.pattern, module.path[len(self.module.path) :].lstrip("."))


class _TreeMatcher:
    """The matching of two module trees, and the results that it has collected so far."""

    def __init__(self, ratios: tuple[int, ...]) -> None:
        self._ratios = ratios
        # By the two patterns: the pairs of the single layers.
        self._pairs: dict[tuple[str, str], list[ModulePair]] = {}
        self._left: dict[tuple[Role, str], NamedLeft] = {}

    def match(self, baseline: _Place, target: _Place, cap: Confidence, why_capped: str) -> None:
        """Two modules that are a pair, and all modules below them. No pair below is surer than `cap`."""
        found = match_regions(region_of(baseline.module), region_of(target.module), self._ratios)
        for pair in found.pairs:
            if pair.confidence > cap:
                pair = replace(pair, confidence=cap, reasons=(*pair.reasons, why_capped))
            key = baseline.below(pair.baseline), target.below(pair.target)
            self._pairs.setdefault(key, []).append(pair)
        for left in found.left:
            path = (baseline if left.side == "baseline" else target).below(left.module)
            self._left[left.side, path] = NamedLeft(left.side, path, left.module.node.class_name, left.reason)
        for ours, theirs, unlike in found.stacks:
            below = min(cap, Confidence.medium) if unlike else cap
            self._match_layers(baseline, target, (ours, theirs), below, unlike or why_capped)

    def _match_layers(
        self, baseline: _Place, target: _Place, stacks: tuple[Module, Module], cap: Confidence, why_capped: str
    ) -> None:
        """Match layers with the same number, one of each kind: layers of one kind are all alike."""
        ours, theirs = ({int(layer.segment): layer for layer in stack.children} for stack in stacks)
        name = _capture_name(stacks[0].segment, baseline.captures)
        captures = (*baseline.captures, name)
        patterns = [
            _joined(place.below(stack), f"{{{name}}}") for place, stack in zip((baseline, target), stacks, strict=True)
        ]
        kinds: set[object] = set()
        for number in sorted(ours.keys() & theirs.keys()):
            pair = ours[number], theirs[number]
            kind = tuple(layer.signature() for layer in pair)
            if kind not in kinds:
                kinds.add(kind)
                places = [_Place(layer, pattern, captures) for layer, pattern in zip(pair, patterns, strict=True)]
                self.match(places[0], places[1], cap, why_capped)

    def pairs(self) -> Iterator[NamedPair]:
        """One-to-one over all layers: if kinds of layers disagree, the surer pair stays."""
        taken: dict[tuple[Role, str], str] = {}
        for (ours, theirs), pairs in sorted(self._pairs.items(), key=lambda item: _weight(item[1]), reverse=True):
            sides: tuple[tuple[Role, str, str], ...] = (("baseline", ours, theirs), ("target", theirs, ours))
            if any((side, own) in taken for side, own, _ in sides):
                for side, own, other in sides:
                    if (side, own) not in taken:
                        cls = (pairs[0].baseline if side == "baseline" else pairs[0].target).node.class_name
                        reason = f"in some layers it is like {other}, which has another partner in others"
                        self._left[side, own] = NamedLeft(side, own, cls, reason)
                continue
            taken |= {(side, own): other for side, own, other in sides}
        kept = [key for key in self._pairs if taken.get(("baseline", key[0])) == key[1]]
        for key in taken:
            self._left.pop(key, None)
        for ours, theirs in kept:
            least = min(self._pairs[ours, theirs], key=lambda pair: pair.confidence)
            yield NamedPair(ours, theirs, least, len(self._pairs[ours, theirs]))

    def left(self) -> Iterator[NamedLeft]:
        yield from (self._left[key] for key in sorted(self._left))


def _weight(pairs: list[ModulePair]) -> tuple[int, int]:
    return sum(pair.confidence for pair in pairs), len(pairs)


def _joined(prefix: str, rest: str) -> str:
    return f"{prefix}.{rest}" if prefix and rest else prefix or rest


def _capture_name(stack: str, outer: tuple[str, ...]) -> str:
    """`layer_id` for the outermost list; for other lists, a name derived from the list: `experts` -> `expert`."""
    if not outer:
        return "layer_id"
    name = re.sub(r"\W", "_", stack).strip("_").lower().removesuffix("s") or "n"
    if not name[0].isalpha():
        name = f"n{name}"
    taken = {*outer, *OPTIONS, *OWN_TAGS}
    while name in taken:
        name += "_n"
    return name
