"""`grafter compare` on the command line."""

from __future__ import annotations

import sys
from collections.abc import Callable
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from grafter.errors import GrafterError

if TYPE_CHECKING:
    from grafter.compare.comparison import Comparison, Progress
    from grafter.compare.thresholds import Threshold

_EXIT_NOT_COMPARED = 2


class WhichChoice(str, Enum):
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
_Which = Annotated[WhichChoice, typer.Option(help="Values as they came to the point, or as a graft left them.")]
_Allow = Annotated[
    list[str] | None, typer.Option(metavar="PATTERN", help="Names that may fail, such as '*.rotary.*'; repeatable.")
]
_ForbidSkips = Annotated[
    bool, typer.Option("--forbid-skips", help="Exit with 2 if anything was skipped, or is on one side only.")
]
_Json = Annotated[bool, typer.Option("--json", help="JSON lines and nothing else.")]
_Failed = Annotated[bool, typer.Option("--failed", help="Only points that did not pass.")]
_Limit = Annotated[int, typer.Option(metavar="N", min=0, help="At most N rows; 0: all.")]
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
    as_json: _Json = False,
    failed: _Failed = False,
    limit: _Limit = 0,
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
    from grafter.compare.comparison import Choice, compare, open_both
    from grafter.compare.table import json_lines, print_comparison
    from grafter.compare.thresholds import parse_threshold
    from grafter.show import make_console

    try:
        rules = [parse_threshold(text) for text in thresholds or []]
        rules += _thresholds_of(plan) if plan is not None else []
        choice = Choice(
            thresholds=rules,
            which=which.value,
            filter=filter,
            allow=allow or [],
            forbid_skips=forbid_skips,
            block_bytes=block << 20,
            threads=threads,
        )
        dumps_a, dumps_b = open_both(a, b)
        _one_thread_a_point()
        comparison = _with_progress(lambda progress: compare(dumps_a, dumps_b, choice, progress))
    except GrafterError as error:
        typer.echo(f"grafter compare: {error}", err=True)
        raise typer.Exit(_EXIT_NOT_COMPARED) from None
    except Exception as error:
        # Python's own exit code would say that a point differs.
        typer.echo(
            "grafter compare: nothing was compared, for a fault of grafter's own, which is worth a report: "
            f"{type(error).__name__}: {error}",
            err=True,
        )
        raise typer.Exit(_EXIT_NOT_COMPARED) from None
    if as_json:
        for line in json_lines(comparison):
            typer.echo(line)
    else:
        print_comparison(comparison, make_console(sys.stdout), limit=limit, only_trouble=failed)
    raise typer.Exit(comparison.summary.exit_code)


def _thresholds_of(plan: Path) -> list[Threshold]:
    from grafter.settings.config import SETTING_FIELDS
    from grafter.settings.plan_file import read_plan_file

    return list(read_plan_file(plan, SETTING_FIELDS).thresholds)


def _one_thread_a_point() -> None:
    """Points are shared out among our own threads; torch's would only stand in their way."""
    import torch

    torch.set_num_threads(1)


def _with_progress(work: Callable[[Progress], Comparison]) -> Comparison:
    """Show a bar where stderr is a terminal."""
    if not sys.stderr.isatty():
        return work(lambda done, of: None)
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("comparing"), BarColumn(), MofNCompleteColumn(), TextColumn("points"), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("points", total=None)
        return work(lambda done, of: bar.update(task, completed=done, total=of))
