"""`grafter locate` on the command line."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Annotated

import typer

from grafter.errors import GrafterError, UsageError
from grafter.running.job_environment import parse_settings


def locate_command(
    baseline: Annotated[str, typer.Option(metavar="CMD", help="Starts the job that is right, e.g. 'python a.py'.")],
    target: Annotated[str, typer.Option(metavar="CMD", help="Starts the job that is wrong, e.g. 'torchrun ... b.py'.")],
    floor: Annotated[
        str | None,
        typer.Option(metavar="CMD", help="Starts a target without the fault: it measures what rounding alone adds."),
    ] = None,
    points: Annotated[
        str, typer.Option(metavar="EXPR", help="Which points: a filter expression over the tags. Default: all.")
    ] = "",
    attach: Annotated[
        list[str] | None,
        typer.Option(metavar="PATTERN", help="Modules to reach in programs that never import grafter; repeatable."),
    ] = None,
    settings: Annotated[
        list[str] | None, typer.Option("--set", metavar="FIELD=VALUE", help="A setting for both jobs; repeatable.")
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(metavar="DIR", help="For ledgers and verdict.json. Default: grafter_out/locate-<time>."),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the verdict as JSON instead of the table.")] = False,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="Do not show the jobs' own output.")] = False,
) -> None:
    """Name the module of the target that is wrong.

    Runs the pair twice: comparing every point, then grafting the baseline's value into every point, so that each point
    shows the error that it adds with nothing inherited. Exit code 0: no point adds error. 1: one is named. 2: it could
    not be judged, or a run failed.
    """
    # Slow to import (pydantic, rich), and every command of the program imports this file.
    from rich.console import Console

    from grafter.locate.runner import locate
    from grafter.locate.table import print_verdict, verdict_as_json

    # With --json stdout is the JSON alone.
    console = Console(stderr=as_json)
    try:
        verdict = locate(
            baseline,
            target,
            floor=floor,
            points=points,
            out=out or Path("grafter_out") / time.strftime("locate-%Y%m%d-%H%M%S"),
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
    raise typer.Exit(verdict.exit_code)


def _merge(settings: dict[str, str], patterns: list[str]) -> dict[str, str]:
    if patterns and "attach" in settings:
        raise UsageError("attach is given twice, by --attach and by --set; give it once.")
    return {**settings, "attach": ",".join(patterns)} if patterns else settings
