"""The parts of a point without values to measure: unsaved tensors, their checksums, and leaves that are not tensors."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from typing import Any

import torch

from grafter.analysis.compare.comparison_records import ComparedLeaf
from grafter.analysis.compare.point_pairs import PointPair
from grafter.core.leaves import TENSOR_MARK
from grafter.errors import GrafterError
from grafter.store.dumps.pending_record import checksum
from grafter.store.dumps.point import DumpedPoint, Which
from grafter.store.dumps.record import MAX_REPR, DumpedLeaf
from grafter.store.dumps.record_file import shown


def with_unsaved(leaves: Sequence[ComparedLeaf], pair: PointPair, *, with_values: bool) -> list[ComparedLeaf]:
    """Add the leaves that a rank of either side did not save. A leaf that passed without them becomes `skipped`.

    with_values: whether the values of both sides were compared; then a rank without values counts as not saved.
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
    return found + [ComparedLeaf(path=path, verdict="skipped", reason=why) for path, why in lost.items()]


def with_missing_ranks(leaves: Sequence[ComparedLeaf], pair: PointPair) -> list[ComparedLeaf]:
    """The leaves; those that passed become `skipped` if ranks that take part in the point left no dump of it."""
    lacking = [
        f"{side}'s ranks {sorted(missing)}"
        for side, points in (("A", pair.a), ("B", pair.b))
        if (missing := {rank for point in points for rank in point.missing_ranks})
    ]
    if not lacking:
        return list(leaves)
    why = f"{' and '.join(lacking)} take part in it and left no dump of it"
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
                # Written by an older version, which did not record the paths.
                yield "", f"(rank {rank}) may not have saved all: {shown(record.reason)}"
            if with_values and record.file is None:
                why = record.reason or f"its level is {record.level!r}"
                yield from ((leaf.path, f"{who}: {shown(why)}") for leaf in record.leaves)


def compare_others(pair: PointPair, *, keep_equal: bool = False) -> list[ComparedLeaf]:
    """The leaves that are not tensors and differ.

    They are compared rank by rank if both sides have the same ranks. Otherwise, and if rows are paired by token, the
    sets of values are compared. keep_equal: return equal leaves too.
    """
    paths = dict.fromkeys(
        path for point in (*pair.a, *pair.b) for record in point.records.values() for path in record.others
    )
    found = []
    for path in paths:
        try:
            leaf = _compare_other(pair, path) or _equal(pair, path, keep_equal=keep_equal)
        except GrafterError as error:
            leaf = ComparedLeaf(path=path, verdict="error", reason=str(error))
        if leaf is not None:
            found.append(leaf)
    return found


def _equal(pair: PointPair, path: str, *, keep_equal: bool) -> ComparedLeaf | None:
    """The verdict on a leaf without a difference. If only its repr was saved, a difference may be missing."""
    if any(_is_cut_short(point, path) for point in (*pair.a, *pair.b)):
        reason = f"only the first {MAX_REPR} characters of its repr were saved, and these are equal"
        return ComparedLeaf(path=path, verdict="skipped", reason=reason)
    if not keep_equal:
        return None
    if any(_was_replaced(point, path) for point in (*pair.a, *pair.b)):
        return ComparedLeaf(path=path, verdict="skipped", reason="only its repr was saved, which is equal")
    return ComparedLeaf(
        path=path, verdict="passed", reason="it is not a tensor, and is equal", values={"mismatched_fraction": 0.0}
    )


def _compare_other(pair: PointPair, path: str) -> ComparedLeaf | None:
    """The verdict on a leaf that differs; None if it is the same. Raises GrafterError if an array cannot be read."""
    sides = pair.a, pair.b
    if any(_is_array_without_file(point, path) for points in sides for point in points):
        return ComparedLeaf(path=path, verdict="skipped", reason="it is an array, whose values were not saved")
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
        return ComparedLeaf(path=path, verdict="error", reason=f"only {there} has this leaf, which is not a tensor")
    values = _described_values(*differing[0])
    if any(_was_replaced(point, path) for points in sides for point in points):
        return ComparedLeaf(path=path, verdict="skipped", reason=f"only its repr was saved, and that differs: {values}")
    if pair.by_token:
        reason = f"it is not a tensor, so it is not paired by token, and it differs: {values}"
        return ComparedLeaf(path=path, verdict="skipped", reason=reason)
    return ComparedLeaf(path=path, verdict="failed", reason=f"it is not a tensor, and it differs: {values}")


