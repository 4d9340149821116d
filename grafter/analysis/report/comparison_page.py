"""The page that compares two jobs' dumps: from directories of dumps, or from the output of `grafter compare --json`."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING

from pydantic import ValidationError

from grafter.analysis.compare.comparison_records import (
    ComparedLeaf,
    ComparisonHeader,
    FindingRecord,
    PointRecord,
    SummaryRecord,
    read_line,
)
from grafter.analysis.compare.point_pairs import PointPair, find_pairs
from grafter.analysis.report.dumped_pictures import MOST_PICTURES, draw_worst
from grafter.analysis.report.page_data import Environment, PageData, PageFinding, PagePoint, PageVerdict, bad_lines
from grafter.analysis.report.pictures import Picture
from grafter.analysis.report.run_page import find_layer, flatten_facts, with_inputs
from grafter.analysis.run.point_rows import point_label
from grafter.errors import FilterError, GrafterError

if TYPE_CHECKING:
    from grafter.store.dumps.reader import Dumps

_LONGEST_LINE = 1 << 26
_NOT_FINITE = {"nan", "inf"}

DUMPS_MEASURED = (
    "rel = sum((x-y)²) / sum(x²+y²): 0 for equal tensors, 1 for unrelated ones, 2 for opposite ones. y is A, the "
    "reference; x is B, which is judged."
)
DUMPS_NOT_ADDED = (
    "Dumps contain the values of each point, and these include the error of earlier points. If a module's inputs were "
    "dumped as well, the page shows them beside its output. A live run with --b2t, or `grafter locate`, measures what "
    "each point itself adds."
)
_DUMPS_GONE = "The dumps that were compared are not where they were, so their values cannot be drawn"


@dataclass
class Lines:
    """The lines of one `grafter compare --json`, by kind."""

    header: ComparisonHeader | None = None
    points: list[PointRecord] = field(default_factory=list)
    findings: list[FindingRecord] = field(default_factory=list)
    summary: SummaryRecord | None = None
    damaged: list[PageFinding] = field(default_factory=list)


def compare_dumps(a: Path, b: Path | None) -> PageData:
    """The page of a comparison that is made now, without thresholds. With A alone: a run's baseline against its target.

    Raises GrafterError if there is nothing to compare.
    """
    from grafter.analysis.compare.comparison import Choice, compare, open_both

    dumps_a, dumps_b = open_both(a, b)
    compared = compare(dumps_a, dumps_b, Choice())
    lines = Lines(compared.header, list(compared.points), list(compared.findings), compared.summary)
    return make_comparison_page(lines, dumps_a, dumps_b, str(a) if b is None else f"{a} and {b}")


def read_comparison(path: Path) -> PageData:
    """The page of a file that `grafter compare --json` wrote.

    Damaged lines become findings. Pictures are drawn from the dumps that the file names, if they still exist. Raises
    GrafterError if no line of the file belongs to a comparison.
    """
    lines = read_lines(path)
    if lines.header is None and not lines.points and lines.summary is None:
        raise GrafterError(
            f"{path}: no line of the file belongs to a comparison. Give a run's directory, or a file made by `grafter "
            "compare --json ... > FILE`."
        )
    dumps: list[Dumps] = []
    if lines.header is not None:
        from grafter.store.dumps.reader import open_dumps

        for place, role in ((lines.header.a, lines.header.role_a), (lines.header.b, lines.header.role_b)):
            try:
                dumps.append(open_dumps(place, role=role))
            except GrafterError:
                break
    a, b = dumps if len(dumps) == 2 else (None, None)
    return make_comparison_page(lines, a, b, str(path))


def read_lines(path: Path) -> Lines:
    """The lines of a file. Raises GrafterError if it cannot be read."""
    read: list[ComparisonHeader | PointRecord | FindingRecord | SummaryRecord] = []
    bad: list[str] = []
    try:
        with path.open("rb") as file:
            for number, line in enumerate(iter(lambda: file.readline(_LONGEST_LINE), b""), start=1):
                try:
                    read.append(read_line(line.decode()))
                except (ValidationError, ValueError, RecursionError):
                    bad.append(f"line {number} is not a line of a comparison")
    except OSError as error:
        raise GrafterError(f"{path} cannot be read: {error.strerror}.") from error
    lines = Lines(
        header=next((line for line in read if isinstance(line, ComparisonHeader)), None),
        points=[line for line in read if isinstance(line, PointRecord)],
        findings=[line for line in read if isinstance(line, FindingRecord)],
        summary=next((line for line in read if isinstance(line, SummaryRecord)), None),
        damaged=bad_lines(path.name, bad),
    )
    if lines.summary is None:
        lines.damaged.append(PageFinding("problem", f"{path.name} has no last line: the comparison was interrupted."))
    return lines


def make_comparison_page(lines: Lines, a: Dumps | None, b: Dumps | None, source: str) -> PageData:
    """The page of a comparison. `a` and `b` are the dumps that were compared, if they still exist."""
    points = with_inputs([_point(order, record) for order, record in enumerate(lines.points)])
    pictures, note = _draw(lines, points, a, b)
    return PageData(
        kind="comparison",
        title=_title(lines),
        source=source,
        sides=_sides(lines.header),
        points=tuple(points),
        findings=(*lines.damaged, *_findings(lines)),
        verdict=_verdict(lines, points),
        environments=_environments(lines.header, a, b),
        pictures=pictures,
        pictures_note=note,
        measured=DUMPS_MEASURED,
        adds_note=DUMPS_NOT_ADDED,
    )


def _title(lines: Lines) -> str:
    if not lines.points:
        return "Dumps compared: nothing in common"
    counts: dict[str, int] = {}
    for point in lines.points:
        counts[point.verdict] = counts.get(point.verdict, 0) + 1
    said = ", ".join(f"{number} {verdict}" for verdict, number in counts.items())
    return f"Dumps compared: {said} of {len(lines.points)}"


def _sides(header: ComparisonHeader | None) -> tuple[str, str]:
    if header is None or header.role_a is None or header.role_b is None or header.role_a == header.role_b:
        return ("A", "B")
    return (f"A ({header.role_a})", f"B ({header.role_b})")


def _point(order: int, record: PointRecord) -> PagePoint:
    leaf = next((leaf for leaf in record.leaves if leaf.path == record.worst_leaf), None)
    difference = leaf.measures.difference if leaf is not None and leaf.measures is not None else None
    side = (leaf.b or leaf.a) if leaf is not None else None
    call_site = record.call_site_a or ""
    if record.call_site_b and record.call_site_b != record.call_site_a:
        call_site = f"A: {call_site}\nB: {record.call_site_b}"
    return PagePoint(
        order=order,
        label=point_label(record.name, record.tags, record.phase, record.occurrence),
        name=record.name,
        tags=record.tags,
        step=record.step,
        phase=record.phase,
        outcome=record.verdict,
        occurrence=record.occurrence,
        layer=find_layer(record.name, record.tags),
        reason=record.reason,
        notes=_notes(record, leaf),
        difference=_values(record),
        nonfinite=int(record.values.get("nan") or 0) + int(record.values.get("inf") or 0),
        worst_index=tuple(difference.max_abs_index) if difference is not None and difference.max_abs_index else None,
        worst_values=tuple(difference.max_abs_values or ()) if difference is not None else (),
        guilty=record.severity == "culprit",
        shape=tuple(side.shape) if side is not None else None,
        dtype=_dtypes(leaf),
        leaf=record.worst_leaf or "",
        call_site=call_site,
    )


def _values(record: PointRecord) -> dict[str, float]:
    return {
        name: float(value)
        for name, value in record.values.items()
        if value is not None and name not in _NOT_FINITE and not name.startswith("narrow_")
    }


def _notes(record: PointRecord, leaf: ComparedLeaf | None) -> tuple[str, ...]:
    notes = []
    if record.severity == "culprit":
        notes.append("the faulty module: its output is bad, and its inputs are good")
    elif record.severity == "inherited":
        notes.append("its inputs are already bad")
    if record.rule is not None:
        notes.append(f"judged by {record.rule}")
    if record.tokens is not None:
        only = record.tokens.only_a + record.tokens.only_b
        notes.append(f"{record.tokens.paired} rows paired by token" + (f", {only} on only one side" if only else ""))
    if leaf is not None and leaf.measures is not None and leaf.measures.rows is not None:
        rows = leaf.measures.rows
        for worst in rows.worst[:1]:
            where = f" (sequence {worst.sequence}, position {worst.position})" if worst.position is not None else ""
            notes.append(
                f"{rows.differing} of {rows.count} rows differ; the worst is {' '.join(rows.dims)} {worst.index}{where}"
                f", rel {worst.rel:.1e}"
            )
    if leaf is not None and leaf.replicas:
        notes.append(f"{len(leaf.replicas)} copies differ from the first of their side")
    return tuple(notes)


def _dtypes(leaf: ComparedLeaf | None) -> str | None:
    if leaf is None:
        return None
    return " / ".join(dict.fromkeys(side.dtype for side in (leaf.a, leaf.b) if side is not None)) or None


def _findings(lines: Lines) -> Iterable[PageFinding]:
    failed = sum(point.verdict == "failed" for point in lines.points)
    if failed:
        yield PageFinding(
            "problem", f"{failed} of {len(lines.points)} points differ by more than their threshold allows."
        )
    for finding in sorted(lines.findings, key=lambda finding: (not finding.is_error, not finding.is_skip)):
        yield PageFinding("problem" if finding.is_error or finding.is_skip else "note", finding.text)


def _verdict(lines: Lines, points: Sequence[PagePoint]) -> PageVerdict | None:
    if lines.summary is None:
        return None
    culprit = next((point for point in points if point.guilty), None)
    first = culprit or next((point for point in points if point.outcome == "failed"), None)
    begins = lines.summary.first_divergence
    details = [f"First divergence: {begins}."] if begins and begins not in lines.summary.sentence else []
    tone = {0: "good", 1: "bad"}.get(lines.summary.exit_code, "open")
    order = first.order if first is not None else None
    return PageVerdict(lines.summary.sentence, tone, tuple(details), order)  # type: ignore[arg-type]


def _environments(header: ComparisonHeader | None, a: Dumps | None, b: Dumps | None) -> tuple[Environment, ...]:
    found = []
    for side in ("a", "b"):
        dumps = a if side == "a" else b
        facts = {"dumps": str(getattr(header, side))} if header is not None else {}
        if dumps is not None and dumps.run is not None:
            facts |= flatten_facts(str(dumps.role), dumps.run)
        found.append(Environment(_sides(header)[side == "b"], facts or {"dumps": "unknown"}))
    return tuple(found)


# Pictures.


def _draw(
    lines: Lines, points: Sequence[PagePoint], a: Dumps | None, b: Dumps | None
) -> tuple[tuple[Picture, ...], str]:
    pictures: dict[int, Picture] = {}
    note = ""
    if a is not None and b is not None:
        which = lines.header.which if lines.header is not None else "value"
        drawn, note = draw_worst(_pairs(lines, points, a, b), which)
        pictures = {picture.order: picture for picture in drawn}
    else:
        note = f"{_DUMPS_GONE}; shown is what the comparison recorded."
    ranked = sorted(points, key=lambda point: (point.guilty, point.badness), reverse=True)
    for point in ranked[:MOST_PICTURES]:
        magnitudes = _magnitudes(lines.points[point.order])
        if magnitudes:
            picture = pictures.get(point.order, Picture(point.order, point.leaf))
            pictures[point.order] = replace(picture, magnitudes=magnitudes)
    rank = {point.order: place for place, point in enumerate(ranked)}
    return tuple(sorted(pictures.values(), key=lambda picture: rank[picture.order])), note


def _pairs(lines: Lines, points: Sequence[PagePoint], a: Dumps, b: Dumps) -> list[tuple[PagePoint, PointPair]]:
    """The compared pairs that the dumps still contain."""
    expression = lines.header.filter if lines.header is not None else None
    try:
        chosen = [list(own.points) if expression is None else own.select(expression) for own in (a, b)]
    except FilterError:
        return []
    by_label = {pair.label: pair for pair in find_pairs(*chosen)[0]}
    return [
        (point, by_label[record.label])
        for point, record in zip(points, lines.points, strict=True)
        if record.label in by_label
    ]


def _magnitudes(record: PointRecord) -> tuple[tuple[int | None, int], ...]:
    """(e, number of |d| from 2**e up to 2**(e+1)), in order. None instead of e: the number of zeros."""
    leaf = next((leaf for leaf in record.leaves if leaf.path == record.worst_leaf), None)
    if leaf is None or leaf.measures is None:
        return ()
    found: dict[int | None, int] = {}
    for key, number in leaf.measures.magnitudes.items():
        if key == "0":
            found[None] = number
        elif key.startswith("2**") and key[3:].lstrip("-").isdigit() and len(key) < 10:
            found[int(key[3:])] = number
    return tuple(sorted(found.items(), key=lambda item: -math.inf if item[0] is None else item[0]))
