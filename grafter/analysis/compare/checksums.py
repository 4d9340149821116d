"""Points of which a side saved no values, compared by the checksums of the ranks' own tensors."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from grafter.analysis.compare.pairs import Pair
from grafter.analysis.compare.record import LeafRecord
from grafter.errors import GrafterError
from grafter.store.dumps.point import DumpedPoint
from grafter.store.dumps.record import DumpedLeaf
from grafter.store.dumps.taken import checksum

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
