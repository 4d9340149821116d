"""Pairs one region of each side: fused modules first, then modules with weights, their containers, and
the bare ones.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from itertools import product

import numpy as np
from numpy.typing import NDArray

from grafter.analysis.plan_suggest.assignment import best_pairs
from grafter.analysis.plan_suggest.judgement import judge_bare, judge_holder, judge_leaf, reasons_left
from grafter.analysis.plan_suggest.pairs import Confidence, Found, Fused, Pair
from grafter.analysis.plan_suggest.shapes import Relation, fused_ratio, relate
from grafter.analysis.plan_suggest.tree import Module, Region
from grafter.analysis.plan_suggest.vocabulary import FUSED, OPPOSED, class_likeness, meanings_of, name_likeness

_SHAPE_SCORE = {"equal": 4.0, "divided": 3.8, "padded": 3.0, "transposed": 2.5, "different": -1.5, "none": -1.5}
_LEAF_THRESHOLD, _HOLDER_THRESHOLD, _BARE_THRESHOLD, _STACK_THRESHOLD = 3.0, 2.5, 4.4, 3.0

Score = Callable[[Module, Module], float]


def match_regions(baseline: Region, target: Region, ratios: tuple[int, ...]) -> Found:
    """Pair the modules of two regions whose roots are a pair. `ratios`: by what tensor parallelism may divide."""
    return _RegionMatcher(baseline, target, ratios).match()


class _RegionMatcher:
    """The matching of two regions, step by step."""

    def __init__(self, baseline: Region, target: Region, ratios: tuple[int, ...]) -> None:
        self._baseline, self._target, self._ratios = baseline, target, ratios
        self._relations: dict[tuple[Module, Module], Relation] = {}
        self._partners: dict[Module, list[Module]] = {}  # of both sides; a fused module has several
        self._holders: dict[Module, Module] = {}  # baseline -> target, and back
        self._fused: list[Fused] = []
        self._positions: dict[Module, float] = {}

    def match(self) -> Found:
        found = Found(stacks=self._match_stacks())
        self._fused = list(self._find_fused())
        fused = {module for one in self._fused for module in (one.whole, *one.parts)}
        ours, theirs = (
            [leaf for leaf in region.leaves if leaf not in fused] for region in (self._baseline, self._target)
        )
        self._positions = {leaf: _position(leaf, side) for side in (ours, theirs) for leaf in side}
        # Twice: which containers match is known only after the first pass, and then distinguishes similar modules.
        for _ in range(2):
            leaf_pairs, leaf_scores = _assign(ours, theirs, self._leaf_score, _LEAF_THRESHOLD)
            self._note_partners(leaf_pairs, found.stacks)
            holder_pairs, _ = _assign(self._baseline.inner, self._target.inner, self._holder_score, _HOLDER_THRESHOLD)
            self._holders = dict(holder_pairs) | {b: a for a, b in holder_pairs}
        bare_pairs, _ = _assign(self._baseline.bare, self._target.bare, self._bare_score, _BARE_THRESHOLD)
        found.pairs += [self._judged_leaf(a, b, ours, theirs, leaf_scores) for a, b in leaf_pairs]
        leaf_confidence = {pair.baseline: pair.confidence for pair in found.pairs}
        found.pairs += [self._judged_holder(a, b, leaf_confidence) for a, b in holder_pairs]
        found.pairs += [judge_bare(a, b) for a, b in bare_pairs]
        found.pairs.insert(0, self._judged_holder(self._baseline.root, self._target.root, leaf_confidence))
        found.left = reasons_left(self._baseline, self._target, found, self._fused, self._relation)
        return found

    # Lists of layers.

    def _match_stacks(self) -> list[tuple[Module, Module, str]]:
        ours, theirs = self._baseline.stacks, self._target.stacks
        alone = len(ours) == len(theirs) == 1
        pairs, _ = _assign(ours, theirs, self._stack_score, 0.0 if alone else _STACK_THRESHOLD)
        return [(a, b, _why_unlike(a, b)) for a, b in pairs]

    def _stack_score(self, a: Module, b: Module) -> float:
        sizes = sorted((_numbers_in(a.children[0]), _numbers_in(b.children[0])))
        size = sizes[0] / sizes[1] if sizes[1] else 1.0
        ratio = max((size * abs(r) for r in self._ratios if size * abs(r) <= 1), default=size)
        shapes = a.children[0].shapes & b.children[0].shapes
        alike = shapes.total() * 2 / max(1, a.children[0].shapes.total() + b.children[0].shapes.total())
        place = _name_score(a.parent, b.parent) if a.parent and b.parent else 0.0
        return 2 * max(ratio, alike) + 2 * (len(a.children) == len(b.children)) + _name_score(a, b) / 2 + place / 2

    # Fused modules.

    def _find_fused(self) -> Iterator[Fused]:
        """Find fused modules, by name first: TP may make a fused weight the size of one part. Then by sums, if nothing
        else fits.
        """
        taken: set[Module] = set()
        for by_name, (side, own, other) in product(
            (True, False),
            (("baseline", self._baseline, self._target), ("target", self._target, self._baseline)),
        ):
            for whole in own.leaves:
                if whole in taken or (not by_name and self._has_like(whole, other.leaves)):
                    continue
                if not by_name and not _may_be_fused(whole):
                    continue
                for parts in _groups(whole, other, by_name):
                    if taken.intersection(parts):
                        continue
                    if not by_name and any(self._has_like(part, own.leaves) for part in parts):
                        continue
                    ratios = self._ratios if side == "target" else tuple(-ratio for ratio in self._ratios)
                    ratio = fused_ratio(whole.weights, [part.weights for part in parts], ratios)
                    if ratio is not None:
                        taken |= {whole, *parts}
                        yield Fused(side, whole, parts, ratio)  # type: ignore[arg-type]
                        break

    def _has_like(self, leaf: Module, others: Sequence[Module]) -> bool:
        both_ways = (*self._ratios, *(-ratio for ratio in self._ratios))
        return any(relate(leaf.weights, other.weights, both_ways).fits for other in others)

    # Scores.

    def _relation(self, a: Module, b: Module) -> Relation:
        relation = self._relations.get((a, b))
        if relation is None:
            relation = self._relations[a, b] = relate(a.weights, b.weights, self._ratios)
        return relation

    def _leaf_score(self, a: Module, b: Module) -> float:
        relation = self._relation(a, b)
        shape = _SHAPE_SCORE[relation.kind] - 0.5 * bool(relation.missing)
        order = 1 - abs(self._positions[a] - self._positions[b])
        return shape + _name_score(a, b) + self._place_score(a, b) + order + class_likeness(*_classes(a, b)) / 2

    def _place_score(self, a: Module, b: Module) -> float:
        """Whether the containers of the two are the same: as paired before, or by name."""
        ours, theirs = self._baseline.parent(a), self._target.parent(b)
        if ours is None or theirs is None:
            return 1.0 if ours is theirs else 0.0
        if ours in self._holders or theirs in self._holders:
            return 1.5 if self._holders.get(ours) is theirs else -1.5
        return _name_score(ours, theirs) / 3

    def _holder_score(self, a: Module, b: Module) -> float:
        return (
            4 * self._overlap(a, b)
            + _name_score(a, b)
            + self._place_score(a, b) / 3
            + class_likeness(*_classes(a, b)) / 2
        )

    def _bare_score(self, a: Module, b: Module) -> float:
        return _name_score(a, b) + self._place_score(a, b) + class_likeness(*_classes(a, b))

    def _note_partners(self, pairs: list[tuple[Module, Module]], stacks: list[tuple[Module, Module, str]]) -> None:
        self._partners = {}
        for a, b in (*pairs, *((a, b) for a, b, _ in stacks)):
            self._partners[a], self._partners[b] = [b], [a]
        for one in self._fused:
            self._partners[one.whole] = list(one.parts)
            self._partners.update({part: [one.whole] for part in one.parts})

    def _overlap(self, a: Module, b: Module) -> float:
        """The share of the modules with weights in both whose partners are in the other."""
        ours, theirs = _with_weights(a), _with_weights(b)
        common = sum(any(p in theirs for p in self._partners.get(leaf, ())) for leaf in ours)
        common += sum(any(p in ours for p in self._partners.get(leaf, ())) for leaf in theirs)
        return common / max(1, len(ours) + len(theirs))

    # Judgements.

    def _judged_leaf(
        self, a: Module, b: Module, ours: list[Module], theirs: list[Module], scores: NDArray[np.float64]
    ) -> Pair:
        row, column = ours.index(a), theirs.index(b)
        rivals = np.concatenate([np.delete(scores[row], column), np.delete(scores[:, column], row)])
        margin = float(scores[row, column] - rivals.max()) if rivals.size else np.inf
        relation = self._relation(a, b)
        like_ours = [other for other in theirs if self._relation(a, other).fits_as(relation)]
        like_theirs = [other for other in ours if self._relation(other, b).fits_as(relation)]
        return judge_leaf(a, b, relation, margin, like_ours, like_theirs, self._ratios)

    def _judged_holder(self, a: Module, b: Module, of_leaves: dict[Module, Confidence]) -> Pair:
        ours = _with_weights(a)
        surest = min((of_leaves.get(leaf, Confidence.high) for leaf in ours), default=Confidence.low)
        rivals = [m for m in self._baseline.inner if m is not a and _with_weights(m) == ours]
        rivals += [m for m in self._target.inner if m is not b and _with_weights(m) == _with_weights(b)]
        return judge_holder(a, b, self._overlap(a, b), surest, alone=not rivals)


def _assign(
    ours: Sequence[Module], theirs: Sequence[Module], score: Score, threshold: float
) -> tuple[list[tuple[Module, Module]], NDArray[np.float64]]:
    scores = np.array([[score(a, b) for b in theirs] for a in ours], dtype=np.float64).reshape(len(ours), len(theirs))
    return [(ours[row], theirs[column]) for row, column in best_pairs(scores, threshold)], scores


def _name_score(a: Module, b: Module) -> float:
    """From -3 to 3. If the likeness is below 0.5, two texts are similar by accident."""
    likeness = name_likeness(a.segment, b.segment)
    if likeness == OPPOSED:
        return -3.0
    return 3.0 * max(0.0, 2 * likeness - 1)


def _classes(a: Module, b: Module) -> tuple[str, str]:
    return a.node.class_name, b.node.class_name


def _position(leaf: Module, leaves: list[Module]) -> float:
    """The module's position among the modules with its shapes, from 0 to 1."""
    same = [other for other in leaves if other.shapes == leaf.shapes]
    return (same.index(leaf) + 0.5) / len(same)


