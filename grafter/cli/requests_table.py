"""Prints a replay: what differs, and why, then the counts. Or as JSON, with a line per request."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict

from rich.console import Console
from rich.table import Table
from rich.text import Text

from grafter.cli.console import print_line, print_rest, printable, ruled_table
from grafter.tools.requests.reply_comparison import ReplayOutcome, ReplaySummary

_STYLES = {"different": "bold red", "failed": "bold red", "not_sent": "yellow", "not_compared": "dim"}
_LATE_SECONDS = 0.1


def print_replay(
    outcomes: Sequence[ReplayOutcome], summary: ReplaySummary, urls: Sequence[str], console: Console, *, limit: int
) -> None:
    """Print one row for each request that is not the same, then the counts. limit: at most so many rows; 0: all."""
    for side, url in zip("AB", urls, strict=False):
        print_line(console, f"{side}: {printable(url)}")
    rows = [outcome for outcome in outcomes if outcome.verdict != "same"]
    if rows:
        console.print()
        console.print(_table(rows[:limit] if limit else rows))
        print_rest(console, rows, limit)
    console.print()
    for note in _notes(outcomes):
        print_line(console, note)
    print_line(console, summary.sentence, "bold")


def _table(rows: Sequence[ReplayOutcome]) -> Table:
    table = ruled_table()
    for column in ("#", "first char", "first token", "logprob"):
        table.add_column(column, justify="right", no_wrap=True)
    table.add_column("verdict", no_wrap=True)
    table.add_column("id", overflow="fold")
    table.add_column("what differs", overflow="fold", ratio=1)
    for row in rows:
        logprob = "-" if row.logprob is None else f"{row.logprob:.2g}"
        cells = [str(row.number), _position(row.first_char), _position(row.first_token), logprob]
        cells += [row.verdict.replace("_", " "), printable(row.id), printable("; ".join(row.reasons))]
        table.add_row(*map(Text, cells), style=_STYLES.get(row.verdict, ""))
    return table


def _position(value: int | None) -> str:
    return "-" if value is None else str(value)


def _notes(outcomes: Sequence[ReplayOutcome]) -> Iterator[str]:
    late = [outcome.late for outcome in outcomes if outcome.late > _LATE_SECONDS]
    if late:
        yield f"{len(late)} requests were sent late, by up to {max(late):.1f} s: --concurrency, or this machine."
    forced = sum(outcome.forced is not None for outcome in outcomes)
    if forced:
        yield f"{forced} requests were sent with the recorded output's length."


def json_lines(outcomes: Sequence[ReplayOutcome], summary: ReplaySummary, urls: Sequence[str]) -> Iterator[str]:
    """The lines of `--json`: one per request, then the summary."""
    for outcome in outcomes:
        yield json.dumps({"kind": "request", **asdict(outcome)}, ensure_ascii=False)
    yield json.dumps(
        {"kind": "summary", "servers": list(urls), "counts": summary.counts, "exit_code": summary.exit_code}
    )
