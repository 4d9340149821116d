"""The command line: `grafter run`, `grafter show`, `grafter compare`, `grafter report`, `grafter locate`, ...

A command is one function below, registered with `app.command`; it does its work inside `errors_told()`, which turns
grafter's own errors into text and an exit code. What is slow to import (torch, rich, pydantic) is imported inside.
"""

from __future__ import annotations

import os
import re
import signal
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, NoReturn

import typer

from grafter.cli.command_options import GROUP, AttachOption, SetOption, parse_master
from grafter.cli.compare import compare_command
from grafter.cli.control import ctl_app
from grafter.cli.doctor import doctor_command
from grafter.cli.locate import locate_command
from grafter.cli.plan_suggest import plan_app
from grafter.cli.report import report_command
from grafter.cli.requests import record_command, replay_command
from grafter.errors import ConfigError, GrafterError, JoinError, UsageError
from grafter.rank.job_environment import merge_settings
from grafter.version import VERSION

if TYPE_CHECKING:
    from grafter.tools.launch.launcher import PairResult

EXIT_FAILED = 1
EXIT_USAGE = 2
_SUMMARY_ROWS = 40
_OPTION_BY_VARIABLE = {
    "GRAFTER_B2T_FILTER": "--b2t",
    "GRAFTER_T2B_FILTER": "--t2b",
    "GRAFTER_COMPARE_FILTER": "--compare",
    "GRAFTER_DUMP_FILTER": "--dump",
    "GRAFTER_TRANSFORM_PATH": "--transform",
    "GRAFTER_ATTACH": "--attach",
    "GRAFTER_RECORD": "--record",
    "GRAFTER_PEER": "--peer",
}

app = typer.Typer(
    name="grafter",
    add_completion=False,
    pretty_exceptions_enable=False,
    **GROUP,
)


class RoleChoice(str, Enum):
    baseline = "baseline"
    target = "target"


class SortChoice(str, Enum):
    time = "time"
    rel = "rel"
    max_abs = "max_abs"
    seconds = "seconds"


def main() -> None:
    """The entry point of the `grafter` program."""
    app(prog_name="grafter")


@contextmanager
def errors_told() -> Iterator[None]:
    """Tell grafter's own errors as plain text: exit code 2 for what the user wrote, 1 for what went wrong."""
    try:
        yield
    except GrafterError as error:
        print(f"grafter: {_in_options(str(error))}", file=sys.stderr)
        # A store that cannot be hosted is a port that the user chose, or left to choice.
        usage = isinstance(error, (ConfigError, UsageError, JoinError))
        raise typer.Exit(EXIT_USAGE if usage else EXIT_FAILED) from None


def _in_options(text: str) -> str:
    """Errors name variables; on the command line, what was not set by one was set by its option."""
    for variable, option in _OPTION_BY_VARIABLE.items():
        if not os.environ.get(variable, "").strip():
            text = re.sub(rf"{variable}(?![=\w])", option, text)
    return text


def _print_version(wanted: bool) -> None:
    if wanted:
        print(f"grafter {VERSION}")
        raise typer.Exit()


