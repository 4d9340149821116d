"""`grafter locate` on the command line."""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from grafter.cli.command_options import AttachOption
from grafter.errors import GrafterError, UsageError
from grafter.rank.job_environment import parse_settings

if TYPE_CHECKING:
    from rich.console import Console


_Baseline = Annotated[str, typer.Option(metavar="CMD", help="Starts the job that is correct, e.g. 'python a.py'.")]
_Target = Annotated[str, typer.Option(metavar="CMD", help="Starts the job that is wrong, e.g. 'torchrun ... b.py'.")]
_Floor = Annotated[
    str | None,
    typer.Option(metavar="CMD", help="Starts a target without the fault: it measures what rounding alone adds."),
]
_Points = Annotated[
    str, typer.Option(metavar="EXPR", help="Which points: a filter expression over the tags. Default: all.")
]
_Set = Annotated[
    list[str] | None, typer.Option("--set", metavar="FIELD=VALUE", help="A setting for both jobs; may be repeated.")
]
_Out = Annotated[
    Path | None, typer.Option(metavar="DIR", help="For ledgers and verdict.json. Default: grafter_out/locate-<time>.")
]
_Json = Annotated[bool, typer.Option("--json", help="Print the verdict as JSON instead of the table.")]
_Open = Annotated[bool, typer.Option("--open", help="Open the report in a browser, if there is a display.")]
_Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="Do not show the jobs' own output.")]


def locate_command(
    baseline: _Baseline,
    target: _Target,
    floor: _Floor = None,
    points: _Points = "",
    attach: AttachOption = None,
    settings: _Set = None,
    out: _Out = None,
    as_json: _Json = False,
    open_report: _Open = False,
    quiet: _Quiet = False,
) -> None:
    """Find the module of the target that is wrong.

    Runs the pair twice: it first compares every point, then grafts the baseline's value into every point, so that each
    shows the error that it adds with nothing inherited. Exit code 0: no point adds error. 1: one is named. 2: it could
    not be judged, or a run failed.
    """
    # These imports are slow (pydantic, rich), and every command of the program imports this file.
    from grafter.analysis.locate.verdict import verdict_as_json
    from grafter.cli.locate_table import print_verdict
    from grafter.cli.show import make_console
    from grafter.tools.locate_runner import locate

    # With --json, stdout holds only the JSON.
    console = make_console(sys.stderr if as_json else sys.stdout)
    out = out or Path("grafter_out") / time.strftime("locate-%Y%m%d-%H%M%S")
    try:
        verdict = locate(
            baseline,
            target,
            floor=floor,
            points=points,
            out=out,
            settings=_merge(parse_settings(settings or []), attach or []),
            console=console,
            quiet=quiet or as_json,
        )
    except GrafterError as error:
        typer.echo(f"grafter locate: {error}", err=True)
        raise typer.Exit(getattr(error, "exit_code", 2)) from None
    if as_json:
        typer.echo(verdict_as_json(verdict))
    else:
        console.print()
        print_verdict(verdict, console)
    _write_report(out, console, open_it=open_report)
    raise typer.Exit(verdict.exit_code)


def _write_report(out: Path, console: Console, *, open_it: bool) -> None:
    """Write the report page, and print its path below the verdict. A failure is reported and changes no exit code."""
    from rich.text import Text

    from grafter.analysis.report.writing import FILE_NAME, make_page, show_page, write_page

    try:
        write_page(make_page([out]), out / FILE_NAME)
    except (GrafterError, OSError) as error:
        console.print(Text(f"report: none, because {error}"), soft_wrap=True)
        return
    console.print(Text(f"report: {out / FILE_NAME}"), soft_wrap=True)
    if open_it:
        show_page(out / FILE_NAME)


def _merge(settings: dict[str, str], patterns: list[str]) -> dict[str, str]:
    if patterns and "attach" in settings:
        raise UsageError("attach is given twice, by --attach and by --set; give it once.")
    return {**settings, "attach": ",".join(patterns)} if patterns else settings
