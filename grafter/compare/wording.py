"""The verdict in words: one sentence that says whether B agrees, and where it first does not."""

from __future__ import annotations

from collections.abc import Sequence

from grafter.compare.record import PointRecord
from grafter.compare.severity import innermost_culprits


def describe_verdict(points: Sequence[PointRecord], *, has_rules: bool, errors: int, skips: int) -> str:
    """points: in A's execution order, with severity."""
    failed = [point for point in points if point.verdict == "failed"]
    judged = [point for point in points if point.verdict in ("passed", "allowed", "failed")]
    if not judged:
        return "Nothing could be compared" + (": A and B have no point in common." if not points else ".")
    parts = [_divergence(failed, len(judged)) if failed else _agreement(points, len(judged), has_rules)]
    if failed and not has_rules:
        parts.append("No threshold was given, so any difference counts; --threshold '*: rel <= 1e-3' sets one.")
    if errors:
        parts.append(f"{_counted(errors, 'thing')} could not be compared (see the findings).")
    if skips:
        parts.append(f"{_counted(skips, 'point')} {'was' if skips == 1 else 'were'} skipped (see the findings).")
    return " ".join(parts)


def _agreement(points: Sequence[PointRecord], judged: int, has_rules: bool) -> str:
    allowed = sum(point.verdict == "allowed" for point in points)
    how = "within its threshold" if has_rules else "bitwise the same"
    if not allowed:
        which = "the one point that was compared is" if judged == 1 else f"all {judged} points are"
        return f"B agrees with A: {which} {how}."
    return f"B agrees with A but for {_counted(allowed, 'allowed failure')}: the other {judged - allowed} are {how}."


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
        sentence += f"; {_counted(len(culprits), 'other module')} {_verb(culprits)} good inputs bad, too"
    return f"{sentence}. {len(failed)} of {judged} points differ."


def _verb(culprits: Sequence[PointRecord]) -> str:
    return "turns" if len(culprits) == 1 else "turn"


def _clause(reason: str | None) -> str:
    return (reason or "no reason is known").splitlines()[0].rstrip(".")


def _counted(count: int, what: str) -> str:
    return f"{count} {what}{'' if count == 1 else 's'}"
