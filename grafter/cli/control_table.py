"""What `grafter ctl` prints: the ranks as a table or as JSON, and the result of a change."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from grafter.cli.console import print_line
from grafter.wire.control import Agreed, RankView, RunAccess, is_in_force

_NO_BOUNDARY = (
    "no rank has ended a step since. A change comes into force where a step ends: with grafter.step(), or by itself in "
    "a program that never imports grafter (GRAFTER_STEP). In a program without steps it never does"
)


def status_as_json(run: RunAccess, views: Sequence[RankView]) -> str:
    """One object: the run's name, and its ranks by graft rank."""
    return json.dumps({"run": run.run_name, "ranks": [_as_data(view) for view in views]}, indent=1)


def _as_data(view: RankView) -> dict[str, Any]:
    line, state = view.line, view.state
    return {
        "rank": view.who,
        "doing": _doing(view),
        "state": line.state if line is not None else None,
        "step": state.step if state is not None else None,
        "changes": state.changes if state is not None else None,
        "to_come": list(state.to_come) if state is not None else None,
        "in_force": state.in_force.model_dump(mode="json") if state is not None else None,
        "last_point": _last_point(view),
        "recorders": [recorder.model_dump(mode="json") for recorder in state.recorders] if state is not None else None,
    }


def print_status(console: Console, run: RunAccess, views: Sequence[RankView]) -> None:
    """The ranks as a table, and below what is in force."""
    table = Table(title=f"run {run.run_name}", title_justify="left", box=None, pad_edge=False)
    for column in ("rank", "step", "changes", "what it does", "last point"):
        table.add_column(column, justify="right" if column in ("step", "changes") else "left", overflow="fold")
    for view in views:
        state = view.state
        last = _last_point(view) or "none yet"
        table.add_row(
            view.who,
            str(state.step) if state is not None else "?",
            str(state.changes) if state is not None else "?",
            *(Text(text) for text in (_doing(view), last)),
        )
    console.print(table)
    for text, ranks in _grouped(views).items():
        print_line(console, f"in force on {ranks}: {text}")
    steps = sorted({step for view in views if view.state is not None for step in view.state.to_come})
    if steps:
        print_line(console, f"agreed, and to come in step {', '.join(map(str, steps))}")
    for line in recorder_lines(views):
        print_line(console, line)


def recorder_lines(views: Sequence[RankView]) -> list[str]:
    """The recorders of requests in the ranks' processes, and which rank has none."""
    lines = [f"recorder of {view.who}: {one.text}" for view in views if view.state for one in view.state.recorders]
    without = [view.who for view in views if view.state is not None and not view.state.recorders]
    if lines and without:
        lines.append(f"there is no recorder of requests in the process of {', '.join(without)}")
    elif without:
        lines.append("there is no recorder of requests in a rank's process")
    return lines


def _grouped(views: Sequence[RankView]) -> dict[str, str]:
    """What is in force -> the ranks."""
    found: dict[str, list[str]] = {}
    for view in views:
        if view.state is not None:
            found.setdefault(view.state.in_force.text, []).append(view.who)
    if len(found) == 1:
        return {next(iter(found)): "all ranks that answer"}
    return {text: ", ".join(ranks) for text, ranks in found.items()}


def _last_point(view: RankView) -> str | None:
    """The last point of a rank. Its own state is newer than the status board, which is written only when it waits."""
    if view.state is not None:
        return view.state.last_point or None
    return view.line.last_points[-1] if view.line is not None and view.line.last_points else None


def _doing(view: RankView) -> str:
    line = view.line
    if line is None:
        return "nothing is known of it"
    seconds = max(0.0, time.time() - line.since)
    if line.state == "left":
        return f"has left with {line.note}" if line.note else "has left"
    silent = "" if view.state is not None else "; it does not answer"
    if line.state == "waiting":
        return f"waits for {line.point} since {seconds:.0f} s at {line.call_site}{silent}"
    return (line.doing or "runs") + silent


def describe_effect(agreed: Agreed, views: Sequence[RankView]) -> tuple[str, bool]:
    """(the result of an agreed change, whether it is in force on every rank that has not left)."""
    step = agreed.decision.step
    here = [view for view in views if not view.has_left]
    in_force = [view for view in here if is_in_force(view, agreed.number)]
    head = f"change {agreed.number} is in force from step {step} on"
    if not here:
        return f"change {agreed.number} was agreed for step {step}, and all ranks have left the run", False
    if len(in_force) == len(here):
        return f"{head}, on all {len(here)} ranks", True
    steps = [view.state.step for view in here if view.state is not None]
    text = f"change {agreed.number} is agreed: it comes into force in step {step}"
    if steps:
        text += f"; ranks are in step {min(steps)}" + (f" to {max(steps)}" if max(steps) > min(steps) else "")
    text += f", and {len(in_force)} of {len(here)} have reached it"
    if steps and step is not None and max(steps) < step:
        text += f". {_NO_BOUNDARY}"
    return text, False
