"""The ledger of a run as tables: what failed and why, then each point with its difference and a bar."""

from __future__ import annotations

import signal
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import TextIO

from rich.console import Console
from rich.table import Table
from rich.text import Text

from grafter.analysis.run.point_rows import PointRow
from grafter.analysis.run.run_findings import find_problems
from grafter.analysis.run.run_summary import RunSummary, describe_counts, read_run_summary
from grafter.cli.console import (
    LOG_BAR_WIDTH,
    bar_blocks,
    figure,
    log_bar,
    make_console,
    print_line,
    print_rest,
    printable,
)
from grafter.core.processes import describe_exit
from grafter.store.ledger import read_summaries
from grafter.tools.launch.pair_result import PairResult

# Below this width, the table leaves columns out.
_NARROW_COLUMNS = 100
_OUTCOME_STYLE = {
    "failed": "bold red", "no figures": "bold red", "skipped": "yellow", "sent": "dim", "posted": "dim",
    "missed": "yellow", "expired": "yellow", "displaced": "yellow",
}  # fmt: skip


def show_run(
    summary: RunSummary,
    stream: TextIO,
    *,
    only_trouble: bool = False,
    sort: str = "time",
    limit: int = 0,
    with_ranks: bool = False,
) -> None:
    """Print the tables and notes. `sort`: as for `choose_rows`; `limit` 0 shows all; `with_ranks` adds a column."""
    console = make_console(stream)
    rows = choose_rows(summary.rows, sort=sort, only_trouble=False)
    trouble = [row for row in rows if row.is_trouble]
    well = [row for row in rows if not row.is_trouble]
    print_line(console, f"{summary.run_directory}: {describe_counts(summary)}")
    if trouble:
        console.print(_trouble_table(_limited(trouble, limit), with_ranks))
        print_rest(console, trouble, limit)
    if well and not only_trouble:
        console.print(_point_table(_limited(well, limit), console, with_ranks))
        print_rest(console, well, limit)
    for title, sentences in (("notes", summary.notes), ("problems", summary.problems)):
        if sentences:
            print_line(console, f"{title}:")
        for sentence in sentences:
            print_line(console, "  " + printable(sentence, keep_lines=True).replace("\n", "\n    "))


def choose_rows(rows: Sequence[PointRow], *, sort: str, only_trouble: bool, limit: int = 0) -> list[PointRow]:
    """The rows by `sort`: time (as they happened), or rel, max_abs, seconds: the largest first, unknown ones last."""
    chosen = [row for row in rows if row.is_trouble or not only_trouble]
    if sort == "seconds":
        chosen.sort(key=lambda row: row.seconds, reverse=True)
    elif sort in ("rel", "max_abs"):

        def size(row: PointRow) -> tuple[bool, float]:
            value = row.rel if sort == "rel" else row.max_abs
            return row.nonfinite > 0, -1.0 if value is None else value

        chosen.sort(key=size, reverse=True)
    return _limited(chosen, limit)


def _point_table(rows: Sequence[PointRow], console: Console, with_ranks: bool) -> Table:
    narrow, blocks = console.width < _NARROW_COLUMNS, bar_blocks(console)
    table = _table(with_ranks)
    table.add_column("shape", no_wrap=not narrow, overflow="fold")
    table.add_column("rel", justify="right", no_wrap=True)
    table.add_column("max_abs", justify="right", no_wrap=True)
    if not narrow:
        table.add_column("cosine", justify="right", no_wrap=True)
        table.add_column("seconds", justify="right", no_wrap=True)
    table.add_column("1e-16..1", no_wrap=True, min_width=LOG_BAR_WIDTH)
    for row in rows:
        cells = [_shape(row), *(figure(value) + _mark(row) for value in (row.rel, row.max_abs))]
        if not narrow:
            cells += ["" if row.cosine is None else f"{row.cosine:.6f}", f"{row.seconds:.4f}"]
        table.add_row(*_first_cells(row, with_ranks), *(Text(cell) for cell in cells), log_bar(row.rel, blocks))
    return table


