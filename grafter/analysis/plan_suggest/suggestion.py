"""The result of the matching: pairs of modules with their confidence and reasons, and what is left on each side."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import IntEnum

from grafter.analysis.plan_suggest.shapes import NO_WEIGHTS, Relation
from grafter.analysis.plan_suggest.tree import Module
from grafter.core.roles import Role


class Confidence(IntEnum):
    """How sure a pair is."""

    low = 1
    medium = 2
    high = 3


@dataclass(frozen=True)
class ModulePair:
    """Two modules with the same meaning.

    same_inputs: everything in one is also in the other, so their inputs are the same.
    """

    baseline: Module
    target: Module
    confidence: Confidence
    reasons: tuple[str, ...]
    relation: Relation = NO_WEIGHTS
    same_inputs: bool = True


@dataclass(frozen=True)
class Left:
    """A module that has no pair, and the reason."""

    side: Role
    module: Module
    reason: str


@dataclass(frozen=True)
class Fused:
    """One module that contains the weights of several modules of the other side, joined in the first dim."""

    side: Role
    whole: Module
    parts: tuple[Module, ...]
    ratio: int


@dataclass
class RegionPairs:
    """The pairs of two regions, or of whole trees. stacks: paired lists of layers; `unlike`: how they differ."""

    pairs: list[ModulePair] = field(default_factory=list)
    left: list[Left] = field(default_factory=list)
    stacks: list[tuple[Module, Module, str]] = field(default_factory=list)


@dataclass(frozen=True)
class NamedPair:
    """A pair over all layers. baseline_path, target_path: patterns, with `{layer_id}` for the number of a layer."""

    baseline_path: str
    target_path: str
    pair: ModulePair
    layers: int


@dataclass(frozen=True)
class NamedLeft:
    """A module without a pair, over all layers, and the reason."""

    side: Role
    path: str
    class_name: str
    reason: str


@dataclass(frozen=True)
class Suggestion:
    """The suggestion for two models.

    ratio: by how much tensor parallelism divides the target's weights (below -1: the baseline's); 1: not divided.
    """

    baseline_class: str
    target_class: str
    pairs: tuple[NamedPair, ...]
    left: tuple[NamedLeft, ...]
    ratio: int = 1

    def of_confidence(self, confidence: Confidence) -> list[NamedPair]:
        """The pairs with this confidence."""
        return [named for named in self.pairs if named.pair.confidence is confidence]
