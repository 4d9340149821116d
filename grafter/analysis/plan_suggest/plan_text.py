"""A suggestion as the text of a plan file. Pairs of low confidence are comments."""

from __future__ import annotations

import json
from collections.abc import Iterator

from grafter.analysis.plan_suggest.name_entries import (
    NameEntry,
    entries_aside,
    module_entries,
    tensor_entries,
    weight_rules,
)
from grafter.analysis.plan_suggest.suggestion import Confidence, NamedPair, Suggestion

_HEADER = """\
# A plan file that `grafter plan suggest` proposed, from the module trees of
#   baseline  {baseline}
#   target    {target}
# {counts}
# It is based on shapes, order and names of modules, and not on the values that they compute: check it before use.
"""
_OUTPUTS = """\
# A tree does not say what a module returns. If one program returns a tensor and the other a tuple, their points are
# `.out` and `.out.0`; an entry such as this one gives them one name:
#   - {{role: target, path: "{path}.out.0", name: "{name}.out"}}
# Points of hooked modules that were called are known, and have entries below.
"""
_LAYOUTS = """\
# Weights of the {side} are divided by {ratio}. The rules below are for `grafter.dump_model`; the axis is named tp in
# them. For activations, write rules with `dims` (docs/layouts.md): a tree does not contain the order of their dims.
"""
_TITLES = {
    Confidence.high: "High confidence.",
    Confidence.medium: "Medium confidence: check these.",
    Confidence.low: "Low confidence: remove the # if you agree.",
}


def plan_text(suggestion: Suggestion, others: tuple[str, ...] = ()) -> str:
    """The plan file (`grafter.config.settings.plan_file`). others: models that were not compared, in words."""
    return "\n".join(_lines(suggestion, others)) + "\n"


def _lines(suggestion: Suggestion, others: tuple[str, ...]) -> Iterator[str]:
    yield from _header(suggestion, others)
    yield ""
    yield "names:"
    used = []
    for confidence in sorted(Confidence, reverse=True):
        chosen = [named for named in suggestion.of_confidence(confidence) if _entries(named)]
        if chosen:
            yield f"  # {_TITLES[confidence]}"
        for named in chosen:
            sure = confidence is not Confidence.low
            yield f"  # {_reasons(named)}"
            for entry in _entries(named):
                yield ("  - " if sure else "  # - ") + _mapping(role=entry.role, path=entry.path, name=entry.name)
            used += _entries(named) if sure else []
    aside = entries_aside(suggestion, used)
    if aside:
        yield "  # Modules whose default name is given to another module."
    for entry in aside:
        yield f"  - {_mapping(role=entry.role, path=entry.path, name=entry.name)}"
    rules = weight_rules(suggestion)
    if rules:
        yield ""
        yield "rules:"
    for rule in rules:
        yield f"  - {_mapping(match=rule.match, dims=rule.dims)}"
    yield from _equal(suggestion)
    yield from _left(suggestion)


def _header(suggestion: Suggestion, others: tuple[str, ...]) -> Iterator[str]:
    counts = [f"{len(suggestion.of_confidence(c))} {c.name}" for c in sorted(Confidence, reverse=True)]
    text = f"{len(suggestion.pairs)} pairs ({', '.join(counts)} confidence); {len(suggestion.left)} modules left out."
    header = _HEADER.format(baseline=suggestion.baseline_class, target=suggestion.target_class, counts=text)
    yield from header.splitlines()
    example = next((named for named in suggestion.pairs if named.target_path), None)
    if example is not None:
        outputs = _OUTPUTS.format(path=example.target_path, name=example.baseline_path.replace(".{layer_id}", ""))
        yield "#"
        yield from outputs.splitlines()
    if suggestion.ratio != 1:
        side = "target" if suggestion.ratio > 1 else "baseline"
        yield "#"
        yield from _LAYOUTS.format(side=side, ratio=abs(suggestion.ratio)).splitlines()
    for other in others:
        yield f"# Not compared: {other}."


def _entries(named: NamedPair) -> list[NameEntry]:
    return module_entries(named) + tensor_entries(named)


def _reasons(named: NamedPair) -> str:
    kinds = f"; {named.layers} kinds of layers" if named.layers > 1 else ""
    return f"{named.pair.confidence.name}: {'; '.join(named.pair.reasons)}{kinds}"


def _mapping(**fields: str) -> str:
    """One line of YAML. A text in double quotes means the same in YAML as in JSON."""
    words = {"role", "baseline", "target"}
    parts = [f"{key}: {value if value in words else json.dumps(value)}" for key, value in fields.items()]
    return "{" + ", ".join(parts) + "}"


def _equal(suggestion: Suggestion) -> Iterator[str]:
    equal = [named for named in suggestion.pairs if not module_entries(named)]
    if not equal:
        return
    yield ""
    yield "# Pairs that have the same name in both programs and need no entry:"
    for named in equal:
        yield f"#   {named.baseline_path or 'root'}: {_reasons(named)}"


def _left(suggestion: Suggestion) -> Iterator[str]:
    for side in ("baseline", "target"):
        left = [one for one in suggestion.left if one.side == side]
        if left:
            yield ""
            yield f"# Left out, of the {side}:"
        for one in left:
            yield f"#   {one.path} ({one.class_name}): {one.reason}"