def _trouble_table(rows: Sequence[PointRow], with_ranks: bool) -> Table:
    table = _table(with_ranks)
    table.add_column("reason", overflow="fold", ratio=1)
    for row in rows:
        reason = printable(row.reason or row.unmeasured or "no reason was recorded", keep_lines=True)
        site = f" (at {printable(row.call_site)})" if row.call_site else ""
        table.add_row(*_first_cells(row, with_ranks), Text(reason + site))
    return table


def _table(with_ranks: bool) -> Table:
    table = Table(box=None, pad_edge=False, padding=(0, 1, 0, 0), header_style="bold")
    table.add_column("step", justify="right", no_wrap=True)
    if with_ranks:
        table.add_column("rank", no_wrap=True)
    table.add_column("point", overflow="fold", min_width=12)
    table.add_column("way", no_wrap=True)
    table.add_column("outcome", no_wrap=True)
    return table


def _first_cells(row: PointRow, with_ranks: bool) -> Iterator[Text]:
    yield Text(str(row.step))
    if with_ranks:
        yield Text(", ".join(row.ranks))
    yield Text(printable(row.label))
    yield Text(row.direction)
    outcome = "no figures" if row.unmeasured is not None else row.outcome
    yield Text(outcome + ("*" if row.disagreement else ""), style=_OUTCOME_STYLE.get(outcome, ""))


def _shape(row: PointRow) -> str:
    if row.shape is None:
        return ""
    shape = "x".join(map(str, row.shape)) if row.shape else "scalar"
    return f"{printable(row.leaf)}: {shape}" if row.leaf else shape


def _mark(row: PointRow) -> str:
    """What a figure alone would hide: unequal NaN or Inf, or other bits where rel is 0 or unknown."""
    if row.nonfinite:
        return "!"
    return " !=" if row.mismatched and not row.rel else ""


def _limited(rows: Sequence[PointRow], limit: int) -> list[PointRow]:
    return list(rows[:limit] if limit else rows)


def report_run(result: PairResult, stream: TextIO, limit: int = 0) -> int:
    """Print what the run recorded; return the exit code of `grafter run`: 0, 1, or 128 + the signal that ended it."""
    summary = _read(result)
    if result.stop_signal is None:
        problems = [*_job_problems(result), *_recording_problems(result), *summary.problems]
    else:
        # The signal explains how the jobs ended, and that little was grafted.
        problems = [f"the run was ended by {signal.Signals(result.stop_signal).name}."]
        problems += find_problems(summary.rows, []) if summary.rows else []
    show_run(replace(summary, problems=problems), stream, limit=limit)
    stream.flush()
    if result.stop_signal is not None:
        return 128 + result.stop_signal
    return 1 if problems else 0


def _read(result: PairResult) -> RunSummary:
    if result.run_directory.is_dir():
        return read_run_summary(result.run_directory)
    # The directory was removed, because nothing was written to it.
    return RunSummary(result.run_directory, [], [], find_problems([], [], result.attach))


def _recording_problems(result: PairResult) -> list[str]:
    """What the recording lacks: a later graft from it would skip those points."""
    if not result.is_recorded or not result.run_directory.is_dir():
        return []
    lost = [
        f"{summary.role} {summary.role_rank} lost {summary.dumps_lost} point{'s' * (summary.dumps_lost != 1)}"
        for summary in read_summaries(result.run_directory)
        if summary.dumps_lost
    ]
    return [f"the recording is not complete: {', '.join(lost)} (a full disk? see the log)."] if lost else []


def _job_problems(result: PairResult) -> list[str]:
    """Which job failed by itself, and which one the launcher ended."""
    problems = []
    if result.failed_role is not None:
        problems.append(f"the {result.failed_role} job {describe_exit(result.exit_codes[result.failed_role])}.")
    for role, code in result.exit_codes.items():
        if role == result.failed_role or (code == 0 and role not in result.ended_roles):
            continue
        if role in result.ended_roles:
            problems.append(f"the {role} job was ended by grafter ({describe_exit(code)}).")
        else:
            problems.append(f"the {role} job {describe_exit(code)}, after that.")
    return problems
