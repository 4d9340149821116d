"""How all commands print: the console, tables, bars, and text that a terminal does not obey."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from typing import TextIO

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

LOG_BAR_WIDTH = 8
# float64's own resolution squared is far below; a value under 1e-16 looks like no difference.
_BAR_FLOOR = 1e-16
_EIGHTHS = " ▏▎▍▌▋▊▉█"
# Where nothing limits the width, names are not wrapped, so that grep finds them.
_PIPE_WIDTH = 250


def make_console(stream: TextIO) -> Console:
    """A console as wide as the terminal, with colours; for a pipe plain and as wide as its content, or as COLUMNS."""
    if stream.isatty():
        return Console(file=stream, highlight=False)
    columns = os.environ.get("COLUMNS", "")
    width = int(columns) if columns.isdigit() and int(columns) > 0 else _PIPE_WIDTH
    # Only a terminal gets escape sequences, whatever FORCE_COLOR says.
    return Console(file=stream, highlight=False, force_terminal=False, no_color=True, color_system=None, width=width)


def print_line(console: Console, text: str, style: str = "") -> None:
    """Print a sentence on one line, however long, so that a program that reads a pipe finds it whole."""
    console.print(Text(text, style=style), soft_wrap=True)


def print_table(table: Table, console: Console) -> None:
    """Print a table; in a pipe without the blanks at the ends of its lines."""
    if console.is_terminal:
        console.print(table)
        return
    with console.capture() as captured:
        console.print(table)
    for line in captured.get().splitlines():
        print_line(console, line.rstrip())


def print_rest(console: Console, rows: Sequence[object], limit: int) -> None:
    """Say how many rows a limit left out, if any. limit 0: none."""
    if limit and len(rows) > limit:
        print_line(console, f"... and {len(rows) - limit} more (--limit)")


def ruled_table() -> Table:
    """A table without columns, with a line below its head."""
    return Table(box=box.SIMPLE_HEAD, collapse_padding=True, pad_edge=False)


def bar_blocks(console: Console) -> str:
    """The characters of a bar, from empty to full: an old terminal's encoding may have no eighths of a block."""
    return _EIGHTHS if (console.encoding or "").lower().startswith("utf") else " #"


def log_bar(rel: float | None, blocks: str = _EIGHTHS) -> str:
    """`rel` on a logarithmic scale: empty at 1e-16 and below, two powers of ten a character, full at 1 and above."""
    if rel is None or not rel > _BAR_FLOOR:
        return ""
    filled = min(1.0, 1 - math.log10(rel) / math.log10(_BAR_FLOOR))
    units = max(1, round(filled * LOG_BAR_WIDTH * (len(blocks) - 1)))
    whole, rest = divmod(units, len(blocks) - 1)
    return blocks[-1] * whole + (blocks[rest] if rest else "")


def figure(value: float | int | None) -> str:
    """A number in a table: whole ones as they are, others with two digits; "-" if it is unknown."""
    if value is None:
        return "-"
    if isinstance(value, int):
        return str(value)
    return "0" if value == 0 else f"{value:.1e}"


def printable(text: str, keep_lines: bool = False) -> str:
    """Text of a user's program with what a terminal would obey (escape sequences, line ends) made visible."""
    return "".join(
        c if c.isprintable() or (keep_lines and c == "\n") else c.encode("unicode_escape").decode() for c in text
    )
