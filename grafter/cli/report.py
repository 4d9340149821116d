"""`grafter report` on the command line."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from grafter.errors import ConfigError, GrafterError, UsageError


def report_command(
    places: Annotated[
        list[Path],
        typer.Argument(
            metavar="DIR [DIR]",
            help="A run, an --out directory, a file of `grafter compare --json`; or two directories of dumps.",
        ),
    ],
    out: Annotated[
        Path | None, typer.Option(metavar="FILE", help="The page. Default: report.html in the first directory.")
    ] = None,
    open_it: Annotated[bool, typer.Option("--open", help="Open it in a browser, if there is a display.")] = False,
    tensorboard: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Also write the figures as TensorBoard scalars to DIR.")
    ] = None,
) -> None:
    """Write one self-contained HTML page about a run or a comparison. It loads nothing from the network.

    \b
    grafter report grafter_out                       the newest run in it
    grafter report grafter_out/locate-20260101-1200  what `grafter locate` found
    grafter report run1/baseline run2/baseline       two directories of dumps, compared
    grafter compare --json run1 > c.jsonl; grafter report c.jsonl

    Exit code: 0 the page was written, whatever it shows; 1 it could not be written; 2 wrong usage.
    """
    # These imports are slow (torch, pydantic), and every command of the program imports this file.
    from grafter.analysis.report.writing import FILE_NAME, make_page, page_directory, show_page, write_page

    try:
        if out is not None:
            _refuse_wrong_out(out)
        page = make_page(places)
        path = out or page_directory(places[0]) / FILE_NAME
        write_page(page, path)
        typer.echo(f"report: {path}")
        if tensorboard is not None:
            from grafter.analysis.report.page_data import write_scalars

            count = write_scalars(page.points, tensorboard)
            typer.echo(f"TensorBoard: {count} values in {tensorboard}; tensorboard --logdir {tensorboard}")
    except GrafterError as error:
        typer.echo(f"grafter report: {error}", err=True)
        raise typer.Exit(2 if isinstance(error, (UsageError, ConfigError)) else 1) from None
    if open_it and not show_page(path):
        typer.echo("grafter report: there is no display, so the page was written but not opened.", err=True)


def _refuse_wrong_out(out: Path) -> None:
    """Raise UsageError for an unusable --out, before anything is read. A misspelt directory is not created."""
    if out.is_dir():
        raise UsageError(f"--out {out} is a directory; give the name of a file in it.")
    if not out.parent.is_dir():
        raise UsageError(f"--out {out}: there is no directory {out.parent}. Make it first, or correct the path.")
