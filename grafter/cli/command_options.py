"""What several commands of the command line share: options with the same words, errors as text, the progress bar.

`grafter/cli/main.py` imports every command, and so this; what is slow to import (rich) is imported inside.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Annotated, Any

import typer

from grafter.errors import ConfigError, GrafterError, JoinError, UsageError
from grafter.rank.job_environment import merge_settings

EXIT_FAILED, EXIT_USAGE, EXIT_INTERRUPTED = 1, 2, 130
# For a group of commands, such as `grafter ctl`.
GROUP: dict[str, Any] = {
    "no_args_is_help": True,
    "rich_markup_mode": None,
    "context_settings": {"help_option_names": ["-h", "--help"]},
}

AttachOption = Annotated[
    list[str] | None,
    typer.Option(metavar="PATTERN", help="Modules to reach in programs that never import grafter; may be repeated."),
]
SetOption = Annotated[
    list[str] | None, typer.Option("--set", metavar="FIELD=VALUE", help="Any other setting; may be repeated.")
]
ExcludeOption = Annotated[
    str | None, typer.Option(metavar="KEYS", help="Keys to leave out of the record, or '' for none.")
]
JsonLinesOption = Annotated[bool, typer.Option("--json", help="JSON lines and nothing else.")]
RowLimitOption = Annotated[int, typer.Option(metavar="N", min=0, help="At most N rows; 0: all.")]


@contextmanager
def errors_reported(command: str, failed: int = EXIT_USAGE, reword: Callable[[str], str] = str) -> Iterator[None]:
    """Print grafter's own errors as text, and end with an exit code.

    The code is 2 for what the user wrote (a store that cannot be hosted is a port that the user chose), `failed` for
    any other error, or the error's own `exit_code`.
    """
    try:
        yield
    except GrafterError as error:
        typer.echo(f"{command}: {reword(str(error))}", err=True)
        usage = isinstance(error, (ConfigError, UsageError, JoinError))
        raise typer.Exit(getattr(error, "exit_code", EXIT_USAGE if usage else failed)) from None


def settings_by_field(
    assignments: list[str] | None, attach: list[str] | None = None, **own: object | None
) -> dict[str, str]:
    """Settings from a command's own options (`own`, None: not given; --attach) and from --set. Raises UsageError."""
    given = {**own, "attach": ",".join(attach) if attach else None}
    return merge_settings({field: str(value) for field, value in given.items() if value is not None}, assignments or [])


@contextmanager
def progress_bar(doing: str, what: str, total: int | None = None) -> Iterator[Callable[[int, int], None]]:
    """Show a bar on stderr if that is a terminal: `comparing ━━━ 3/10 points`.

    It yields a function, to be called with how many are done, and of how many.
    """
    if not sys.stderr.isatty():
        yield lambda done, of: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn(doing), BarColumn(), MofNCompleteColumn(), TextColumn(what), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task(what, total=total)
        yield lambda done, of: bar.update(task, completed=done, total=of)


def parse_master(text: str) -> tuple[str, int]:
    """(host, port) of HOST:PORT; an IPv6 address is in brackets. Raises UsageError."""
    host, colon, port = text.rpartition(":")
    if not colon or not host or not port.isdigit() or not 0 < int(port) < 65536:
        raise UsageError(f"--master {text}: write it as HOST:PORT, such as 10.0.0.1:29400.")
    return host.removeprefix("[").removesuffix("]"), int(port)
