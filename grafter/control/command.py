"""`grafter ctl` on the command line: a run that goes on, looked at and changed."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from grafter.errors import ConfigError, GrafterError, JoinError, UsageError

if TYPE_CHECKING:
    from grafter.control.change import Change, ControlField
    from grafter.control.run_access import RunAccess

_EXIT_REFUSED, _EXIT_USAGE = 1, 2

ctl_app = typer.Typer(
    name="ctl",
    help="Look at a run that goes on, and change its filters and dumps.",
    no_args_is_help=True,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
)

_Wait = Annotated[
    float, typer.Option("--wait", metavar="SECONDS", min=0, help="How long to wait until it is in force everywhere.")
]
_Hold = Annotated[
    float,
    typer.Option(
        "--hold", metavar="SECONDS", min=0.1, max=3600, help="How long ranks may be held until it is decided."
    ),
]


@dataclass(frozen=True)
class _Target:
    master: str | None
    run: Path | None
    group: str | None


@ctl_app.callback()
def ctl(
    context: typer.Context,
    master: Annotated[
        str | None, typer.Option(metavar="HOST:PORT", help="The run's store. Default: GRAFTER_MASTER_ADDRESS, _PORT.")
    ] = None,
    run: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Or the run's directory, or that of --out: its newest run.")
    ] = None,
    group: Annotated[
        str | None, typer.Option(metavar="NAME", help="The run's GRAFTER_GROUP_NAME. Default: graft.")
    ] = None,
) -> None:
    """Look at a run that goes on, and change its filters and dumps, on every rank of both jobs at one step boundary.

    \b
    grafter ctl --master 127.0.0.1:29400 status
    grafter ctl --run grafter_out set --compare "layer_id == 3"
    grafter ctl --run grafter_out dump-next 2

    A change is refused as a whole if any rank refuses it. Where the run has a secret, GRAFTER_SECRET must be the same.

    Exit code: 0 it is in force on all ranks; 1 it was refused, is agreed and not in force yet, or the run is over; 2
    wrong usage, or no run there.
    """
    context.obj = _Target(master, run, group)


@ctl_app.command(short_help="What each rank does, and what is in force.")
def status(
    context: typer.Context,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object and nothing else.")] = False,
) -> None:
    """What each rank does, which step it is in, and which settings are in force."""
    with _errors_told():
        from rich.console import Console

        from grafter.control.table import print_status, status_as_json

        access = _open(context)
        views = access.look()
        if as_json:
            print(status_as_json(access, views))
        else:
            print_status(Console(width=None if sys.stdout.isatty() else 250), access, views)


_Text = Annotated[str | None, typer.Option(metavar="EXPR", help="In its place; '' unsets it.")]


@ctl_app.command("set", short_help="Change filters, or how much is measured.")
def set_command(
    context: typer.Context,
    b2t: _Text = None,
    t2b: _Text = None,
    compare: _Text = None,
    dump: _Text = None,
    stats: Annotated[str | None, typer.Option(metavar="LEVEL", help="full, light or off.")] = None,
    wait: _Wait = 10.0,
    hold: _Hold = 10.0,
) -> None:
    """Change filters, or how much is measured. What is not named stays as it is."""
    given: dict[ControlField, str | None] = {
        "b2t_filter": b2t, "t2b_filter": t2b, "compare_filter": compare, "dump_filter": dump, "stats": stats,
    }  # fmt: skip
    settings = {name: value for name, value in given.items() if value is not None}
    with _errors_told():
        if not settings:
            raise UsageError("say what to set: --b2t, --t2b, --compare, --dump or --stats.")
        from grafter.control.change import Change

        _change(context, Change(action="set", settings=settings), wait, hold)


@ctl_app.command("off", short_help="No filter matches, and nothing is saved.")
def off(context: typer.Context, wait: _Wait = 10.0, hold: _Hold = 10.0) -> None:
    """From the next step on no filter matches, and nothing is saved, until `on`."""
    with _errors_told():
        from grafter.control.change import Change

        _change(context, Change(action="off"), wait, hold)


@ctl_app.command("on", short_help="The filters as they were before `off`.")
def on(context: typer.Context, wait: _Wait = 10.0, hold: _Hold = 10.0) -> None:
    """The filters as they were before `off`, with what was set since."""
    with _errors_told():
        from grafter.control.change import Change

        _change(context, Change(action="on"), wait, hold)


@ctl_app.command("dump-next", short_help="Save the points of the next N steps.")
def dump_next(
    context: typer.Context,
    steps: Annotated[int, typer.Argument(metavar="N", min=1, help="How many steps.")],
    points: Annotated[str, typer.Option(metavar="EXPR", help="Which points. Default: all.")] = "True",
    wait: _Wait = 10.0,
    hold: _Hold = 10.0,
) -> None:
    """Save the points of the next N steps, the same steps on every rank, besides what the dump filter saves."""
    with _errors_told():
        from grafter.control.change import Change

        _change(context, Change(action="dump-next", steps=steps, points=points), wait, hold)


def _open(context: typer.Context) -> RunAccess:
    from grafter.cli import parse_master
    from grafter.control.run_access import RunAccess, place_of_run

    target: _Target = context.obj
    group = os.environ.get("GRAFTER_GROUP_NAME") or "graft"
    if target.master is not None and target.run is not None:
        raise UsageError("give --master or --run, not both.")
    if target.run is not None:
        address, port, group = place_of_run(target.run)
    elif target.master is not None:
        address, port = parse_master(target.master)
    else:
        given = os.environ.get("GRAFTER_MASTER_PORT", "").strip()
        if not given:
            raise UsageError("say which run: --master HOST:PORT of its store, or --run DIR.")
        address, port = parse_master(f"{os.environ.get('GRAFTER_MASTER_ADDRESS', '').strip() or '127.0.0.1'}:{given}")
    # The client of the store warns of every wait, with a slow look-up of names.
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    secret = os.environ.get("GRAFTER_SECRET", "").strip() or None
    return RunAccess(address, port, group_name=target.group or group, secret=secret)


def _change(context: typer.Context, change: Change, wait: float, hold: float) -> None:
    from grafter.control.table import describe_effect

    access = _open(context)
    agreed = access.change(change, seconds=hold)
    if agreed.decision.refused is not None:
        print(f"grafter ctl: change {agreed.number} is refused: {agreed.decision.refused}", file=sys.stderr)
        raise typer.Exit(_EXIT_REFUSED)
    print(f"change {agreed.number} is agreed, for step {agreed.decision.step}", flush=True)
    views = access.await_effect(agreed.number, wait)
    text, is_done = describe_effect(agreed, views)
    print(text)
    if not is_done:
        raise typer.Exit(_EXIT_REFUSED)


@contextmanager
def _errors_told() -> Iterator[None]:
    try:
        yield
    except GrafterError as error:
        print(f"grafter ctl: {error}", file=sys.stderr)
        usage = isinstance(error, (ConfigError, UsageError, JoinError))
        raise typer.Exit(_EXIT_USAGE if usage else _EXIT_REFUSED) from None
    except ValueError as error:
        # A message that no rank would take: a filter that is too long, say.
        print(f"grafter ctl: {error}", file=sys.stderr)
        raise typer.Exit(_EXIT_USAGE) from None
