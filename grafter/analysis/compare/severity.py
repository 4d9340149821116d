"""Severity: of a module's bad output, whether the module made it bad, or was given bad inputs.

    in good   out bad   culprit
    in bad    out bad   inherited
    none      out bad   unknown

Inputs and outputs are found by names as `grafter.attach` gives them: `X.in.<argument>` (or `X.in`) and `X.out`,
`X.out.<key>`, at one place of the program (tags, step, phase, occurrence). Of gradients (phase backward) the flow is
the other way: a module takes the gradient of its output and gives those of its inputs.
"""

from __future__ import annotations

from collections.abc import Sequence

from grafter.analysis.compare.record import PointRecord, Severity

Flow = str
_BACKWARD = "backward"


def split_name(name: str) -> tuple[str, Flow] | None:
    """(module, "in" or "out") of a point that is named as `attach` does; None of another.

    >>> split_name("model.layers.mlp.in.hidden_states")
    ('model.layers.mlp', 'in')
    """
    parts = name.split(".")
    for place in range(len(parts) - 1, 0, -1):
        if parts[place] in ("in", "out"):
            return ".".join(parts[:place]), parts[place]
    return None


def with_severity(points: Sequence[PointRecord]) -> list[PointRecord]:
    """The same points, those that failed with their severity."""
    inputs: dict[object, list[PointRecord]] = {}
    for point in points:
        place = _place(point)
        if place is not None and place[1] == "in":
            inputs.setdefault(place[0], []).append(point)
    return [
        point.model_copy(update={"severity": _severity(point, inputs)}) if is_bad(point) else point for point in points
    ]


def innermost_culprits(points: Sequence[PointRecord]) -> list[PointRecord]:
    """The failed culprits that have no other culprit inside of them: of a layer and its model, the layer.

    points: with severity. A module is inside of another whose path begins its own, at the same place of the program;
    everything is inside of `root`.
    """
    culprits = [point for point in points if point.severity == "culprit" and point.verdict == "failed"]
    return [point for point in culprits if not any(_contains(point, other) for other in culprits)]


def _contains(outer: PointRecord, inner: PointRecord) -> bool:
    split, other = split_name(outer.name), split_name(inner.name)
    if split is None or other is None or split[0] == other[0]:
        return False
    same_call = (outer.step, outer.phase) == (inner.step, inner.phase) and outer.tags.items() <= inner.tags.items()
    return same_call and (split[0] == "root" or other[0].startswith(f"{split[0]}."))


def is_bad(point: PointRecord) -> bool:
    """Whether it differs by more than it may, allowed or not."""
    return point.verdict in ("failed", "allowed")


def _severity(point: PointRecord, inputs: dict[object, list[PointRecord]]) -> Severity:
    place = _place(point)
    if place is None or place[1] != "out":
        return "unknown"
    given = inputs.get(place[0], [])
    if any(is_bad(one) for one in given):
        return "inherited"
    # An input that could not be judged may have been bad.
    if given and all(one.verdict == "passed" for one in given):
        return "culprit"
    return "unknown"


def _place(point: PointRecord) -> tuple[object, Flow] | None:
    """(the module's call, in which direction values flow through this point)."""
    split = split_name(point.name)
    if split is None:
        return None
    module, flow = split
    if point.phase == _BACKWARD:
        flow = "out" if flow == "in" else "in"
    return (module, repr(sorted(point.tags.items(), key=repr)), point.step, point.phase, point.occurrence), flow
