"""`grafter compare` on the command line."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from grafter.cli.command_options import EXIT_USAGE, JsonLinesOption, RowLimitOption, errors_reported, progress_bar
from grafter.errors import GrafterError

if TYPE_CHECKING:
    from grafter.analysis.compare.comparison import Choice, Comparison
    from grafter.config.thresholds import Threshold


class WhichChoice(str, Enum):
    """The values of --which."""

    value = "value"
    grafted = "grafted"


_A = Annotated[Path, typer.Argument(metavar="A", help="The reference: a role's directory, or a run's.")]
_B = Annotated[
    Path | None, typer.Argument(metavar="[B]", help="What is judged. Left out: A is a run, its target is judged.")
]
_Thresholds = Annotated[
    list[str] | None,
    typer.Option("--threshold", metavar="'PATTERN: EXPR'", help="What a difference may be; the first match counts."),
]
_Plan = Annotated[
    Path | None, typer.Option(metavar="FILE", help="A plan file; its `thresholds` come after those above.")
]
_Filter = Annotated[str | None, typer.Option(metavar="EXPR", help="Which points: a filter over their tags.")]
_Which = Annotated[WhichChoice, typer.Option(help="Values as they were at the point, or as a graft left them.")]
_Allow = Annotated[
    list[str] | None, typer.Option(metavar="PATTERN", help="Names that may fail, such as '*.rotary.*'; repeatable.")
]
_ForbidSkips = Annotated[
    bool, typer.Option("--forbid-skips", help="Exit with 2 if anything was skipped, or is on one side only.")
]
_Failed = Annotated[bool, typer.Option("--failed", help="Only points that did not pass.")]
_Block = Annotated[int, typer.Option("--block-mib", metavar="N", min=1, help="Memory for a block of one side.")]
_Threads = Annotated[int | None, typer.Option(metavar="N", min=1, help="Default: one per core, up to 8.")]


def compare_command(
    a: _A,
    b: _B = None,
    thresholds: _Thresholds = None,
    plan: _Plan = None,
    filter: _Filter = None,
    which: _Which = WhichChoice.value,
    allow: _Allow = None,
    forbid_skips: _ForbidSkips = False,
    as_json: JsonLinesOption = False,
    failed: _Failed = False,
    limit: RowLimitOption = 0,
    block: _Block = 16,
    threads: _Threads = None,
) -> None:
    """Compare what two jobs dumped: which points differ, by how much, and which module makes them differ.

    \b
    grafter compare grafter_out/run1                       the run's baseline with its target
    grafter compare run1/baseline run2/baseline --threshold 'attn*: rel <= 1e-5' \\
                --threshold '*: rel <= 1e-3 or max_abs <= 1e-3'

    Without a threshold any difference counts; with one, a name that none covers is an error. Exit code: 0 all pass;
    1 a point differs; 2 something, or everything, could not be compared; 130 Ctrl-C.
    """
    # Slow to import (torch, pydantic), and every command of the program imports this file.
    from grafter.analysis.compare.comparison import Choice

    with _faults_reported():
        choice = Choice(
            thresholds=_read_thresholds(thresholds or [], plan),
            which=which.value,
            filter=filter,
            allow=allow or [],
            forbid_skips=forbid_skips,
            block_bytes=block << 20,
            threads=threads,
        )
        comparison = _compare(a, b, choice)
    from grafter.cli.compare_table import json_lines, print_comparison
    from grafter.cli.console import make_console

    if as_json:
        for line in json_lines(comparison):
            typer.echo(line)
    else:
        print_comparison(comparison, make_console(sys.stdout), limit=limit, only_trouble=failed)
    raise typer.Exit(comparison.summary.exit_code)


@contextmanager
def _faults_reported() -> Iterator[None]:
    """Like `errors_reported`, also for faults of grafter itself: Python's exit code would say that a point differs."""
    with errors_reported("grafter compare"):
        try:
            yield
        except GrafterError:
            raise
        except Exception as error:
            fault = f"{type(error).__name__}: {error}"
            text = "nothing was compared, because of a fault in grafter itself, which is worth a report"
            typer.echo(f"grafter compare: {text}: {fault}", err=True)
            raise typer.Exit(EXIT_USAGE) from None


def _read_thresholds(texts: list[str], plan: Path | None) -> list[Threshold]:
    """The thresholds of --threshold, and after them those of the plan file."""
    from grafter.config.thresholds import parse_threshold

    given = [parse_threshold(text) for text in texts]
    if plan is None:
        return given
    from grafter.config.settings.config import SETTING_FIELDS
    from grafter.config.settings.plan_file import read_plan_file

    return [*given, *read_plan_file(plan, SETTING_FIELDS).thresholds]


def _compare(a: Path, b: Path | None, choice: Choice) -> Comparison:
    import torch

    from grafter.analysis.compare.comparison import compare, open_both

    dumps_a, dumps_b = open_both(a, b)
    # Points are distributed over our own threads; torch's would only slow them down.
    torch.set_num_threads(1)
    with progress_bar("comparing", "points") as progress:
        return compare(dumps_a, dumps_b, choice, progress)
