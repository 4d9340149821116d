"""Pairs: which points of A and B are compared with each other, and the points that only one side has.

the same key on both sides                      a pair
tokens on both sides, other keys or rows        all points with that name and tags on each side, paired by token; or
                                                step by step, if each step is a separate batch
the rest                                        a finding, with similar names
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise

from grafter.analysis.compare.comparison_records import FindingRecord
from grafter.store.dumps.point import DumpedPoint

_MOST_NAMED = 5
_MOST_LOOKED_FOR = 100


@dataclass(frozen=True)
class PointPair:
    """Points to compare: one of each side or, with `by_token`, any number of each side."""

    a: tuple[DumpedPoint, ...]
    b: tuple[DumpedPoint, ...]
    by_token: bool = False

    @property
    def label(self) -> str:
        """The pair as messages call it."""
        text = self.a[0].key.text
        return f"{text}, by token" if self.by_token else text


# (name, identifying tags, phase): what all calls of one point in a program have in common.
_Group = tuple[str, str, str]


def find_pairs(
    a: Sequence[DumpedPoint], b: Sequence[DumpedPoint]
) -> tuple[list[PointPair], list[DumpedPoint], list[DumpedPoint]]:
    """The pairs in the order of A's points, the points that only A has, and those that only B has."""
    groups_a, groups_b = _grouped(a), _grouped(b)
    pairs: dict[int, PointPair] = {}
    used: set[int] = set()
    for group, of_a in groups_a.items():
        of_b = groups_b.get(group, [])
        for pair in _pairs_of_group(of_a, of_b):
            pairs[id(pair.a[0])] = pair
            used.update(id(point) for point in (*pair.a, *pair.b))
    ordered = [pairs[id(point)] for point in a if id(point) in pairs]
    return ordered, [point for point in a if id(point) not in used], [point for point in b if id(point) not in used]


def _grouped(points: Iterable[DumpedPoint]) -> dict[_Group, list[DumpedPoint]]:
    groups: dict[_Group, list[DumpedPoint]] = {}
    for point in points:
        # By repr, because 1, 1.0 and True are equal.
        groups.setdefault((point.name, repr(point.key.identifying), point.phase), []).append(point)
    return groups


def _pairs_of_group(a: list[DumpedPoint], b: list[DumpedPoint]) -> list[PointPair]:
    if not b:
        return []
    others = {point.key.digest: point for point in b}
    if all(_has_tokens(point) for point in (*a, *b)):
        same_keys = {point.key.digest for point in a} == others.keys()
        if not (same_keys and all(_same_rows(point, others[point.key.digest]) for point in a)):
            return _pairs_by_token(a, b)
    return [PointPair((point,), (others[point.key.digest],)) for point in a if point.key.digest in others]


def _has_tokens(point: DumpedPoint) -> bool:
    return all(record.tokens is not None for record in point.records.values())


def _same_rows(a: DumpedPoint, b: DumpedPoint) -> bool:
    """Whether both have the same tokens in the same order, so that their rows need not be gathered."""
    return [record.tokens for record in a.records.values()] == [record.tokens for record in b.records.values()]


def _pairs_by_token(a: list[DumpedPoint], b: list[DumpedPoint]) -> list[PointPair]:
    """One pair of all points; or one pair a step, if tokens repeat because each step is a separate batch (a trainer's).

    If tokens repeat on one side only, that side may be a server that computed the rows of a preempted request again.
    Then steps are paired only if every token of the other side finds its partner in its own step.
    """
    again_a, again_b = _tokens_come_again(a), _tokens_come_again(b)
    if not (again_a or again_b):
        return [PointPair(tuple(a), tuple(b), by_token=True)]
    if again_a != again_b and not (_meet_in_their_steps(a, b) if again_b else _meet_in_their_steps(b, a)):
        return [PointPair(tuple(a), tuple(b), by_token=True)]
    steps_b = _by_step(b)
    return [
        PointPair(tuple(points), tuple(steps_b[step]), by_token=True)
        for step, points in _by_step(a).items()
        if step in steps_b
    ]


def _by_step(points: Iterable[DumpedPoint]) -> dict[int, list[DumpedPoint]]:
    found: dict[int, list[DumpedPoint]] = {}
    for point in points:
        found.setdefault(point.step, []).append(point)
    return found


# By sequence: the sorted ranges of positions.
_Spans = dict[object, list[tuple[int, int]]]


def _spans(points: Iterable[DumpedPoint]) -> _Spans:
    """The ranges of the first rank's tokens; the other ranks' rows are within them."""
    spans: _Spans = {}
    for point in points:
        tokens = point.first.tokens
        for sequence, start, count in tokens.runs if tokens is not None else ():
            if sequence is not None:
                spans.setdefault((type(sequence), sequence), []).append((start, start + count))
    for own in spans.values():
        own.sort()
    return spans


def _tokens_come_again(points: Sequence[DumpedPoint]) -> bool:
    """Whether two points have a token in common."""
    return any(later < end for own in _spans(points).values() for (_, end), (later, _) in pairwise(own))


