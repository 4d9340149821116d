"""Dumps of one job, read back: points merged over its ranks, in the order in which the program came to them.

open_dumps -> directory (records, problems) -> merged by key -> ordered -> points, whose tensors are read when asked
"""

from __future__ import annotations

import heapq
import json
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from grafter.core.filters.expression import parse_filter
from grafter.core.points import OWN_TAGS, PHASE, PointKey, identify
from grafter.core.records import Role, TensorStatistics
from grafter.errors import DumpError
from grafter.store.dumps.directory import DumpDirectory, find_role_directory, read_directory
from grafter.store.dumps.point import DumpedPoint
from grafter.store.dumps.record import DumpRecord, Problem
from grafter.store.dumps.record_file import lines_name

if TYPE_CHECKING:
    from grafter.store.dumps.record import DumpedLeaf, DumpRecord


class Dumps:
    """What one job dumped: a sequence of `DumpedPoint`, in execution order; `open_dumps` makes it.

    directory: the role's. role, ranks (those that dumped), world_size; role and world_size are None where the ranks
    dumped no point. run: the content of run.json, or None.
    problems: what could not be read, while the rest was; notes: what only deserves mention. A program that judges by
    these dumps shows both.
    """

    def __init__(self, found: DumpDirectory) -> None:
        self.directory: Path = found.path
        self.run: dict[str, Any] | None = found.run
        self.problems: list[Problem] = found.problems
        self.notes: list[str] = found.notes
        self.ranks: tuple[int, ...] = tuple(found.records)
        first = next((record for records in found.records.values() for record in records), None)
        self.role: Role | None = first.role if first is not None else None
        self.world_size: int | None = first.role_world_size if first is not None else None
        identifying = _identifying_tags(found.run)
        merged: dict[str, tuple[PointKey, dict[int, DumpRecord]]] = {}
        sequences: list[list[str]] = []
        for rank, records in found.records.items():
            sequences.append(_merge(merged, rank, records, identifying, self.problems))
        times = {digest: min(r.time for r in records.values()) for digest, (_, records) in merged.items()}
        self.points: tuple[DumpedPoint, ...] = tuple(
            DumpedPoint(found.path, *merged[digest]) for digest in in_execution_order(sequences, times)
        )
        self._by_digest = {point.key.digest: point for point in self.points}

    def __len__(self) -> int:
        return len(self.points)

    def __iter__(self) -> Iterator[DumpedPoint]:
        return iter(self.points)

    def __getitem__(self, number: int) -> DumpedPoint:
        return self.points[number]

    def __repr__(self) -> str:
        faults = f", {len(self.problems)} problems" if self.problems else ""
        return f"<Dumps of the {self.role}, {len(self.points)} points of ranks {list(self.ranks)}{faults}>"

    @property
    def names(self) -> tuple[str, ...]:
        """The names of its points, each once, in execution order."""
        return tuple(dict.fromkeys(point.name for point in self.points))

    def get(self, key: PointKey) -> DumpedPoint | None:
        """The point of a key, such as another job's `point.key`; None where there is none."""
        return self._by_digest.get(key.digest)

    def point(
        self, name: str, /, *, step: int = 0, phase: str = PHASE, occurrence: int = 0, **tags: Any
    ) -> DumpedPoint:
        """The one point of this name, step, phase, occurrence and these tags; tags that are left out may be anything.

        Raises DumpError where there is none, or more than one.
        """
        named = [point for point in self.points if point.name == name]
        wanted = (step, phase, occurrence)
        fitting = [
            point
            for point in named
            if (point.step, point.phase, point.occurrence) == wanted
            and all(point.tags.get(tag) == value for tag, value in tags.items())
        ]
        if len(fitting) == 1:
            return fitting[0]
        said = ", ".join(f"{tag}={value!r}" for tag, value in {**tags, "step": step, "phase": phase}.items())
        if fitting:
            raise DumpError(f"{len(fitting)} points are {name!r} ({said}), such as {fitting[0]} and {fitting[1]}.")
        instead = f"Of that name there are {_some(named)}" if named else f"The names: {', '.join(self.names[:10])}"
        raise DumpError(f"{self.directory}: no point is {name!r} ({said}, occurrence={occurrence}). {instead}.")

    def select(self, expression: str) -> list[DumpedPoint]:
        """The points that a filter matches, in execution order: `dumps.select("layer_id == 3 and step >= 2")`.

        The language is that of GRAFTER_DUMP_FILTER (docs/filters.md). Raises FilterError for what is no filter.
        """
        matches = parse_filter(expression, setting="select").matches
        return [point for point in self.points if matches(point.tags)]

    def table(self) -> list[dict[str, Any]]:
        """One flat dict per tensor, rank and point, all with the same keys, for `pandas.DataFrame(dumps.table())`.

        Columns: name, the tags, step, phase, occurrence, role, role_rank, path, shape, dtype, statistics, file and
        more (docs/dump-format.md). Values of one column are of one type, or None. No tensor is read.
        """
        return rows_of(self.points)

    def check(self) -> list[Problem]:
        """Open every file, and compare it with its record; what is wrong. Reads headers, and bools in full."""
        found = []
        for point in self.points:
            for rank, record in point.records.items():
                for leaf in record.leaves if record.file is not None else ():
                    try:
                        point.local(rank, leaf.path)
                    except DumpError as error:
                        found.append(Problem(str(record.file), str(error)))
        return found


