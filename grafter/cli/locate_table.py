"""Prints the verdict: a table with a bar per point, the notes, one sentence; or JSON."""

from __future__ import annotations

import math
from collections.abc import Iterable

from rich.console import Console
from rich.table import Table
from rich.text import Text

from grafter.analysis.locate.verdict import PointVerdict, Verdict, describe_number
from grafter.cli.console import print_line, print_table, ruled_table

BAR_WIDTH = 20
_SCALE_CAPTION = "differences are `rel`, the worst over steps and ranks; bars are logarithmic"
# Room on either side of the scale, in decades, so that the smallest difference still shows.
_MARGIN_DECADES = 1.0


def print_verdict(verdict: Verdict, console: Console) -> None:
    """Print the inputs, the table, the notes, and the sentence at the end.

    The table fits 80 columns. Sentences stay on one line, so that a program that reads a pipe finds them whole.
    """
    print_line(console, verdict.inputs)
    console.print()
    print_table(verdict_table(verdict, "\u2588" if console.encoding.startswith("utf") else "#"), console)
    print_line(console, _SCALE_CAPTION, "italic")
    for point in verdict.points:
        if point.note is not None:
            print_line(console, f"{point.point}: {point.note}", "yellow")
    for note in verdict.notes:
        print_line(console, f"note: {note}", "yellow")
    console.print()
    print_line(console, verdict.sentence, "bold")


def verdict_table(verdict: Verdict, bar: str = "#") -> Table:
    """One row per point, in the baseline's order; points that add error are marked."""
    table = ruled_table()
    table.add_column("", width=1)
    table.add_column("layer", overflow="fold")
    table.add_column("difference\nleft alone", justify="right")
    table.add_column("difference\nit adds", justify="right")
    table.add_column("its\nfloor", justify="right", min_width=7)
    table.add_column("", no_wrap=True, min_width=BAR_WIDTH)
    scale = _scale(verdict.points)
    for point in verdict.points:
        style = "bold red" if point.guilty else ("yellow" if not point.judged else "")
        mark = ">" if point.guilty else ("?" if not point.judged else "")
        cells = [mark, point.point, *(describe_number(value) for value in (point.alone, point.added, point.floor))]
        table.add_row(*(Text(cell) for cell in cells), Text(draw_bar(point.added, scale, bar)), style=style)
    return table


def _scale(points: Iterable[PointVerdict]) -> tuple[float, float]:
    """(lowest, highest) exponent of ten that a bar shows."""
    # The limits are included, so that a clean pair, which has only floors, does not fill the bars.
    values = [value for point in points for value in (point.alone, point.added, point.floor, point.limit)]
    exponents = [math.log10(value) for value in values if value and math.isfinite(value)]
    if not exponents:
        return (0.0, 1.0)
    return (math.floor(min(exponents)) - _MARGIN_DECADES, math.ceil(max(exponents)))


def draw_bar(value: float | None, scale: tuple[float, float], character: str = "#") -> str:
    """A bar whose length is the logarithm of `value` on the scale; none for 0, full for NaN or Inf.

    >>> draw_bar(1e-2, (-4.0, 0.0)) '##########'
    """
    if value is None or value == 0:
        return ""
    if math.isinf(value):
        return character * BAR_WIDTH
    low, high = scale
    filled = BAR_WIDTH * (math.log10(value) - low) / (high - low)
    return character * max(1, min(BAR_WIDTH, round(filled)))