def _meet_in_their_steps(once: Sequence[DumpedPoint], others: Sequence[DumpedPoint]) -> bool:
    """Whether all tokens of `once` that `others` have are in the same step there."""
    everywhere, theirs = _spans(others), _by_step(others)
    return all(
        _common(here, _spans(theirs.get(step, []))) == _common(here, everywhere)
        for step, here in ((step, _spans(points)) for step, points in _by_step(once).items())
    )


def _common(once: _Spans, others: _Spans) -> int:
    """The number of tokens of `once`, which repeats none, that are in `others`."""
    count = 0
    for sequence, own in once.items():
        theirs, place = others.get(sequence, []), 0
        for start, end in own:
            reached = start
            # Ranges that end before this one also end before the following ones.
            while place < len(theirs) and theirs[place][1] <= start:
                place += 1
            for begin, stop in theirs[place:]:
                if begin >= end:
                    break
                count += max(0, min(stop, end) - max(begin, reached))
                reached = max(reached, min(stop, end))
    return count


def alone(side: str, points: Sequence[DumpedPoint], others: Sequence[DumpedPoint]) -> list[FindingRecord]:
    """One finding for each name with points on one side only. side: "a" or "b".

    If the other side has a point's tokens in another step, its rows were perhaps computed again. The finding is then an
    error, because these rows should have been compared, unless they belong to another batch.
    """
    here, there = side.upper(), "B" if side == "a" else "A"
    names = {point.name for point in others}
    by_name: dict[str, list[DumpedPoint]] = {}
    repeated = _perhaps_repeated(points, others)
    found = _findings_of_repeated(side, [point for point in points if id(point) in repeated])
    for point in points:
        if id(point) not in repeated:
            by_name.setdefault(point.name, []).append(point)
    for number, (name, own) in enumerate(by_name.items()):
        labels = [point.key.text for point in own[:_MOST_NAMED]]
        if name in names:
            near = [point.key.text for point in others if point.name == name][:2]
            hint = f"{there} has that name with other tags, steps or counts, such as {near[0]}"
        else:
            # The time to look for similar names grows with the product of both sides' names.
            near = _near_names(name, names) if number < _MOST_LOOKED_FOR else []
            hint = f"{there} has no point with this name" + (f"; is it {' or '.join(near)} there?" if near else "")
        what = f"{len(own)} points {name!r}" if len(own) > 1 else f"the point {labels[0]}"
        example = f", such as {labels[0]}" if len(own) > 1 else ""
        found.append(
            FindingRecord(
                what="only_in_a" if side == "a" else "only_in_b",
                text=f"only {here} has {what}{example}; {hint}.",
                name=name,
                count=len(own),
                points=labels,
                near=near,
                is_skip=True,
            )
        )
    return found


def _findings_of_repeated(side: str, points: Sequence[DumpedPoint]) -> list[FindingRecord]:
    here, there = side.upper(), "B" if side == "a" else "A"
    by_name: dict[str, list[DumpedPoint]] = {}
    for point in points:
        by_name.setdefault(point.name, []).append(point)
    return [
        FindingRecord(
            what="only_in_a" if side == "a" else "only_in_b",
            text=f"only {here} has {own[0].key.text}{f' and {len(own) - 1} more' if own[1:] else ''}, with tokens that "
            f"{there} has in another step: rows that were computed again, or a batch with the numbers of an earlier "
            f"one? They were not compared. If it is another batch, leave its step out (--filter 'step != "
            f"{own[0].step}'), or give its sequences other ids.",
            name=name,
            count=len(own),
            points=[point.key.text for point in own[:_MOST_NAMED]],
            is_error=True,
        )
        for name, own in by_name.items()
    ]


def _perhaps_repeated(points: Sequence[DumpedPoint], others: Sequence[DumpedPoint]) -> set[int]:
    """The ids (Python's) of points without a partner whose tokens the other side has, each once."""
    found: set[int] = set()
    theirs = _grouped(others)
    for group, own in _grouped(points).items():
        there = theirs.get(group, [])
        if not there or not all(_has_tokens(point) for point in (*own, *there)) or _tokens_come_again(there):
            continue
        spans = _spans(there)
        found.update(id(point) for point in own if _common(spans, _spans([point])))
    return found


def _near_names(name: str, names: Iterable[str]) -> list[str]:
    """At most two names with a similar spelling; otherwise names that begin with this one, or that it begins with."""
    known = sorted(names)
    near = difflib.get_close_matches(name, known, n=2, cutoff=0.7)
    if near:
        return near
    beginnings = [other for other in known if _is_beginning(*sorted((name, other), key=len))]
    return sorted(beginnings, key=lambda other: abs(len(other) - len(name)))[:2]


def _is_beginning(short: str, long: str) -> bool:
    """Whether `long` begins with `short`, which is at least a third of it: nearly every module begins with `model`."""
    return long.startswith(short) and 3 * len(short) >= len(long)
