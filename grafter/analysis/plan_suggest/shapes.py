"""How the weights of two modules relate: equal, divided by a ratio of tensor parallelism, padded, transposed, or fused.

A ratio above 1 means that the target's weight is smaller by this factor, one below -1 that the baseline's is; 1: not
divided. For fused weights, a negative ratio divides the parts.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

from grafter.capture.module_tree import Weight

RelationKind = Literal["equal", "divided", "padded", "transposed", "different", "none"]
_WORST = ("none", "equal", "divided", "padded", "transposed", "different")
# Larger tensor parallelism is not used in practice; larger ratios are accidents.
_MOST_RANKS = 64
# A vocabulary is padded to a multiple of at most this, times the ranks.
_PADDING = 1024


@dataclass(frozen=True)
class Relation:
    """How the weights of two modules relate.

    kind: that of the least similar weight.
    split: for each divided weight, the dim over which the target's is divided by `ratio` (above 1: the target's is
    smaller; below -1: the baseline's is).
    missing: weights that only one side has, such as a bias.
    """

    kind: RelationKind
    ratio: int = 1
    split: tuple[tuple[str, int], ...] = ()
    missing: tuple[str, ...] = ()

    @property
    def fits(self) -> bool:
        """Whether the two can hold the same weights."""
        return self.kind not in ("different", "none")

    def fits_as(self, other: Relation) -> bool:
        """Whether it fits at least as well as `other`: a transposed weight cannot compete with an equal one."""
        sound = ("equal", "divided")
        return self.kind in sound if other.kind in sound else self.fits


NO_WEIGHTS = Relation("none")


def relate(baseline: dict[str, Weight], target: dict[str, Weight], ratios: Iterable[int] | None = None) -> Relation:
    """Compare weights of the same name, or in order if no name is shared. ratios: those that count; default: any."""
    if not baseline and not target:
        return NO_WEIGHTS
    if not baseline or not target:
        return Relation("different")
    pairs = _weight_pairs(baseline, target)
    missing = tuple(sorted(set(baseline) ^ set(target))) if len(baseline) != len(target) else ()
    worst: RelationKind = "none"
    ratio, split = 1, []
    for name, ours, theirs in pairs:
        kind, own_ratio, dim = _relate_one(ours.shape, theirs.shape, ratios)
        worst = max(worst, kind, key=_WORST.index)
        if own_ratio != 1:
            if ratio not in (1, own_ratio):
                return Relation("different")
            ratio = own_ratio
            split.append((name, dim))
    return Relation(worst, ratio, tuple(split), missing)


def _weight_pairs(baseline: dict[str, Weight], target: dict[str, Weight]) -> list[tuple[str, Weight, Weight]]:
    shared = [name for name in baseline if name in target]
    if shared:
        return [(name, baseline[name], target[name]) for name in shared]
    return [(name, ours, theirs) for (name, ours), theirs in zip(baseline.items(), target.values(), strict=False)]


def _relate_one(
    ours: tuple[int, ...], theirs: tuple[int, ...], ratios: Iterable[int] | None
) -> tuple[RelationKind, int, int]:
    if ours == theirs:
        return "equal", 1, -1
    if len(ours) != len(theirs):
        return "different", 1, -1
    unequal = [dim for dim in range(len(ours)) if ours[dim] != theirs[dim]]
    if len(unequal) == 1:
        (dim,) = unequal
        large, small = max(ours[dim], theirs[dim]), min(ours[dim], theirs[dim])
        sign = 1 if ours[dim] > theirs[dim] else -1
        if small and large % small == 0 and _counts(sign * (large // small), ratios):
            return "divided", sign * (large // small), dim
        if len(ours) == 2 and dim == 0 and _is_padded(ours[0], theirs[0], ratios):
            return "padded", 1, -1
    if len(ours) == 2 and ours == theirs[::-1]:
        return "transposed", 1, -1
    return "different", 1, -1


def _counts(ratio: int, ratios: Iterable[int] | None) -> bool:
    return ratio in ratios if ratios is not None else 1 < abs(ratio) <= _MOST_RANKS


def _is_padded(ours: int, theirs: int, ratios: Iterable[int] | None) -> bool:
    """Whether one side, or both, padded the rows of a vocabulary to a multiple, possibly divided over ranks."""
    for ratio in {1, *(ratios or ())}:
        large, small = max(ours, theirs), min(ours, theirs)
        if ratio == 1:
            padding = large - small
        else:
            whole, part = (ours, theirs) if ratio > 0 else (theirs, ours)
            padding = abs(part * abs(ratio) - whole)
        if large >= _PADDING and padding < min(_PADDING * abs(ratio), large // 8):
            return True
    return False


def common_ratios(relations: Iterable[Relation]) -> tuple[int, ...]:
    """By how much tensor parallelism divides: the ratio that most pairs have. Empty: not divided."""
    counts: dict[int, int] = {}
    for relation in relations:
        if relation.kind == "divided":
            counts[relation.ratio] = counts.get(relation.ratio, 0) + 1
    return (max(counts, key=lambda ratio: (counts[ratio], -abs(ratio))),) if counts else ()


def fused_ratio(whole: dict[str, Weight], parts: Sequence[dict[str, Weight]], ratios: Iterable[int]) -> int | None:
    """By how much `whole` is divided if its first dim contains those of all `parts`; None if it does not."""
    if len(whole) == 0 or any(set(part) != set(whole) for part in parts):
        return None
    for ratio in (1, *ratios):
        if all(_is_sum(whole[name].shape, [part[name].shape for part in parts], ratio) for name in whole):
            return ratio
    return None


def _is_sum(whole: tuple[int, ...], parts: list[tuple[int, ...]], ratio: int) -> bool:
    if not whole or any(part[1:] != whole[1:] for part in parts):
        return False
    total = sum(part[0] for part in parts)
    return total == whole[0] * ratio if ratio > 0 else total * -ratio == whole[0]
