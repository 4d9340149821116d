"""The entries of the plan file that give both modules of a pair, and their tensors, one name."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass

from grafter.analysis.plan_suggest.suggestion import Confidence, NamedPair, Suggestion
from grafter.core.patterns import ROOT
from grafter.core.roles import Role

_LAYER = "{layer_id}"
_NUMBER = re.compile(r"\d+|\{\w+\}")
# A pattern would read these segments as inputs or outputs of the previous module; `ou?` matches only `out`.
_AS_PATTERN = {"in": "i?", "out": "ou?"}


@dataclass(frozen=True)
class NameEntry:
    """One entry of the plan file's `names`."""

    role: Role
    path: str
    name: str


@dataclass(frozen=True)
class WeightRule:
    """One rule of the plan file: where a weight lies, for `grafter.dump_model`."""

    match: str
    dims: str


def common_name(pair: NamedPair) -> str:
    """The baseline's path without its layer number, which becomes the tag `layer_id`: the baseline's default name."""
    segments = [segment for segment in pair.baseline_path.split(".") if segment != _LAYER]
    return ".".join(segments) or ROOT


def module_entries(pair: NamedPair) -> list[NameEntry]:
    """The entries for each role. None if both modules already have one name, or if one of them cannot be called."""
    if not (pair.pair.baseline.node.can_be_called and pair.pair.target.node.can_be_called):
        return []
    if default_pattern(pair.baseline_path) == default_pattern(pair.target_path):
        return []
    name = common_name(pair)
    return [
        NameEntry("baseline", _as_pattern(pair.baseline_path), name),
        NameEntry("target", _as_pattern(pair.target_path), name),
    ]


def default_pattern(path: str) -> tuple[str, str]:
    """The name and the number that a path gets without an entry, as `capture.naming.default_name` makes them."""
    segments = path.split(".")
    for number, segment in enumerate(segments):
        if _NUMBER.fullmatch(segment):
            return ".".join(segments[:number] + segments[number + 1 :]) or ROOT, segment
    return path or ROOT, ""


def tensor_entries(pair: NamedPair) -> list[NameEntry]:
    """The entries for the first input and the first output, if the two programs give them different names."""
    if not (pair.pair.baseline.node.can_be_called and pair.pair.target.node.can_be_called):
        return []
    name, path = common_name(pair), _as_pattern(pair.target_path) or ROOT
    suffixes = [_first_inputs(pair) if pair.pair.same_inputs else None, _first_outputs(pair)]
    return [NameEntry("target", f"{path}{theirs}", f"{name}{ours}") for ours, theirs in filter(None, suffixes)]


def _first_inputs(pair: NamedPair) -> tuple[str, str] | None:
    ours, theirs = pair.pair.baseline.node, pair.pair.target.node
    if not ours.arguments or not theirs.arguments:
        return None
    first, other = ours.arguments[0], theirs.arguments[0]
    if first in theirs.arguments or other in ours.arguments:
        return None  # known by name on both sides, in whatever order
    found = f".in.{first}", f".in.{other}"
    seen = all(not node.tensors or suffix in node.tensors for node, suffix in zip((ours, theirs), found, strict=True))
    return found if seen else None


def _first_outputs(pair: NamedPair) -> tuple[str, str] | None:
    ours, theirs = pair.pair.baseline.node.tensors, pair.pair.target.node.tensors
    first, other = _first_output(ours), _first_output(theirs)
    if first is None or other is None or first == other or first in theirs or other in ours:
        return None
    return first, other


def _first_output(tensors: Iterable[str]) -> str | None:
    outputs = [suffix for suffix in tensors if suffix == ".out" or suffix.startswith(".out.")]
    for first in (".out", ".out.0"):
        if first in outputs:
            return first
    return outputs[0] if len(outputs) == 1 else None


def _as_pattern(path: str) -> str:
    return ".".join(_AS_PATTERN.get(segment, segment) for segment in path.split("."))


def entries_aside(suggestion: Suggestion, used: Iterable[NameEntry]) -> list[NameEntry]:
    """Entries for modules whose default name is given to another module, so that names are unique in each job."""
    taken = {entry.name for entry in used}
    aside = []
    roles: tuple[Role, ...] = ("baseline", "target")
    for role in roles:
        named = {entry.path for entry in used if entry.role == role}
        paths = [pair.baseline_path if role == "baseline" else pair.target_path for pair in suggestion.pairs]
        paths += [left.path for left in suggestion.left if left.side == role]
        keeps_name = {
            path
            for pair in suggestion.pairs
            if not module_entries(pair)
            for path in (pair.baseline_path, pair.target_path)
        }
        for path in paths:
            name, _ = default_pattern(path)
            if name in taken and _as_pattern(path) not in named and path not in keeps_name:
                aside.append(NameEntry(role, _as_pattern(path), f"{role}_only.{name}"))
    return aside


def weight_rules(suggestion: Suggestion) -> list[WeightRule]:
    """Rules for weights that tensor parallelism divides: the dims of those that both programs have, by the axis `tp`.

    One text serves both jobs. DTensors need no rule. About weights that differ in other ways, nothing is known.
    """
    if suggestion.ratio == 1:
        return []
    rules = []
    for named in suggestion.pairs:
        relation = named.pair.relation
        ours, theirs = named.pair.baseline.weights, named.pair.target.weights
        shared = [weight for weight in ours if weight in theirs]
        if named.pair.confidence is Confidence.low or relation.kind not in ("equal", "divided"):
            continue
        split = dict(relation.split)
        for weight in shared:
            if ours[weight].is_global or theirs[weight].is_global or not ours[weight].shape:
                continue
            rules.append(
                WeightRule(f"{common_name(named)}.{weight}", _dims(len(ours[weight].shape), split.get(weight)))
            )
    return rules


def _dims(count: int, split: int | None) -> str:
    names = {1: ["h"], 2: ["o", "i"]}.get(count, [f"d{number}" for number in range(count)])
    if split is None:
        return f"{' '.join(names)} # tp:replicated"
    return " ".join(f"{name}[tp]" if dim == split else name for dim, name in enumerate(names))