def _described_values(a: str, b: str) -> str:
    """Both values as text; also where they begin to differ, if they are too long to be shown in full."""
    text = " and ".join(f"{side} has {shown(own)}" for side, own in (("A", a), ("B", b)) if own)
    if shown(a) != shown(b):
        return text
    place = next((n for n, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))
    return f"{text} (from character {place} on: {a[place : place + 40]!r} and {b[place : place + 40]!r})"


def _by_rank(point: DumpedPoint, path: str) -> dict[int, str]:
    """The leaf of each rank that has it, as JSON, in which 1, 1.0 and True differ, and NaN equals NaN."""
    return {
        rank: json.dumps(point.other(rank, path), sort_keys=True, default=_described)
        for rank, record in point.records.items()
        if path in record.others
    }


def _described(array: Any) -> Any:
    assert isinstance(array, torch.Tensor)
    return {TENSOR_MARK: [str(array.dtype), list(array.shape), checksum(array.contiguous())]}


def _differing(a: Sequence[dict[int, str]], b: Sequence[dict[int, str]]) -> tuple[set[str], set[str]]:
    """The values that only A has, and those that only B has."""
    of_a, of_b = ({value for by_rank in points for value in by_rank.values()} for points in (a, b))
    return of_a - of_b, of_b - of_a


def _is_array_without_file(point: DumpedPoint, path: str) -> bool:
    return any(
        record.file is None and TENSOR_MARK in json.dumps(record.others.get(path)) for record in point.records.values()
    )


def _is_cut_short(point: DumpedPoint, path: str) -> bool:
    return any(len(text) >= MAX_REPR and text.endswith("...") for _, text in _replaced(point, path))


def _was_replaced(point: DumpedPoint, path: str) -> bool:
    return next(_replaced(point, path), None) is not None


def _replaced(point: DumpedPoint, path: str) -> Iterator[tuple[str, str]]:
    """The parts of a leaf that were saved as their repr: path, and repr."""
    whole = f"others{path}"
    for record in point.records.values():
        for place, text in record.not_encoded.items():
            if place == whole or place.startswith((f"{whole}.", f"{whole}[")):
                yield place, text


def compare_checksums(pair: PointPair, which: Which) -> ComparedLeaf:
    """Compare a pair without values by the checksums of the ranks' own tensors.

    The result is `skipped` unless both sides have checksums and the same layouts.
    """
    sides = (pair.a, pair.b)
    # If one side lacks checksums, the files of the other one need not be read.
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
        return ComparedLeaf(path="", verdict="error", reason=str(error))
    known = all(one[-1] is not None for side in sums for one in side) and all(sums)
    if known and sums[0] == sums[1]:
        return ComparedLeaf(path="", verdict="passed", reason="equal by checksum", values={"mismatched_fraction": 0.0})
    said = ""
    if known and [s[:-1] for s in sums[0]] == [s[:-1] for s in sums[1]]:
        said = " Their checksums differ."
    elif known and [s[:4] for s in sums[0]] == [s[:4] for s in sums[1]]:
        said = " Their layouts differ, so checksums do not show whether the values are equal."
    reasons = {
        record.reason or f"saved at the level {record.level!r}"
        for point in (*pair.a, *pair.b)
        for record in point.records.values()
        if record.file is None
    }
    return ComparedLeaf(path="", verdict="skipped", reason=f"no values to compare: {'; '.join(sorted(reasons))}.{said}")


def _checksum_of(leaf: DumpedLeaf, which: Which) -> str | None:
    return (leaf.grafted_checksum if which == "grafted" else None) or leaf.checksum


def _checksums(points: Sequence[DumpedPoint], which: Which) -> list[tuple[object, ...]]:
    """(rank, path, shape, dtype, layout, axes, checksum) of each rank's own tensors.

    The checksum of a saved tensor is computed from its file. Raises DumpError if the file is damaged.
    """
    return [
        (
            *(rank, leaf.path, leaf.shape, leaf.dtype),
            leaf.layout,
            tuple(axis for axis in record.axes if axis[2] > 1) if leaf.layout is not None else (),
            _checksum_of(leaf, which)
            if record.file is None
            else checksum(_stored(point, rank, leaf.path, which).contiguous()),
        )
        for point in points
        for rank, record in point.records.items()
        for leaf in record.leaves
    ]


def _stored(point: DumpedPoint, rank: int, path: str, which: Which) -> torch.Tensor:
    is_grafted = which == "grafted" and rank in point.ranks_with(path, "grafted")
    return point.local(rank, path, "grafted" if is_grafted else "value")