def open_dumps(directory: str | os.PathLike[str], *, role: str | None = None) -> Dumps:
    """What a job dumped, to be read point by point; nothing but metadata is read here.

    directory: a role's directory, `<dir>/<run_name>/<role>`, or a run's, `<dir>/<run_name>`, that holds one role.
    role: "baseline" or "target", which one of a run that holds both.

    Files are not trusted: what is damaged among the rest is in `Dumps.problems`. Raises DumpError where there are no
    dumps, both roles and no choice, nothing that can be read, or a newer version of the format.
    """
    return Dumps(read_directory(find_role_directory(directory, role)))


def _identifying_tags(run: Mapping[str, Any] | None) -> frozenset[str] | None:
    """The tags that identify a point, where the run had GRAFTER_KEY set; None: all but rank tags."""
    configuration = run.get("configuration") if run is not None else None
    key = configuration.get("key") if isinstance(configuration, dict) else None
    return frozenset(key.replace(",", " ").split()) if isinstance(key, str) else None


def _merge(
    merged: dict[str, tuple[PointKey, dict[int, DumpRecord]]],
    rank: int,
    records: list[DumpRecord],
    identifying: frozenset[str] | None,
    problems: list[Problem],
) -> list[str]:
    """Add one rank's records to the points; the digests of its points, in its order."""
    sequence = []
    for record in records:
        key = PointKey(record.name, identify(record.tags, identifying), record.step, record.phase, record.occurrence)
        _, of_ranks = merged.setdefault(key.digest, (key, {}))
        if rank in of_ranks:
            problems.append(
                Problem(
                    lines_name(rank),
                    f"the records {of_ranks[rank].order} and {record.order} are both of {key.text}; the first counts",
                )
            )
            continue
        of_ranks[rank] = record
        sequence.append(key.digest)
    return sequence


def _some(points: list[DumpedPoint]) -> str:
    return ", ".join(map(str, points[:5])) + (f" and {len(points) - 5} more" if len(points) > 5 else "")


# The execution order of a job, from what each of its ranks saw.


def in_execution_order(sequences: Sequence[Sequence[str]], times: Mapping[str, float]) -> list[str]:
    """One order of all points that is that of each rank. `sequences`: each rank's points, each once.

    Where no rank saw two points (stages of a pipeline), the earlier by time comes first. Where two ranks saw them in
    another order (autograd's threads), no order is that of both, and the earlier by time comes first, too.
    """
    before: dict[str, int] = {}
    after: dict[str, list[str]] = {}
    lowest: dict[str, tuple[int, int]] = {}
    for number, sequence in enumerate(sequences):
        for place, point in enumerate(sequence):
            before[point] = before.get(point, 0) + (place > 0)
            lowest.setdefault(point, (number, place))
            if place:
                after.setdefault(sequence[place - 1], []).append(point)

    def priority(point: str) -> tuple[float, tuple[int, int], str]:
        time = times[point]
        # What is no number (a damaged file) sorts last.
        return (time if time == time else float("inf")), lowest[point], point

    waiting = sorted(map(priority, before))
    ready = [entry for entry in waiting if not before[entry[2]]]
    heapq.heapify(ready)
    ordered: dict[str, None] = {}
    for breaker in waiting:
        # Nothing is ready while points remain only where ranks disagree: the earliest of what remains goes on.
        if not ready and breaker[2] not in ordered:
            ready.append(breaker)
        while ready:
            point = heapq.heappop(ready)[2]
            if point in ordered:
                continue
            ordered[point] = None
            for follower in after.get(point, ()):
                before[follower] -= 1
                if not before[follower] and follower not in ordered:
                    heapq.heappush(ready, priority(follower))
    return list(ordered)


# The table of dumps: flat rows with one type per column, as pandas and polars take them. Neither is needed here.

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
