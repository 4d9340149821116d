"""The conclusion of a comparison: the exit code, the verdict in words, and the severity of each failed point.

A failed output of a module is a culprit if the module turned good inputs bad, and inherited if an input is bad already:

    inputs   good       bad         not compared
    output   bad        bad         bad
             culprit    inherited   unknown

Inputs and outputs have the names that `grafter.attach` gives: `X.in.<argument>` (or `X.in`), and `X.out`,
`X.out.<key>`, with the same tags, step, phase and occurrence. Gradients (phase backward) flow the other way: a module
computes those of its inputs from those of its outputs.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence

from grafter.analysis.compare.comparison_records import FindingRecord, PointRecord, Severity

# Exit codes of `grafter compare`.
EXIT_SAME, EXIT_DIFFERENT, EXIT_NOT_COMPARED = 0, 1, 2

# For A and for B: the number of points that a filter chose, and of all points.
Chosen = tuple[tuple[int, int], tuple[int, int]]


def exit_code_of(counts: Counter[str], *, errors: int, skips: int, forbid_skips: bool) -> int:
    """1 if a point failed. Otherwise 2 if something could not be judged, or if nothing was. Otherwise 0."""
    if counts["failed"]:
        return EXIT_DIFFERENT
    judged = counts["passed"] + counts["allowed"]
    if errors or not judged or (forbid_skips and skips):
        return EXIT_NOT_COMPARED
    return EXIT_SAME


def describe_verdict(
    points: Sequence[PointRecord],
    findings: Sequence[FindingRecord],
    *,
    has_rules: bool,
    forbid_skips: bool = False,
    chosen: Chosen | None = None,
) -> str:
    """The verdict as a sentence. points: in A's execution order, with severity.

    It says "B agrees" only if the exit code is 0.
    """
    failed = [point for point in points if point.verdict == "failed"]
    judged = [point for point in points if point.verdict in ("passed", "allowed", "failed")]
    errors = list(_errors(points, findings))
    skips, copies = list(_skips(findings)), list(_copies(findings))
    if not judged:
        why = [*errors, *skips] if points else [_nothing_in_common(chosen), *errors]
        return f"Nothing could be compared: {'; '.join(why)}." if why else "Nothing could be compared."
    if failed:
        parts = [_divergence(failed, len(judged))]
        if not has_rules:
            parts.append("No threshold was given, so any difference counts; --threshold '*: rel <= 1e-3' sets one.")
        parts += [f"{_sentence_case(text)}." for text in (*errors, *skips, *copies)]
        return " ".join(parts)
    allowed = sum(point.verdict == "allowed" for point in judged)
    allowances = [_counted(allowed, "allowed failure")] if allowed else []
    if not errors and not (skips and forbid_skips):
        how = _agreement(judged, len(judged), has_rules)
        head = "B agrees with A" + (f" but for {allowances[0]}" if allowed else "")
        return " ".join((f"{head}: {how}.", *(f"{_sentence_case(text)}." for text in (*skips, *copies))))
    if skips and forbid_skips:
        skips[-1] += ", which --forbid-skips forbids"
    parts = [*errors, *skips, *copies, *allowances, _agreement(judged, len(points), has_rules)]
    return f"Not all could be compared: {'; '.join(parts)}."


def _errors(points: Sequence[PointRecord], findings: Sequence[FindingRecord]) -> Iterator[str]:
    """What could not be judged at all, by reason."""
    for what, one, several in (
        ("cannot_compare", "could not be read or measured", "could not be read or measured"),
        ("no_rule", "has no threshold", "have no threshold"),
    ):
        count = sum(finding.is_error and finding.what == what for finding in findings)
        if count:
            yield f"{count} of {_counted(len(points), 'point')} {one if count == 1 else several}"
    again = sum(
        finding.count for finding in findings if finding.is_error and finding.what in ("only_in_a", "only_in_b")
    )
    if again:
        yield f"{_counted(again, 'point')} {'repeats' if again == 1 else 'repeat'} tokens that another step has"
    damaged = sum(finding.is_error and finding.what == "damaged" for finding in findings)
    if damaged:
        yield f"{_counted(damaged, 'place')} in the dumps {'is' if damaged == 1 else 'are'} damaged"


def _skips(findings: Sequence[FindingRecord]) -> Iterator[str]:
    """What was left out: whole points, or parts of points that were compared."""
    skipped = sum(
        finding.count for finding in findings if finding.is_skip and finding.what not in ("other_rows", "missing_ranks")
    )
    if skipped:
        yield f"{_counted(skipped, 'point')} {'was' if skipped == 1 else 'were'} skipped"
    for what, left_out in (
        ("other_rows", "tokens that only one side has were left out"),
        ("missing_ranks", "ranks that take part left no dump"),
    ):
        count = sum(finding.what == what for finding in findings)
        if count:
            yield f"in {_counted(count, 'point')}, {left_out}"


def _copies(findings: Sequence[FindingRecord]) -> Iterator[str]:
    """The points in which ranks of one side hold differing copies, whether their rules allow it or not."""
    points = {point for finding in findings if finding.what == "unequal_copies" for point in finding.points}
    if points:
        yield f"in {_counted(len(points), 'point')}, copies that one side's ranks hold differ among themselves"


def _nothing_in_common(chosen: Chosen | None) -> str:
    if chosen is None:
        return "A and B have no point in common"
    (of_a, all_a), (of_b, all_b) = chosen
    if not of_a and not of_b:
        return f"--filter matched none of A's {all_a} and none of B's {all_b} points"
    return f"--filter chose {of_a} of A's {all_a} points and {of_b} of B's {all_b}, and these have none in common"


def _agreement(judged: Sequence[PointRecord], points: int, has_rules: bool) -> str:
    """How well the points agree if none failed. points: the number of all pairs, judged or not."""
    passed = sum(point.verdict == "passed" for point in judged)
    how = f"within {'its' if passed == 1 else 'their'} threshold" if has_rules else "bitwise the same"
    if passed < points:
        return f"the other {passed} {'is' if passed == 1 else 'are'} {how}" if passed else "no other was compared"
    return f"the one point that was compared is {how}" if passed == 1 else f"all {passed} points are {how}"


def _divergence(failed: Sequence[PointRecord], judged: int) -> str:
    first = failed[0]
    sentence = f"B first differs from A at {first.label}: {_clause(first.reason)}"
    sentence += {
        "culprit": ". Its inputs agree, so the module itself is at fault",
        "inherited": ". An input of it is bad already",
    }.get(first.severity or "", "")
    culprits = [point for point in innermost_culprits(failed) if point is not first]
    if culprits and first not in innermost_culprits(failed):
        sentence += f". The first module that turns good inputs bad is at {culprits[0].label}"
    elif culprits:
        verb = "turns" if len(culprits) == 1 else "turn"
        sentence += f"; {_counted(len(culprits), 'other module')} {verb} good inputs bad, too"
    return f"{sentence}. {len(failed)} of {judged} points differ."


def _clause(reason: str | None) -> str:
    return (reason or "no reason is known").splitlines()[0].rstrip(".")


def _counted(count: int, what: str) -> str:
    return f"{count} {what}{'' if count == 1 else 's'}"


def _sentence_case(text: str) -> str:
    return text[0].upper() + text[1:]


Flow = str
_BACKWARD = "backward"


def split_name(name: str) -> tuple[str, Flow] | None:
    """(module, "in" or "out") if the name has the form that `grafter.attach` gives; None otherwise.

    >>> split_name("model.layers.mlp.in.hidden_states")
    ('model.layers.mlp', 'in')
    """
    parts = name.split(".")
    for place in range(len(parts) - 1, 0, -1):
        if parts[place] in ("in", "out"):
            return ".".join(parts[:place]), parts[place]
    return None


def with_severity(points: Sequence[PointRecord]) -> list[PointRecord]:
    """The points; those that failed get their severity."""
    inputs: dict[object, list[PointRecord]] = {}
    for point in points:
        place = _place(point)
        if place is not None and place[1] == "in":
            inputs.setdefault(place[0], []).append(point)
    return [
        point.model_copy(update={"severity": _severity(point, inputs)}) if is_bad(point) else point for point in points
    ]


def innermost_culprits(points: Sequence[PointRecord]) -> list[PointRecord]:
    """The failed culprits that contain no other culprit: of a layer and its model, the layer.

    points: with severity. A module contains those whose path begins with its own, in the same call; `root` contains
    all.
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
    """Whether the point exceeds its threshold, even if --allow names it."""
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
    """(call of the module, direction in which values flow through this point); None without such a name."""
    split = split_name(point.name)
    if split is None:
        return None
    module, flow = split
    if point.phase == _BACKWARD:
        flow = "out" if flow == "in" else "in"
    return (module, repr(sorted(point.tags.items(), key=repr)), point.step, point.phase, point.occurrence), flow
