"""The ledger of a run as tables: what failed and why, then each point with its difference and a bar to look at."""

from __future__ import annotations

import math
import os
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
from grafter.core.processes import describe_exit
from grafter.store.ledger import read_summaries
from grafter.tools.launch.launcher import PairResult

SORT_ORDERS = ("time", "rel", "max_abs", "seconds")
# float64's own resolution squared is far below; what lies under 1e-16 looks like no difference.
_BAR_FLOOR = 1e-16
_BAR_WIDTH = 8
_EIGHTHS = " ▏▎▍▌▋▊▉█"
_NARROW = 100
# Where nobody limits the width, names are not wrapped, so that grep finds them.
_PIPE_WIDTH = 250
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
    """Print the tables and notes. `sort` is one of SORT_ORDERS; `limit` 0 shows all; `with_ranks` adds a column."""
    console = make_console(stream)
    rows = choose_rows(summary.rows, sort=sort, only_trouble=False)
    trouble = [row for row in rows if row.is_trouble]
    well = [row for row in rows if not row.is_trouble]
    console.print(Text(f"{summary.run_directory}: {describe_counts(summary)}"), soft_wrap=True)
    if trouble:
        console.print(_trouble_table(_limited(trouble, limit), with_ranks))
        _tell_more(console, len(trouble), limit)
    if well and not only_trouble:
        console.print(_point_table(_limited(well, limit), console, with_ranks))
        _tell_more(console, len(well), limit)
    for title, sentences in (("notes", summary.notes), ("problems", summary.problems)):
        if sentences:
            console.print(Text(f"{title}:"))
        for sentence in sentences:
            console.print(Text("  " + printable(sentence, keep_lines=True).replace("\n", "\n    ")), soft_wrap=True)


def choose_rows(rows: Sequence[PointRow], *, sort: str, only_trouble: bool, limit: int = 0) -> list[PointRow]:
    """The rows in the order asked for: as they happened, or the worst first (rows without a difference last)."""
    chosen = [row for row in rows if row.is_trouble or not only_trouble]
    if sort == "rel":
        chosen.sort(key=lambda row: (row.nonfinite > 0, -1.0 if row.rel is None else row.rel), reverse=True)
    elif sort == "max_abs":
        chosen.sort(key=lambda row: (row.nonfinite > 0, -1.0 if row.max_abs is None else row.max_abs), reverse=True)
    elif sort == "seconds":
        chosen.sort(key=lambda row: row.seconds, reverse=True)
    return _limited(chosen, limit)


def make_console(stream: TextIO) -> Console:
    """Coloured and as wide as the terminal, or plain and as wide as its content (or as COLUMNS says) in a pipe."""
    if stream.isatty():
        return Console(file=stream, highlight=False)
    columns = os.environ.get("COLUMNS", "")
    width = int(columns) if columns.isdigit() and int(columns) > 0 else _PIPE_WIDTH
    # Only a terminal gets escape sequences, whatever FORCE_COLOR says.
    return Console(file=stream, highlight=False, force_terminal=False, no_color=True, color_system=None, width=width)


def print_table(table: Table, console: Console) -> None:
    """Print it; in a pipe without the blanks that fill its lines up."""
    if console.is_terminal:
        console.print(table)
        return
    with console.capture() as captured:
        console.print(table)
    for line in captured.get().splitlines():
        console.print(Text(line.rstrip()), soft_wrap=True)


def log_bar(rel: float | None, blocks: str = _EIGHTHS) -> str:
    """`rel` on a logarithmic scale: empty at 1e-16 and below, two powers of ten a character, full at 1 and above."""
    if rel is None or not rel > _BAR_FLOOR:
        return ""
    filled = min(1.0, 1 - math.log10(rel) / math.log10(_BAR_FLOOR))
    units = max(1, round(filled * _BAR_WIDTH * (len(blocks) - 1)))
    whole, rest = divmod(units, len(blocks) - 1)
    return blocks[-1] * whole + (blocks[rest] if rest else "")


def printable(text: str, keep_lines: bool = False) -> str:
    """Text of a user's program with what a terminal would obey (escape sequences, line ends) made visible."""
    return "".join(
        c if c.isprintable() or (keep_lines and c == "\n") else c.encode("unicode_escape").decode() for c in text
    )


def _point_table(rows: Sequence[PointRow], console: Console, with_ranks: bool) -> Table:
    narrow = console.width < _NARROW
    # An old terminal's encoding may have no blocks.
    blocks = _EIGHTHS if (console.encoding or "").lower().startswith("utf") else " #"
    table = _table(with_ranks)
    table.add_column("shape", no_wrap=not narrow, overflow="fold")
    table.add_column("rel", justify="right", no_wrap=True)
    table.add_column("max_abs", justify="right", no_wrap=True)
    if not narrow:
        table.add_column("cosine", justify="right", no_wrap=True)
        table.add_column("seconds", justify="right", no_wrap=True)
    table.add_column("1e-16..1", no_wrap=True, min_width=_BAR_WIDTH)
    for row in rows:
        cells = [_shape(row), *(_number(figure) + _mark(row) for figure in (row.rel, row.max_abs))]
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


def _number(value: float | None) -> str:
    if value is None:
        return "-"
    return "0" if value == 0 else f"{value:.1e}"


def _mark(row: PointRow) -> str:
    """What a figure alone would hide: unequal NaN or Inf, or other bits where rel is 0 or unknown."""
    if row.nonfinite:
        return "!"
    return " !=" if row.mismatched and not row.rel else ""


def _limited(rows: Sequence[PointRow], limit: int) -> list[PointRow]:
    return list(rows[:limit] if limit else rows)


def _tell_more(console: Console, count: int, limit: int) -> None:
    if limit and count > limit:
        console.print(Text(f"... and {count - limit} more (--limit)"))


# The end of `grafter run`: the summary table, what went wrong, and the exit code.


def report_run(result: PairResult, stream: TextIO, limit: int = 0) -> int:
    """Print what the run recorded; return the exit code of `grafter run`: 0, 1, or 128 + the signal that ended it."""
    summary = _read(result)
    if result.stop_signal is None:
        problems = [*_job_problems(result), *_recording_problems(result), *summary.problems]
    else:
        # How the jobs ended, and that little was grafted, is then no news.
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
    # Taken away because nothing was written into it.
    return RunSummary(result.run_directory, [], [], find_problems([], [], result.attach))


def _recording_problems(result: PairResult) -> list[str]:
    """A graft later would skip what is not there now."""
    if not result.is_recorded or not result.run_directory.is_dir():
        return []
    lost = [
        f"{summary.role} {summary.role_rank} lost {summary.dumps_lost} point{'s' * (summary.dumps_lost != 1)}"
        for summary in read_summaries(result.run_directory)
        if summary.dumps_lost
    ]
    return [f"the recording is not complete: {', '.join(lost)} (a full disk? see the log)."] if lost else []


def _job_problems(result: PairResult) -> list[str]:
    """Which job failed by itself; one that the launcher ended is not to blame for how it ended."""
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
