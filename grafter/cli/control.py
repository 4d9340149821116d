"""`grafter ctl` on the command line: shows a run that is in progress, and changes it."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from grafter.cli.command_options import EXIT_FAILED, GROUP, ExcludeOption, errors_reported, parse_master
from grafter.errors import UsageError

if TYPE_CHECKING:
    from grafter.config.control.change import ControlField
    from grafter.wire.control import RunAccess

ctl_app = typer.Typer(
    name="ctl",
    help="Look at a run in progress, and change its filters, windows and dumps.",
    **GROUP,
)


class RecorderAction(str, Enum):
    """What `grafter ctl record` does."""

    on = "on"
    off = "off"
    dump_now = "dump-now"


_Master = Annotated[
    str | None, typer.Option(metavar="HOST:PORT", help="The run's store. Default: GRAFTER_MASTER_ADDRESS, _PORT.")
]
_Run = Annotated[
    Path | None, typer.Option(metavar="DIR", help="Or the run's directory, or that of --out: its newest run.")
]
_Group = Annotated[str | None, typer.Option(metavar="NAME", help="The run's GRAFTER_GROUP_NAME. Default: graft.")]
_Json = Annotated[bool, typer.Option("--json", help="One JSON object and nothing else.")]
_Wait = Annotated[
    float, typer.Option("--wait", metavar="SECONDS", min=0, help="How long to wait until it is in force everywhere.")
]
_Hold = Annotated[
    float,
    typer.Option(
        "--hold", metavar="SECONDS", min=0.1, max=3600, help="How long ranks may be held until it is decided."
    ),
]
# The options of `set`. They are texts, because an empty one unsets, and because the ranks read them.
_Filter = Annotated[str | None, typer.Option(metavar="EXPR", help="In its place; '' unsets it.")]
_Stats = Annotated[str | None, typer.Option(metavar="LEVEL", help="full, light or off.")]
_Start = Annotated[str | None, typer.Option(metavar="N", help="Rows from this position on, where a call has no start.")]
_NewRowsOnly = Annotated[
    str | None, typer.Option(metavar="on|off", help="Exchanged rows do not count again, where a call says nothing.")
]
_Windows = Annotated[str | None, typer.Option(metavar="on|off", help="off: every row counts, whatever calls say.")]
_DumpLevel = Annotated[str | None, typer.Option(metavar="LEVEL", help="full, statistics or checksum.")]
_DumpSteps = Annotated[str | None, typer.Option(metavar="STEPS", help="Only these are saved: 0-3,10 or 20-.")]
_DumpMaxBytes = Annotated[str | None, typer.Option(metavar="BYTES", help="A rank saves no more: 512MiB, 10GiB.")]
_DumpMaxPoints = Annotated[str | None, typer.Option(metavar="N", help="A rank saves no more points.")]
# The options of `dump-next`.
_Steps = Annotated[int, typer.Argument(metavar="N", min=1, help="How many steps.")]
_Points = Annotated[str, typer.Option(metavar="EXPR", help="Which points. Default: all.")]
# The options of `record`.
_What = Annotated[
    RecorderAction | None, typer.Argument(metavar="ACTION", help="Leave it out to change the rest alone.")
]
_Threshold = Annotated[int | None, typer.Option(metavar="N", min=0, help="Finished requests to a batch; 0: none.")]


@dataclass(frozen=True)
class _GivenRun:
    """The options of `grafter ctl` that say which run."""

    master: str | None
    run: Path | None
    group: str | None


@contextmanager
def _errors_reported() -> Iterator[None]:
    """Like `errors_reported`, also for a message that no rank would accept, such as a filter that is too long."""
    with errors_reported("grafter ctl", EXIT_FAILED):
        try:
            yield
        except ValueError as error:
            raise UsageError(str(error)) from None


@ctl_app.callback()
def ctl(context: typer.Context, master: _Master = None, run: _Run = None, group: _Group = None) -> None:
    """Look at a run in progress, and change its filters, windows and dumps, on every rank of both jobs at one step
    boundary.

    \b
    grafter ctl --master 127.0.0.1:29400 status
    grafter ctl --run grafter_out set --compare "layer_id == 3"
    grafter ctl --run grafter_out dump-next 2

    A change is refused as a whole if any rank refuses it. Where the run has a secret, GRAFTER_SECRET must be the same.

    Exit code: 0 it is in force on all ranks; 1 it was refused, is agreed and not in force yet, or the run is over; 2
    wrong usage, or no run there.
    """
    context.obj = _GivenRun(master, run, group)


@ctl_app.command(short_help="What each rank does, and what is in force.")
def status(context: typer.Context, as_json: _Json = False) -> None:
    """What each rank does, which step it is in, which settings are in force, and its recorders of requests."""
    with _errors_reported():
        from grafter.cli.console import make_console
        from grafter.cli.control_table import print_status, status_as_json

        access = _open(context)
        views = access.look()
        if as_json:
            print(status_as_json(access, views))
        else:
            print_status(make_console(sys.stdout), access, views)


@ctl_app.command("set", short_help="Change filters, windows, dumps, or how much is measured.")
def set_command(
    context: typer.Context, b2t: _Filter = None, t2b: _Filter = None, compare: _Filter = None, stats: _Stats = None,
    start: _Start = None, new_rows_only: _NewRowsOnly = None, windows: _Windows = None, dump: _Filter = None,
    dump_level: _DumpLevel = None, dump_steps: _DumpSteps = None, dump_max_bytes: _DumpMaxBytes = None,
    dump_max_points: _DumpMaxPoints = None, wait: _Wait = 10.0, hold: _Hold = 10.0,
) -> None:  # fmt: skip
    """Change filters, windows, dumps, or how much is measured. What is not named does not change; '' sets a setting
    to its default."""
    given: dict[ControlField, str | None] = {
        "b2t_filter": b2t, "t2b_filter": t2b, "compare_filter": compare, "dump_filter": dump, "stats": stats,
        "start": start, "new_rows_only": new_rows_only, "windows": windows, "dump_level": dump_level,
        "dump_steps": dump_steps, "dump_max_bytes": dump_max_bytes, "dump_max_points": dump_max_points,
    }  # fmt: skip
    settings = {name: value for name, value in given.items() if value is not None}
    with _errors_reported():
        from grafter.config.control.change import OPTION_OF

        if not settings:
            *others, last = OPTION_OF.values()
            raise UsageError(f"say what to set: {', '.join(others)} or {last}.")
        _change(context, wait, hold, action="set", settings=settings)


@ctl_app.command("off", short_help="No filter matches, and nothing is saved.")
def off(context: typer.Context, wait: _Wait = 10.0, hold: _Hold = 10.0) -> None:
    """From the next step on no filter matches, and nothing is saved, until `on`."""
    _change(context, wait, hold, action="off")


@ctl_app.command("on", short_help="The filters as they were before `off`.")
def on(context: typer.Context, wait: _Wait = 10.0, hold: _Hold = 10.0) -> None:
    """The filters as they were before `off`, with what was set since."""
    _change(context, wait, hold, action="on")


@ctl_app.command("dump-next", short_help="Save the points of the next N steps.")
def dump_next(
    context: typer.Context, steps: _Steps, points: _Points = "True", wait: _Wait = 10.0, hold: _Hold = 10.0
) -> None:
    """Save the points of the next N steps, the same steps on every rank, besides what the dump filter saves."""
    _change(context, wait, hold, action="dump-next", steps=steps, points=points)


@ctl_app.command("record", short_help="Change the recorders of requests in the ranks' processes.")
def record(
    context: typer.Context,
    what: _What = None,
    threshold: _Threshold = None,
    exclude: ExcludeOption = None,
    wait: _Wait = 10.0,
    hold: _Hold = 10.0,
) -> None:
    """Switch the recorders of requests (grafter.RequestRecorder) in the ranks' processes on or off, change what they
    keep, or make them write what is in memory. Refused if no rank has one."""
    switched = None if what in (None, RecorderAction.dump_now) else what is RecorderAction.on
    with _errors_reported():
        from grafter.config.control.recorders import RecorderChange

        recorders = RecorderChange(
            enabled=switched, threshold=threshold, exclude=exclude, dump=what is RecorderAction.dump_now
        )
        recorders.check()
        _change(context, wait, hold, action="record", recorders=recorders)


def _open(context: typer.Context) -> RunAccess:
    from grafter.wire.control import RunAccess, place_of_run

    given: _GivenRun = context.obj
    group = os.environ.get("GRAFTER_GROUP_NAME") or "graft"
    if given.master is not None and given.run is not None:
        raise UsageError("give --master or --run, not both.")
    if given.run is not None:
        address, port, group = place_of_run(given.run)
    elif given.master is not None:
        address, port = parse_master(given.master)
    else:
        port_text = os.environ.get("GRAFTER_MASTER_PORT", "").strip()
        if not port_text:
            raise UsageError("say which run: --master HOST:PORT of its store, or --run DIR.")
        address_text = os.environ.get("GRAFTER_MASTER_ADDRESS", "").strip() or "127.0.0.1"
        address, port = parse_master(f"{address_text}:{port_text}")
    # The store's client warns about every wait, and looks host names up for it, which is slow.
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    secret = os.environ.get("GRAFTER_SECRET", "").strip() or None
    return RunAccess(address, port, group_name=given.group or group, secret=secret)


@_errors_reported()
def _change(context: typer.Context, wait: float, hold: float, **asked: Any) -> None:
    """Propose a change of these fields, and print its result."""
    from grafter.cli.control_table import describe_effect, recorder_lines
    from grafter.config.control.change import Change

    change = Change(**asked)
    access = _open(context)
    agreed = access.change(change, seconds=hold)
    if agreed.decision.refused is not None:
        print(f"grafter ctl: change {agreed.number} is refused: {agreed.decision.refused}", file=sys.stderr)
        raise typer.Exit(EXIT_FAILED)
    print(f"change {agreed.number} is agreed, for step {agreed.decision.step}", flush=True)
    views = access.await_effect(agreed.number, wait)
    text, is_done = describe_effect(agreed, views)
    print(text)
    if change.action == "record":
        for line in recorder_lines(views):
            print(line)
    if not is_done:
        raise typer.Exit(EXIT_FAILED)
