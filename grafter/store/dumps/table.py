"""The table of dumps: flat rows with one type per column, as pandas and polars take them. Neither is needed here."""

from __future__ import annotations

import json
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from grafter.core.points import OWN_TAGS
from grafter.core.records import TensorStatistics

if TYPE_CHECKING:
    from grafter.store.dumps.point import DumpedPoint
    from grafter.store.dumps.record import DumpedLeaf, DumpRecord

_STATISTICS = tuple(TensorStatistics.model_fields)
# What a tag of the same name would hide; such a tag's column is `tag_<name>`.
_COLUMNS = (
    "name", "step", "phase", "occurrence", "role", "role_rank", "order", "time", "path", "shape", "dtype", "device",
    "layout", "level", "file", "reason", "direction", "outcome", "call_site", "checksum", "grafted_checksum",
    *_STATISTICS, *(f"grafted_{statistic}" for statistic in _STATISTICS),
)  # fmt: skip


def rows_of(points: Iterable[DumpedPoint]) -> list[dict[str, Any]]:
    """One row per point, rank and tensor; a point of which nothing was saved has one row without a tensor."""
    points = list(points)
    tags: dict[str, str] = {}
    for point in points:
        for record in point.records.values():
            for tag in record.tags:
                if tag not in OWN_TAGS:
                    tags.setdefault(tag, f"tag_{tag}" if tag in _COLUMNS else tag)
    rows = []
    for point in points:
        for record in point.records.values():
            for leaf in record.leaves or (None,):
                rows.append(_row(record, leaf, tags))
    for column in tags.values():
        _make_one_type(rows, column)
    return rows


def _row(record: DumpRecord, leaf: DumpedLeaf | None, tags: dict[str, str]) -> dict[str, Any]:
    row: dict[str, Any] = {"name": record.name}
    row.update((column, record.tags.get(tag)) for tag, column in tags.items())
    row.update((column, None) for column in _COLUMNS[1:])
    row.update((column, getattr(record, column)) for column in _COLUMNS if hasattr(record, column))
    if leaf is None:
        return row
    row.update(
        path=leaf.path,
        shape=list(leaf.shape),
        dtype=leaf.dtype,
        device=leaf.device,
        layout=None if leaf.layout is None else str(leaf.layout),
        checksum=leaf.checksum,
        grafted_checksum=leaf.grafted_checksum,
    )
    for prefix, statistics in (("", leaf.statistics), ("grafted_", leaf.grafted_statistics)):
        if statistics is not None:
            row.update((prefix + statistic, getattr(statistics, statistic)) for statistic in _STATISTICS)
    return row


def _make_one_type(rows: list[dict[str, Any]], column: str) -> None:
    """Tags are any scalars, and one tag may be a number here and a text there; then all become text."""
    types = {type(row[column]) for row in rows} - {type(None)}
    if int in types and any(type(row[column]) is int and abs(row[column]) >= 2**63 for row in rows):
        # No column of a table holds it as a number.
        types = {object}
    if types <= {int, float} and len(types) == 2:
        for row in rows:
            row[column] = float(row[column]) if row[column] is not None else None
    elif len(types) > 1 or not types <= {str, int, float, bool}:
        for row in rows:
            value = row[column]
            row[column] = value if value is None or isinstance(value, str) else json.dumps(value, default=repr)
