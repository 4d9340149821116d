"""The rest of a point: tensors that were not saved, which agree with nothing, and leaves that are no tensors."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from typing import Any, Literal

import torch

from grafter.analysis.compare.pairs import Pair
from grafter.analysis.compare.record import LeafRecord
from grafter.errors import GrafterError
from grafter.store.dumps.point import DumpedPoint
from grafter.store.dumps.record import MAX_REPR, TENSOR_MARK, DumpedLeaf
from grafter.store.dumps.record_file import shown
from grafter.store.dumps.taken import checksum


def with_unsaved(leaves: Sequence[LeafRecord], pair: Pair, *, with_values: bool) -> list[LeafRecord]:
    """The leaves, and those that a rank of either side did not save: what passed without them is `skipped`.

    with_values: whether the values of both sides were compared; a rank that has none then lacks them.
    """
    lost: dict[str, str] = {}
    for side, points in (("A", pair.a), ("B", pair.b)):
        for path, why in _unsaved(points, with_values):
            lost.setdefault(path, f"{side} {why}")
    found = []
    for leaf in leaves:
        if leaf.path not in lost:
            found.append(leaf)
            continue
        why = lost.pop(leaf.path)
        if leaf.verdict in ("passed", "skipped"):
            found.append(leaf.model_copy(update={"verdict": "skipped", "reason": why}))
        else:
            found.append(leaf.model_copy(update={"reason": f"{leaf.reason}; {why}"}))
    return found + [LeafRecord(path=path, verdict="skipped", reason=why) for path, why in lost.items()]


def with_missing_ranks(leaves: Sequence[LeafRecord], pair: Pair) -> list[LeafRecord]:
    """The leaves; where ranks that take part left no dump of the point, what passed without them is `skipped`."""
    lacking = [
        f"{side}'s ranks {sorted(missing)}"
        for side, points in (("A", pair.a), ("B", pair.b))
        if (missing := {rank for point in points for rank in point.missing_ranks})
    ]
    if not lacking:
        return list(leaves)
    why = f"there is no dump of it of {' and '.join(lacking)}, which take part in it"
    return [
        leaf.model_copy(update={"verdict": "skipped", "reason": why}) if leaf.verdict == "passed" else leaf
        for leaf in leaves
    ]


def _unsaved(points: Sequence[DumpedPoint], with_values: bool) -> Iterator[tuple[str, str]]:
    for point in points:
        for rank, record in point.records.items():
            who = f"(rank {rank}) did not save it"
            for path, why in (record.unsaved or {}).items():
                yield path, f"{who}: {shown(why)}"
            if record.unsaved is None and record.reason is not None:
                # Of a grafter that did not tell the paths apart.
                yield "", f"(rank {rank}) may not have saved all: {shown(record.reason)}"
            if with_values and record.file is None:
                why = record.reason or f"its level is {record.level!r}"
                yield from ((leaf.path, f"{who}: {shown(why)}") for leaf in record.leaves)


def compare_others(pair: Pair, *, keep_equal: bool = False) -> list[LeafRecord]:
    """The leaves that are no tensors, where they are not the same: rank by rank where both sides have the same ranks,
    else (and of rows paired by token) by the values that there are. keep_equal: those that are the same, too."""
    paths = dict.fromkeys(
        path for point in (*pair.a, *pair.b) for record in point.records.values() for path in record.others
    )
    found = []
    for path in paths:
        try:
            leaf = _compare_other(pair, path) or _equal(pair, path, keep_equal=keep_equal)
        except GrafterError as error:
            leaf = LeafRecord(path=path, verdict="error", reason=str(error))
        if leaf is not None:
            found.append(leaf)
    return found


def _equal(pair: Pair, path: str, *, keep_equal: bool) -> LeafRecord | None:
    """Of a leaf that is the same: that it is, or that its repr alone is, which may leave out what differs."""
    if any(_is_cut_short(point, path) for point in (*pair.a, *pair.b)):
        reason = f"only the first {MAX_REPR} characters of its repr were saved, and these are equal"
        return LeafRecord(path=path, verdict="skipped", reason=reason)
    if not keep_equal:
        return None
    if any(_was_replaced(point, path) for point in (*pair.a, *pair.b)):
        return LeafRecord(path=path, verdict="skipped", reason="only its repr was saved, which is equal")
    return LeafRecord(
        path=path, verdict="passed", reason="it is no tensor, and is equal", values={"mismatched_fraction": 0.0}
    )


def _compare_other(pair: Pair, path: str) -> LeafRecord | None:
    """None: they are the same. Raises GrafterError where an array among them cannot be read."""
    sides = pair.a, pair.b
    if any(_is_array_without_file(point, path) for points in sides for point in points):
        return LeafRecord(path=path, verdict="skipped", reason="it is an array, whose values were not saved")
    a, b = ([_by_rank(point, path) for point in points] for points in sides)
    if pair.by_token or a[0].keys() != b[0].keys():
        only = _differing(a, b)
        differing = [(min(only[0], default=""), min(only[1], default=""))] if any(only) else []
    else:
        differing = [(one, b[0][rank]) for rank, one in a[0].items() if one != b[0][rank]]
    if not differing:
        return None
    if not any(a) or not any(b):
        there = "A" if any(a) else "B"
        return LeafRecord(path=path, verdict="error", reason=f"only {there} has this part of the point, no tensor")
    values = _described_values(*differing[0])
    if any(_was_replaced(point, path) for points in sides for point in points):
        return LeafRecord(path=path, verdict="skipped", reason=f"only its repr was saved, and that differs: {values}")
    if pair.by_token:
        reason = f"it is no tensor, so it is not paired by token, and differs: {values}"
        return LeafRecord(path=path, verdict="skipped", reason=reason)
    return LeafRecord(path=path, verdict="failed", reason=f"it is no tensor, and differs: {values}")


def _described_values(a: str, b: str) -> str:
    """Both values; of long ones, which are cut, also where they begin to differ."""
    text = " and ".join(f"{side} has {shown(own)}" for side, own in (("A", a), ("B", b)) if own)
    if shown(a) != shown(b):
        return text
    place = next((n for n, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))
    return f"{text} (from character {place} on: {a[place : place + 40]!r} and {b[place : place + 40]!r})"


def _by_rank(point: DumpedPoint, path: str) -> dict[int, str]:
    """Of each rank that has it, as JSON, in which 1, 1.0 and True are apart and NaN is NaN."""
    return {
        rank: json.dumps(point.other(rank, path), sort_keys=True, default=_described)
        for rank, record in point.records.items()
        if path in record.others
    }


def _described(array: Any) -> Any:
    assert isinstance(array, torch.Tensor)
    return {TENSOR_MARK: [str(array.dtype), list(array.shape), checksum(array.contiguous())]}


def _differing(a: Sequence[dict[int, str]], b: Sequence[dict[int, str]]) -> tuple[set[str], set[str]]:
    """The values that only A, and that only B, has."""
    of_a, of_b = ({value for by_rank in points for value in by_rank.values()} for points in (a, b))
    return of_a - of_b, of_b - of_a


def _is_array_without_file(point: DumpedPoint, path: str) -> bool:
    return any(
        record.file is None and TENSOR_MARK in json.dumps(record.others.get(path)) for record in point.records.values()
    )


def _is_cut_short(point: DumpedPoint, path: str) -> bool:
    return any(len(text) >= MAX_REPR and text.endswith("...") for _, text in _replaced(point, path))


def _was_replaced(point: DumpedPoint, path: str) -> bool:
    return any(True for _ in _replaced(point, path))


def _replaced(point: DumpedPoint, path: str) -> Iterator[tuple[str, str]]:
    """What of a leaf was saved as its repr: where, and the repr."""
    whole = f"others{path}"
    for record in point.records.values():
        for place, text in record.not_encoded.items():
            if place == whole or place.startswith((f"{whole}.", f"{whole}[")):
                yield place, text


# Points of which a side saved no values, compared by the checksums of the ranks' own tensors.

Which = Literal["value", "grafted"]
# Where what says how a tensor lies begins in `_checksums`.
_OF_LAYOUT = 4


def compare_checksums(pair: Pair, which: Which) -> LeafRecord:
    """Without values, the checksums of the ranks' own tensors, where both sides have them and are laid out alike."""
    sides = (pair.a, pair.b)
    # Without a checksum of one side no file of the other need be read.
    has_sums = all(
        _checksum_of(leaf, which) is not None
        for points in sides
        for point in points
        for record in point.records.values()
        if record.file is None
        for leaf in record.leaves
    )
    try:
        sums = [_checksums(points, which) if has_sums else [] for points in sides]
    except GrafterError as error:
        return LeafRecord(path="", verdict="error", reason=str(error))
    known = all(one[-1] is not None for side in sums for one in side) and all(sums)
    if known and sums[0] == sums[1]:
        return LeafRecord(path="", verdict="passed", reason="equal by checksum", values={"mismatched_fraction": 0.0})
    said = ""
    if known and [s[:-1] for s in sums[0]] == [s[:-1] for s in sums[1]]:
        said = " Their checksums differ."
    elif known and [s[:_OF_LAYOUT] for s in sums[0]] == [s[:_OF_LAYOUT] for s in sums[1]]:
        said = " They are laid out differently, and then checksums do not show whether the values are equal."
    reasons = {
        record.reason or f"saved at the level {record.level!r}"
        for point in (*pair.a, *pair.b)
        for record in point.records.values()
        if record.file is None
    }
    return LeafRecord(path="", verdict="skipped", reason=f"no values to compare: {'; '.join(sorted(reasons))}.{said}")


def _checksum_of(leaf: DumpedLeaf, which: Which) -> str | None:
    return (leaf.grafted_checksum if which == "grafted" else None) or leaf.checksum


def _checksums(points: Sequence[DumpedPoint], which: Which) -> list[tuple[object, ...]]:
    """Of each rank's own tensors; of what was saved whole, from its file. Raises DumpError where that is damaged."""
    return [
        (
            *(rank, leaf.path, leaf.shape, leaf.dtype),
            leaf.layout,
            tuple(axis for axis in record.axes if axis[2] > 1) if leaf.layout is not None else (),
            _checksum_of(leaf, which)
            if record.file is None
            else checksum(point.local(rank, leaf.path, _which_on(point, rank, leaf.path, which)).contiguous()),
        )
        for point in points
        for rank, record in point.records.items()
        for leaf in record.leaves
    ]


def _which_on(point: DumpedPoint, rank: int, path: str, which: Which) -> Which:
    return "grafted" if which == "grafted" and rank in point.ranks_with(path, "grafted") else "value"
