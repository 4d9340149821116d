"""`grafter doctor` on the command line."""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from grafter.cli.command_options import (
    EXIT_FAILED,
    EXIT_INTERRUPTED,
    SetOption,
    errors_reported,
    parse_master,
    settings_by_field,
)
from grafter.errors import UsageError

if TYPE_CHECKING:
    from grafter.cli.doctor_page import Page
    from grafter.tools.doctor.finding import Finding


_Baseline = Annotated[str | None, typer.Option(metavar="CMD", help="Check this command, as the baseline.")]
_Target = Annotated[str | None, typer.Option(metavar="CMD", help="Check this command, as the target.")]
_Graft = Annotated[str | None, typer.Option(metavar="EXPR", help="For the run of the pair, as in grafter run.")]
_Compare = Annotated[
    str | None, typer.Option(metavar="EXPR", help="For the run of the pair. Default with no filter: all points.")
]
_Transform = Annotated[str | None, typer.Option(metavar="PATH", help="As in grafter run.")]
_Attach = Annotated[list[str] | None, typer.Option(metavar="PATTERN", help="As in grafter run; may be repeated.")]
_Plan = Annotated[Path | None, typer.Option(metavar="FILE", help="A plan file (YAML), as in grafter run.")]
_Out = Annotated[Path | None, typer.Option(metavar="DIR", help="For ledgers. Default: doctor-<time> in grafter_out.")]
_Master = Annotated[
    str | None,
    typer.Option(metavar="HOST:PORT", help="Check whether the store that another machine hosts can be reached."),
]
_Json = Annotated[bool, typer.Option("--json", help="Print the findings as JSON and nothing else.")]


def doctor_command(
    baseline: _Baseline = None,
    target: _Target = None,
    b2t: _Graft = None,
    t2b: _Graft = None,
    compare: _Compare = None,
    transform: _Transform = None,
    attach: _Attach = None,
    plan: _Plan = None,
    assignments: SetOption = None,
    out: _Out = None,
    master: _Master = None,
    as_json: _Json = False,
) -> None:
    """Check whether this machine and this pair of commands work with grafter.

    Alone it checks the machine. With --baseline and --target (or one of them) it also runs the commands, five to
    seven times as pairs: without grafter, armed, each against itself, and one against the other.

    \b
    grafter doctor
    grafter doctor --master 10.0.0.1:29400
    grafter doctor --baseline "python a.py" --target "torchrun --nproc-per-node 2 b.py" --attach "*"

    Exit code: 0 no fault; 1 a fault; 2 wrong usage; 130 Ctrl-C.
    """
    # These imports are slow (pydantic, rich), and every command of the program imports this file.
    from grafter.cli.console import make_console
    from grafter.cli.doctor_page import Page
    from grafter.cli.doctor_page import as_json as findings_as_json
    from grafter.tools.doctor.finding import has_fault

    page = Page(make_console(sys.stderr if as_json else sys.stdout))
    findings: list[Finding] = []
    with errors_reported("grafter doctor"):
        settings = settings_by_field(
            assignments, attach, b2t_filter=b2t, t2b_filter=t2b, compare_filter=compare, transform_path=transform,
            plan=plan,
        )  # fmt: skip
        commands = {role: text for role, text in (("baseline", baseline), ("target", target)) if text is not None}
        if not commands and settings:
            raise UsageError("filters, --attach, --plan and --set go with --baseline CMD and --target CMD.")
        try:
            _check(commands, settings, out, None if master is None else parse_master(master), findings, page)
        except KeyboardInterrupt:
            raise typer.Exit(EXIT_INTERRUPTED) from None
    if as_json:
        typer.echo(findings_as_json(findings))
    else:
        page.verdict(findings)
    raise typer.Exit(EXIT_FAILED if has_fault(findings) else 0)


def _check(
    commands: dict[str, str],
    settings: dict[str, str],
    out: Path | None,
    master: tuple[str, int] | None,
    findings: list[Finding],
    page: Page,
) -> None:
    """Check the machine and, if it has no fault, the commands.

    Findings are shown and added to `findings` as they are made, so that an interruption loses none.
    """
    from grafter.tools.doctor.finding import has_fault
    from grafter.tools.doctor.machine import check_machine

    place = out or Path(os.environ.get("GRAFTER_DIR", "").strip() or "grafter_out")
    page.heading("this machine")
    for finding in check_machine(place, master):
        findings.append(finding)
        page.show(finding)
    if commands and not has_fault(findings):
        _check_commands(commands, settings, out or place / time.strftime("doctor-%Y%m%d-%H%M%S"), findings, page)
    elif commands:
        page.heading("the commands were not run: remove the faults above first.")


def _check_commands(
    commands: dict[str, str], settings: dict[str, str], out: Path, findings: list[Finding], page: Page
) -> None:
    from grafter.config.settings.field_types import FILTER_FIELDS
    from grafter.tools.doctor.checks import CommandChecks

    checks = CommandChecks(
        commands,
        out=out,
        settings={field: value for field, value in settings.items() if field not in FILTER_FIELDS.values()},
        filters={field: value for field, value in settings.items() if field in FILTER_FIELDS.values()},
        report_progress=page.progress,
    )
    page.heading("the commands" if len(commands) > 1 else "the command")
    for finding in checks.findings():
        findings.append(finding)
        page.show(finding)
