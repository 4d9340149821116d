"""What the matching finds: pairs of modules, how sure they are and why, and what is left on each side."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import IntEnum
from typing import Literal

from grafter.plan_suggest.shapes import NO_WEIGHTS, Relation
from grafter.plan_suggest.tree import Module

Side = Literal["baseline", "target"]


class Confidence(IntEnum):
    low = 1
    medium = 2
    high = 3


@dataclass(frozen=True)
class Pair:
    """Two modules that mean the same. same_inputs: all that is in one is in the other, so their inputs are the same."""

    baseline: Module
    target: Module
    confidence: Confidence
    reasons: tuple[str, ...]
    relation: Relation = NO_WEIGHTS
    same_inputs: bool = True


@dataclass(frozen=True)
class Left:
    """A module that has no pair, and why."""

    side: Side
    module: Module
    reason: str


@dataclass(frozen=True)
class Fused:
    """One module with the weights of several of the other side, in its first dim."""

    side: Side
    whole: Module
    parts: tuple[Module, ...]
    ratio: int


@dataclass
class Found:
    """Of two regions, or of whole trees. stacks: paired lists of layers; `unlike`: why they are not quite alike."""

    pairs: list[Pair] = field(default_factory=list)
    left: list[Left] = field(default_factory=list)
    stacks: list[tuple[Module, Module, str]] = field(default_factory=list)


@dataclass(frozen=True)
class NamedPair:
    """A pair over all layers. baseline_path, target_path: patterns, with `{layer_id}` for the number of a layer."""

    baseline_path: str
    target_path: str
    pair: Pair
    layers: int


@dataclass(frozen=True)
class NamedLeft:
    side: Side
    path: str
    class_name: str
    reason: str


@dataclass(frozen=True)
class Suggestion:
    """ratio: by how much tensor parallelism divides the target's weights (below -1: the baseline's); 1: by nothing."""

    baseline_class: str
    target_class: str
    pairs: tuple[NamedPair, ...]
    left: tuple[NamedLeft, ...]
    ratio: int = 1

    def of_confidence(self, confidence: Confidence) -> list[NamedPair]:
        return [named for named in self.pairs if named.pair.confidence is confidence]