def _with_weights(module: Module) -> set[Module]:
    """The modules with weights in it (or itself); a list of layers counts as one."""
    if module.is_stack:
        return {module}
    found = {module} if module.weights else set()
    return found.union(*(_with_weights(child) for child in module.children if child.shapes))


def _numbers_in(module: Module) -> int:
    return sum(int(np.prod(shape)) * count for shape, count in module.shapes.items())


def _may_be_fused(module: Module) -> bool:
    """Whether its name allows it to be fused: sums of rows can also be equal by accident."""
    meanings = meanings_of(module.segment)
    return not meanings or not meanings.isdisjoint(FUSED)


def _groups(whole: Module, other: Region, by_name: bool) -> Iterator[tuple[Module, ...]]:
    """Neighbours on the other side that `whole` may contain: those that its name says, or any run of two to four."""
    wanted = [FUSED[meaning] for meaning in meanings_of(whole.segment) if meaning in FUSED]
    by_parent: dict[Module | None, list[Module]] = {}
    for leaf in other.leaves:
        by_parent.setdefault(leaf.parent, []).append(leaf)
    for siblings in by_parent.values():
        if by_name:
            for meanings in wanted:
                parts = [next((s for s in siblings if meaning in meanings_of(s.segment)), None) for meaning in meanings]
                if all(parts) and len(set(parts)) == len(parts):
                    yield tuple(part for part in parts if part is not None)
        else:
            for size, first in product((2, 3, 4), range(len(siblings))):
                if first + size <= len(siblings):
                    yield tuple(siblings[first : first + size])


def _why_unlike(a: Module, b: Module) -> str:
    if len(a.children) != len(b.children):
        return f"{len(a.children)} layers in the baseline, {len(b.children)} in the target"
    if {child.segment for child in a.children} != {child.segment for child in b.children}:
        return "their layers have other numbers"
    return ""
