"""Pairs: which points of A and B are compared with each other, and what only one of them has.

same key on both sides                          a pair
tokens on both sides, another key or rows       all points of that name and tags on each side, paired by token; or
                                                step by step, where each step is a batch of its own
the rest                                        a finding, with near names
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
    """Points to compare: one of each side; or, `by_token`, any number of either."""

    a: tuple[DumpedPoint, ...]
    b: tuple[DumpedPoint, ...]
    by_token: bool = False

    @property
    def label(self) -> str:
        """As messages call it."""
        text = self.a[0].key.text
        return f"{text}, by token" if self.by_token else text


# Name, identifying tags, phase: what all calls of one point in a program have in common.
_Group = tuple[str, str, str]


def find_pairs(
    a: Sequence[DumpedPoint], b: Sequence[DumpedPoint]
) -> tuple[list[PointPair], list[DumpedPoint], list[DumpedPoint]]:
    """The pairs, in the order of A's points; and the points that only A, and that only B, has."""
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
        # repr keeps 1, 1.0 and True apart, which compare equal.
        groups.setdefault((point.name, repr(point.key.identifying), point.phase), []).append(point)
    return groups


def _pairs_of_group(a: list[DumpedPoint], b: list[DumpedPoint]) -> list[PointPair]:
    if not b:
        return []
    if all(_has_tokens(point) for point in (*a, *b)):
        by_digest = {point.key.digest: point for point in b}
        same_keys = {point.key.digest for point in a} == by_digest.keys()
        if not (same_keys and all(_same_rows(point, by_digest[point.key.digest]) for point in a)):
            return _pairs_by_token(a, b)
    others = {point.key.digest: point for point in b}
    return [PointPair((point,), (others[point.key.digest],)) for point in a if point.key.digest in others]


def _has_tokens(point: DumpedPoint) -> bool:
    return all(record.tokens is not None for record in point.records.values())


def _same_rows(a: DumpedPoint, b: DumpedPoint) -> bool:
    """Whether the rows are the same tokens, by name and in one order: then nothing needs to be gathered."""
    return [record.tokens for record in a.records.values()] == [record.tokens for record in b.records.values()]


def _pairs_by_token(a: list[DumpedPoint], b: list[DumpedPoint]) -> list[PointPair]:
    """All with all; or step by step, where a token comes again because each step is a batch of its own (a trainer's).

    Where it comes again on one side alone, that may be a server, which computes a preempted request's rows anew: then
    steps are not paired one by one, unless that lets every token of the other side meet its partner, too.
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


# By sequence: the stretches of positions that are there, in order.
_Spans = dict[object, list[tuple[int, int]]]


def _spans(points: Iterable[DumpedPoint]) -> _Spans:
    """By runs, of the first rank: each rank's rows are within its point's."""
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
    """Whether two points have one token."""
    return any(later < end for own in _spans(points).values() for (_, end), (later, _) in pairwise(own))


def _meet_in_their_steps(once: Sequence[DumpedPoint], others: Sequence[DumpedPoint]) -> bool:
    """Whether every token of `once` that `others` have at all, they have in the step that it has there."""
    everywhere, theirs = _spans(others), _by_step(others)
    return all(
        _common(here, _spans(theirs.get(step, []))) == _common(here, everywhere)
        for step, here in ((step, _spans(points)) for step, points in _by_step(once).items())
    )


def _common(once: _Spans, others: _Spans) -> int:
    """How many tokens of `once`, which has none twice, are in `others`."""
    count = 0
    for sequence, own in once.items():
        theirs, place = others.get(sequence, []), 0
        for start, end in own:
            reached = start
            # Those of theirs that end before this one begins are behind all that follow, too.
            while place < len(theirs) and theirs[place][1] <= start:
                place += 1
            for begin, stop in theirs[place:]:
                if begin >= end:
                    break
                count += max(0, min(stop, end) - max(begin, reached))
                reached = max(reached, min(stop, end))
    return count


def alone(side: str, points: Sequence[DumpedPoint], others: Sequence[DumpedPoint]) -> list[FindingRecord]:
    """One finding per name that has points on one side only. side: "a" or "b".

    A point of rows that may be another's computed anew is an error: they should have been compared, unless the tokens
    are those of another batch.
    """
    here, there = side.upper(), "B" if side == "a" else "A"
    names = {point.name for point in others}
    by_name: dict[str, list[DumpedPoint]] = {}
    anew = _perhaps_anew(points, others)
    found = _findings_of_anew(side, [point for point in points if id(point) in anew])
    for point in points:
        if id(point) not in anew:
            by_name.setdefault(point.name, []).append(point)
    for number, (name, own) in enumerate(by_name.items()):
        labels = [point.key.text for point in own[:_MOST_NAMED]]
        if name in names:
            near = [point.key.text for point in others if point.name == name][:2]
            hint = f"{there} has that name with other tags, steps or counts, such as {near[0]}"
        else:
            # Looking for near names takes time by the product of both sides' names.
            near = _near_names(name, names) if number < _MOST_LOOKED_FOR else []
            hint = f"nothing at {there} is called so" + (f"; is it {' or '.join(near)} there?" if near else "")
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


def _findings_of_anew(side: str, points: Sequence[DumpedPoint]) -> list[FindingRecord]:
    here, there = side.upper(), "B" if side == "a" else "A"
    by_name: dict[str, list[DumpedPoint]] = {}
    for point in points:
        by_name.setdefault(point.name, []).append(point)
    return [
        FindingRecord(
            what="only_in_a" if side == "a" else "only_in_b",
            text=f"only {here} has {own[0].key.text}{f' and {len(own) - 1} more' if own[1:] else ''}, with tokens that "
            f"{there} has in another step: rows that were computed anew, or a batch that is numbered like an earlier "
            f"one? They were not compared. Where it is another batch, leave its step out (--filter 'step != "
            f"{own[0].step}'), or give its sequences other ids.",
            name=name,
            count=len(own),
            points=[point.key.text for point in own[:_MOST_NAMED]],
            is_error=True,
        )
        for name, own in by_name.items()
    ]


def _perhaps_anew(points: Sequence[DumpedPoint], others: Sequence[DumpedPoint]) -> set[int]:
    """Of points without a partner, by id, those whose tokens the other side has, and has only once."""
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
    """At most two names that are spelt nearly so; else those of which one is the beginning of the other."""
    known = sorted(names)
    near = difflib.get_close_matches(name, known, n=2, cutoff=0.7)
    if near:
        return near
    beginnings = [other for other in known if _is_beginning(*sorted((name, other), key=len))]
    return sorted(beginnings, key=lambda other: abs(len(other) - len(name)))[:2]


def _is_beginning(short: str, long: str) -> bool:
    """Of a third of it at least: `model` begins the name of nearly every module, and says nothing."""
    return long.startswith(short) and 3 * len(short) >= len(long)