@app.callback()
def grafter(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    """Find where two PyTorch programs that should agree stop agreeing: run both, and let named tensors cross."""


_Command = Annotated[
    list[str] | None, typer.Argument(metavar="CMD", help="With --role: this side's command, after --.")
]
_Baseline = Annotated[str | None, typer.Option(metavar="CMD", help="The baseline job's command, as one text.")]
_Target = Annotated[str | None, typer.Option(metavar="CMD", help="The target job's command, as one text.")]
_B2t = Annotated[str | None, typer.Option(metavar="EXPR", help="Points whose baseline tensor replaces the target's.")]
_T2b = Annotated[str | None, typer.Option(metavar="EXPR", help="Points whose target tensor replaces the baseline's.")]
_Compare = Annotated[str | None, typer.Option(metavar="EXPR", help="Points to compare; nothing is written.")]
_Dump = Annotated[str | None, typer.Option(metavar="EXPR", help="Points to save to disk, grafted or not.")]
_Transform = Annotated[str | None, typer.Option(metavar="PATH", help="package.module:function or file.py:function.")]
_Plan = Annotated[Path | None, typer.Option(metavar="FILE", help="A plan file (YAML) for both jobs.")]
_Out = Annotated[
    Path | None, typer.Option(metavar="DIR", help="Where ledgers go; default grafter_out, or GRAFTER_DIR.")
]
_Name = Annotated[str | None, typer.Option(metavar="RUN_NAME", help="The run's name; default the time.")]
_Peer = Annotated[Path | None, typer.Option(metavar="DIR", help="A recording, played as the side that has no command.")]
_Record = Annotated[
    Path | None,
    typer.Option(metavar="DIR", help="Keep in DIR what is sent, for --peer later; with --role alone, without a peer."),
]
_Role = Annotated[RoleChoice | None, typer.Option(help="Run this side alone; the other is run elsewhere.")]
_HostStore = Annotated[
    int | None,
    typer.Option(
        metavar="PORT", min=0, max=65535, show_default=False, help="With --role: host the store on this port."
    ),
]
_Address = Annotated[
    str | None, typer.Option(metavar="ADDR", help="With --host-store: listen here; default 127.0.0.1 alone.")
]
_Master = Annotated[
    str | None, typer.Option(metavar="HOST:PORT", help="With --role: where the other side hosts the store.")
]


@app.command("run", short_help="Run both jobs and let tensors cross.")
def run(
    command: _Command = None,
    baseline: _Baseline = None,
    target: _Target = None,
    b2t: _B2t = None,
    t2b: _T2b = None,
    compare: _Compare = None,
    dump: _Dump = None,
    transform: _Transform = None,
    attach: AttachOption = None,
    plan: _Plan = None,
    assignments: SetOption = None,
    out: _Out = None,
    name: _Name = None,
    role: _Role = None,
    host_store: _HostStore = None,
    address: _Address = None,
    master: _Master = None,
    record: _Record = None,
    peer: _Peer = None,
) -> None:
    """Run both jobs, let tensors cross, and print what became of each point.

    Commands are split into words by a shell's quoting rules, but given to no shell: use bash -c '...' for cd, && or |.

    \b
    grafter run --baseline "python a.py" --target "torchrun --nproc-per-node 2 b.py" \\
                --b2t "name == 'attn_out'"
    grafter run --baseline "python a.py" --target "python b.py" --attach ":*DecoderLayer" \\
                --compare "name.endswith('.out')"
    grafter run --role baseline --host-store 29400 --address 10.0.0.1 \\
                --b2t "name == 'attn_out'" -- python a.py
    grafter run --role target --master 10.0.0.1:29400 \\
                --b2t "name == 'attn_out'" -- python b.py

    \b
    grafter run --role baseline --record recorded --b2t "name == 'attn_out'" -- python a.py
    grafter run --peer recorded --target "python b.py" --b2t "name == 'attn_out'"

    Exit code: 0 fine; 1 a point failed, the jobs disagreed, a job failed, or nothing was grafted or compared;
    2 wrong usage; 130 Ctrl-C.
    """
    with errors_told():
        filters = {"b2t_filter": b2t, "t2b_filter": t2b, "compare_filter": compare, "dump_filter": dump}
        patterns = ",".join(attach) if attach else None
        own = {**filters, "transform_path": transform, "attach": patterns, "plan": str(plan) if plan else None}
        settings = merge_settings({field: text for field, text in own.items() if text is not None}, assignments or [])
        if record is not None:
            _refuse({"--out": out, "--name": name}, "does not go with --record, whose DIR is where the run goes")
            settings["record"] = "1"
            out, name = record.absolute().parent, record.name
        ends = _Ends(settings, out, name, peer)
        if role is None:
            away = {"--host-store": host_store, "--address": address, "--master": master, "-- CMD": command}
            _refuse(away, "needs --role")
            _end(ends.run_pair(baseline, target))
        else:
            jobs = {"--baseline": baseline, "--target": target}
            _refuse(jobs, "does not go with --role; write the command after `--`")
            _end(ends.run_side(role.value, command or [], host_store, address, master))


@dataclass(frozen=True)
class _Ends:
    """What both ways to run have: settings by field, where the run goes, its name, the recording that is played."""

    settings: dict[str, str]
    out: Path | None
    name: str | None
    peer: Path | None

    def run_pair(self, baseline: str | None, target: str | None) -> PairResult:
        from grafter.tools.launch.launcher import run_pair

        if self.peer is not None and baseline is not None and target is not None:
            raise UsageError("--peer plays one side, so only the other has a command: --baseline or --target.")
        if (baseline is None or target is None) and (self.peer is None or baseline is target):
            raise UsageError(
                "give both --baseline CMD and --target CMD, or one of them and --peer, or --role and one command "
                "after `--`."
            )
        return run_pair(baseline, target, settings=self.settings, out=self.out, run_name=self.name, peer=self.peer)

    def run_side(
        self, role: str, command: list[str], host_store: int | None, address: str | None, master: str | None
    ) -> PairResult:
        from grafter.tools.launch.launcher import run_side

        if self.peer is not None:
            _refuse({"-- CMD": command}, "does not go with --peer: this side is the recording")
        elif not command:
            raise UsageError(f"say how to start the {role} job: grafter run --role {role} ... -- CMD")
        if host_store is None:
            _refuse({"--address": address}, "goes with --host-store")
        hosted = None if host_store is None else (address or "127.0.0.1", host_store)
        place = None if master is None else parse_master(master)
        return run_side(
            role, command, settings=self.settings, host=hosted, master=place, out=self.out, run_name=self.name,
            peer=self.peer,
        )  # fmt: skip


def _end(result: PairResult) -> NoReturn:
    """Print the summary, and exit."""
    from grafter.cli.show import report_run

    if result.stop_signal == signal.SIGPIPE:
        # Nobody reads any more; Python would complain again when it flushes stdout at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    raise typer.Exit(report_run(result, sys.stdout, limit=_SUMMARY_ROWS))


def _refuse(options: Mapping[str, object], why: str) -> None:
    for option, value in options.items():
        if value is not None and value != []:
            raise UsageError(f"{option} {why}.")


@app.command("show", short_help="Show what became of each point of a run.")
def show(
    directory: Annotated[Path, typer.Argument(metavar="DIR", help="A run, or the --out directory: its newest run.")],
    all_ranks: Annotated[bool, typer.Option("--all-ranks", help="A row per point and rank, senders too.")] = False,
    failed: Annotated[bool, typer.Option("--failed", help="Only points that failed or were skipped.")] = False,
    sort: Annotated[SortChoice, typer.Option(help="As it happened, or the largest first.")] = SortChoice.time,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object a line and nothing else.")] = False,
    limit: Annotated[int, typer.Option(metavar="N", min=0, help="At most N rows a table; 0: all.")] = 0,
) -> None:
    """Show what became of each point of a run: outcome, difference, and why points failed.

    A row is one point over all ranks: the worst receiver's worst tensor. rel = sum((x-y)^2) / sum(x^2+y^2), and the bar
    shows it on a logarithmic scale from 1e-16 to 1. In a pipe the tables are plain and not wrapped.
    """
    with errors_told():
        from grafter.analysis.run.run_summary import find_run, read_run_summary

        summary = read_run_summary(find_run(directory), all_ranks)
        if as_json:
            from grafter.cli.show import choose_rows

            for row in choose_rows(summary.rows, sort=sort.value, only_trouble=failed, limit=limit):
                print(row.as_json())
            return
        from grafter.cli.show import show_run

        show_run(summary, sys.stdout, only_trouble=failed, sort=sort.value, limit=limit, with_ranks=all_ranks)


app.command("report", short_help="Write one HTML page about a run or a comparison.")(report_command)
app.command("locate")(locate_command)
app.command("compare", short_help="Compare what two jobs dumped.")(compare_command)
app.add_typer(plan_app)
app.add_typer(ctl_app)
app.command("doctor", short_help="Is this machine, is this pair of commands, able to graft?")(doctor_command)
app.command("record", short_help="Record the requests of a server, as a proxy before it.")(record_command)
app.command("replay", short_help="Send recorded requests again, and tell what differs.")(replay_command)


if __name__ == "__main__":
    main()
