"""Prints a comparison: first what was skipped or failed, then a table with a bar per point, at last the verdict."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from rich.console import Console
from rich.table import Table
from rich.text import Text

from grafter.analysis.compare.comparison import Comparison
from grafter.analysis.compare.comparison_records import FindingRecord, PointRecord
from grafter.cli.console import (
    bar_blocks,
    figure,
    log_bar,
    print_line,
    print_rest,
    print_table,
    printable,
    ruled_table,
)

_STYLES = {"failed": "bold red", "error": "bold red", "allowed": "yellow", "skipped": "dim"}
_MOST_FINDINGS = 20
_CAPTION = "rel of the worst tensor, on a logarithmic scale from 1e-16 to 1; worst row: of its rows (tokens)"
_OTHER_BITS = "!= some values differ in their bits though rel is 0 or unknown: -0.0 against 0.0, or no numbers"
_UNKNOWN_LEGEND = "? unknown: not a module's output, or its inputs were not dumped or could not be judged"
# The words for points that were compared, but not with all that either side has.
_PART_WORDS = {"other_rows": "left out", "missing_ranks": "missing"}
_NOTES = {"unequal_copies": "copies differ"}


def print_comparison(comparison: Comparison, console: Console, *, limit: int = 0, only_trouble: bool = False) -> None:
    """Sides, findings, the table, the sentence. limit: at most so many rows; 0: all."""
    header = comparison.header
    for side, role, directory in (("A", header.role_a, header.a), ("B", header.role_b, header.b)):
        print_line(console, f"{side}: {printable(directory)} ({role or 'no role'})")
    _print_findings(comparison.findings, console)
    rows = [point for point in comparison.points if not only_trouble or point.verdict != "passed"]
    if rows:
        console.print()
        shown = rows[:limit] if limit else rows
        print_table(point_table(shown, bar_blocks(console)), console)
        print_line(console, _CAPTION, "italic")
        if any(_has_other_bits(point) for point in shown):
            print_line(console, _OTHER_BITS, "italic")
        if any(point.severity == "unknown" for point in shown):
            print_line(console, _UNKNOWN_LEGEND, "italic")
        print_rest(console, rows, limit)
    console.print()
    print_line(console, printable(comparison.summary.sentence) + _where_why(comparison), "bold")


def _where_why(comparison: Comparison) -> str:
    """Which of the lines above say why: a long table may have moved them out of sight."""
    words = dict.fromkeys(_word(finding) for finding in comparison.findings if finding.is_error or finding.is_skip)
    if not words:
        return ""
    return f" (Why: the lines {' and '.join(f'`{word}:`' for word in sorted(words))} above.)"


def _word(finding: FindingRecord) -> str:
    if finding.is_error:
        return "error"
    return _PART_WORDS.get(finding.what, "skipped") if finding.is_skip else _NOTES.get(finding.what, "note")


def _print_findings(findings: Sequence[FindingRecord], console: Console) -> None:
    errors_first = sorted(
        findings, key=lambda finding: (not finding.is_error, not finding.is_skip, finding.what not in _NOTES)
    )
    for finding in errors_first[:_MOST_FINDINGS]:
        style = "bold red" if finding.is_error else "yellow" if finding.is_skip else ""
        print_line(console, f"{_word(finding)}: {printable(finding.text)}", style)
    if len(findings) > _MOST_FINDINGS:
        print_line(console, f"... and {len(findings) - _MOST_FINDINGS} more findings (--json has all)")


def point_table(points: Iterable[PointRecord], blocks: str) -> Table:
    """One row per point, in A's execution order; faulty points are marked."""
    table = ruled_table()
    table.add_column("", width=1)
    table.add_column("point", overflow="fold")
    for column in ("rel", "max_abs", "worst row", "max ulp"):
        table.add_column(column, justify="right", no_wrap=True)
    table.add_column("", no_wrap=True, min_width=8)
    table.add_column("verdict", no_wrap=True)
    for point in points:
        values = point.values
        mark = {"culprit": ">", "inherited": "|", "unknown": "?"}.get(point.severity or "", "")
        verdict = point.verdict + (f", {point.severity}" if point.severity is not None else "")
        cells = [mark, printable(point.label)]
        rel = values.get("rel")
        unequal = " !=" if _has_other_bits(point) else ""
        cells += [figure(values.get(name)) + unequal for name in ("rel", "max_abs")]
        cells += [figure(values.get(name)) for name in ("worst_row_rel", "max_ulp")]
        bar = log_bar(float(rel), blocks) if rel is not None else ""
        table.add_row(*map(Text, cells), Text(bar), Text(verdict), style=_STYLES.get(point.verdict, ""))
    return table


def _has_other_bits(point: PointRecord) -> bool:
    """What rel alone would hide."""
    values = point.values
    nonfinite = values.get("nan") or values.get("inf")
    return bool(values.get("mismatched_fraction")) and not values.get("rel") and not nonfinite


def json_lines(comparison: Comparison) -> Iterable[str]:
    """The lines of `--json`."""
    yield comparison.header.model_dump_json()
    for point in comparison.points:
        yield point.model_dump_json()
    for finding in comparison.findings:
        yield finding.model_dump_json()
    yield comparison.summary.model_dump_json()
