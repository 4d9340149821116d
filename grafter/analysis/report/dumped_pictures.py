"""Pictures of points whose tensors both jobs dumped, from the worst point down, until the page has enough of them."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING

from grafter.analysis.report.page_data import PageFinding, PagePoint
from grafter.analysis.report.pictures import Picture, draw_pair
from grafter.errors import GrafterError

if TYPE_CHECKING:
    from grafter.analysis.compare.alignment import WholeTensor
    from grafter.analysis.compare.point_pairs import PointPair
    from grafter.store.dumps.point import DumpedPoint, Which
    from grafter.store.dumps.reader import Dumps

MOST_PICTURES = 16
# The limit on the page, and on what is read to draw the pictures (some seconds).
MOST_BYTES = 3 << 20
MOST_READ_BYTES = 4 << 30

HOW_TO_DUMP = (
    "No tensors were dumped in both jobs, so there is nothing to draw here. "
    "Run again with --dump \"search('mlp', name)\" (any filter; docs/filters.md), and the report draws them."
)
_NONE_IN_BOTH = "No point was dumped with its values in both jobs, so there is nothing to draw here."


def draw_run(run_directory: Path, points: Sequence[PagePoint]) -> tuple[tuple[Picture, ...], str, list[PageFinding]]:
    """One run's dumps: (pictures, a sentence if not every point has one, findings)."""
    from grafter.store.dumps.reader import open_dumps

    findings: list[PageFinding] = []
    sides = []
    for role in ("baseline", "target"):
        if not has_role_dumps(run_directory / role):
            return (), HOW_TO_DUMP, findings
        try:
            dumps = open_dumps(run_directory, role=role)
        except GrafterError as error:
            findings.append(PageFinding("problem", f"the dumps of the {role} cannot be read: {error}"))
            return (), "The dumps of this run cannot be read; the first lines of this page say why.", findings
        findings += [PageFinding("problem", f"dumps of the {role}: {problem}") for problem in dumps.problems[:10]]
        sides.append(dumps)
    pictures, note = draw_worst(_pair_up(points, *sides))
    return pictures, note, findings


def has_dumps(directory: Path) -> bool:
    """Whether both jobs of this run dumped."""
    return all(has_role_dumps(directory / role) for role in ("baseline", "target"))


def has_role_dumps(directory: Path) -> bool:
    """Whether this is a role's directory with dumps in it."""
    return any(True for pattern in ("rank*.dumps.jsonl", "rank*/*.safetensors") for _ in directory.glob(pattern))


def _pair_up(points: Sequence[PagePoint], a: Dumps, b: Dumps) -> list[tuple[PagePoint, PointPair]]:
    from grafter.analysis.compare.point_pairs import PointPair

    dumped = {}
    for one in a.points:
        other = b.get(one.key)
        if other is not None:
            own = _identity(one.name, one.step, one.phase, one.occurrence, dict(one.key.identifying))
            dumped[own] = PointPair((one,), (other,))
    identities = (_identity(each.name, each.step, each.phase, each.occurrence, each.tags) for each in points)
    return [(point, dumped[own]) for point, own in zip(points, identities, strict=True) if own in dumped]


def _identity(name: str, step: int, phase: str, occurrence: int, tags: dict[str, object]) -> str:
    return json.dumps([name, step, phase, occurrence, tags], sort_keys=True)


def draw_worst(pairs: Iterable[tuple[PagePoint, PointPair]], which: Which = "value") -> tuple[tuple[Picture, ...], str]:
    """Pictures of the worst points, the worst first, and a sentence about those that are left out."""
    there = [(point, pair) for point, pair in pairs if _holds_values(pair, _leaf(point, pair))]
    there.sort(key=lambda each: (each[0].guilty, each[0].is_trouble, each[0].badness), reverse=True)
    pictures: list[Picture] = []
    size_bytes = read_bytes = 0
    for point, pair in there:
        if len(pictures) == MOST_PICTURES or size_bytes > MOST_BYTES or read_bytes > MOST_READ_BYTES:
            break
        leaf = _leaf(point, pair)
        try:
            a, b = _read_pair(pair, leaf, which)
            # The values of both jobs are read twice.
            read_bytes += 2 * sum(prod(side.shape) * side.dtype.itemsize for side in (a, b))
            picture = draw_pair(point.order, leaf, a, b)
        except (RuntimeError, ValueError, OverflowError) as error:
            picture = Picture(point.order, leaf, why_none=f"The picture cannot be drawn: {error}")
        pictures.append(picture)
        size_bytes += picture.size_bytes
    if not there:
        return (), _NONE_IN_BOTH
    if len(pictures) == len(there):
        return tuple(pictures), ""
    points = "the point that differs most" if len(pictures) == 1 else f"the {len(pictures)} points that differ most"
    return tuple(pictures), f"The page draws {points}, of {len(there)} that both jobs dumped."


def _leaf(point: PagePoint, pair: PointPair) -> str:
    paths = pair.a[0].paths
    return point.leaf if point.leaf in paths or not paths else paths[0]


def _holds_values(pair: PointPair, leaf: str) -> bool:
    return all(point.ranks_with(leaf) for point in (*pair.a, *pair.b))


def _read_pair(pair: PointPair, leaf: str, which: Which) -> tuple[WholeTensor, WholeTensor]:
    """Both jobs' whole tensors. If the points were paired by token: the rows that both jobs have."""
    if not pair.by_token:
        return _reader(pair.a[0], leaf, which), _reader(pair.b[0], leaf, which)
    from grafter.analysis.compare.gathered_rows import RowSource, tokens_of
    from grafter.analysis.compare.paired_rows import PairedRows

    sides = []
    for points in (pair.a, pair.b):
        readers = [_reader(point, leaf, which) for point in points]
        own = [tokens_of(point, leaf, point.effective(leaf, which)) for point in points]
        sides.append([(RowSource(reader, each.rows), each) for reader, each in zip(readers, own, strict=True)])
    rows = PairedRows(*sides)
    return rows.a, rows.b


def _reader(point: DumpedPoint, leaf: str, which: Which) -> WholeTensor:
    return point.reader(leaf, point.effective(leaf, which))
