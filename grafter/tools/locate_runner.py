"""Runs the pair of `grafter locate`, and its floor, once left alone and once grafted."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.text import Text

from grafter.analysis.locate.judgement import judge
from grafter.analysis.locate.measure import RunMeasurement, measure_run
from grafter.analysis.locate.verdict import Verdict, describe_inputs_alone, verdict_as_json
from grafter.config.settings.field_types import FILTER_FIELDS
from grafter.core.records import RankSummary
from grafter.core.roles import ROLES
from grafter.errors import GrafterError, UsageError
from grafter.store.ledger import read_run, read_summaries
from grafter.store.written_files import write_whole
from grafter.tools.launch.job import split_command
from grafter.tools.launch.launcher import run_pair
from grafter.tools.launch.pair_result import PairResult, describe_unreached

ALL_POINTS = "name is not None"
_LAST_LINES_SHOWN = 10

Command = str | Sequence[str]


@dataclass(frozen=True)
class _PlannedRun:
    """One of the runs: its title, its directory's name, its target's command, and the filter that it sets."""

    title: str
    name: str
    target: list[str]
    filter_field: str


def locate(
    baseline: Command,
    target: Command,
    *,
    floor: Command | None = None,
    points: str = "",
    out: Path,
    settings: Mapping[str, str],
    console: Console,
    quiet: bool = False,
) -> Verdict:
    """Run `baseline` against `target` (and against `floor`), left alone and grafted b2t, and judge which point adds
    error.

    `points` is a filter expression that selects the points to compare and graft; empty means all. `settings` are
    GrafterConfig fields as text. The runs' ledgers and `verdict.json` go to `out`, which must not hold earlier runs.
    `console` shows progress, and what is known about the inputs as soon as it is known; the caller prints the verdict.

    Raises UsageError for settings that locate sets itself, and GrafterError for a run that failed.
    """
    _refuse_own_settings(settings)
    point_filter = points.strip() or ALL_POINTS
    # All commands are checked first: a misspelt floor should not be reported after two runs.
    baseline = split_command("baseline", baseline, os.environ)
    target = split_command("target", target, os.environ)
    runs = _plan_runs(target, None if floor is None else split_command("floor", floor, os.environ))
    _refuse_earlier_runs(out, runs)
    measured: dict[str, RunMeasurement] = {}
    notes: list[str] = []
    for number, run in enumerate(runs, start=1):
        console.print(Text(f"[{number}/{len(runs)}] {run.title}", style="cyan"))
        # Empty means unset: a filter from the caller's environment must not be added.
        filters = {**dict.fromkeys(FILTER_FIELDS.values(), ""), run.filter_field: point_filter}
        run_settings = {"stats": "full", **settings, **filters}
        result = run_pair(
            baseline, run.target, settings=run_settings, out=out, run_name=run.name, quiet=quiet, output=None
        )
        notes += _check_result(run, result)
        measured[run.name] = measure_run(read_run(result.run_directory), result.key_tags)
        if not measured[run.name].points:
            raise GrafterError(_nothing_measured(run, result, point_filter))
        if run.name == "alone":
            console.print(Text(describe_inputs_alone(measured["alone"])), soft_wrap=True)
    verdict = judge(
        measured["alone"], measured["grafted"], measured.get("floor-alone"), measured.get("floor-grafted"), notes
    )
    write_whole(out / "verdict.json", verdict_as_json(verdict) + "\n")
    return verdict


def _plan_runs(target: list[str], floor: list[str] | None) -> list[_PlannedRun]:
    runs = [
        _PlannedRun("target left alone: points are compared, nothing is written", "alone", target, "compare_filter"),
        _PlannedRun("target grafted: every point takes the baseline's value", "grafted", target, "b2t_filter"),
    ]
    if floor is not None:
        runs += [
            _PlannedRun("floor left alone", "floor-alone", floor, "compare_filter"),
            _PlannedRun("floor grafted: what each point adds without the fault", "floor-grafted", floor, "b2t_filter"),
        ]
    return runs


def _refuse_own_settings(settings: Mapping[str, str]) -> None:
    """Raise UsageError for filters, which locate sets itself: others would change the meaning of the two runs."""
    taken = [field for field in settings if field in FILTER_FIELDS.values()]
    if taken:
        raise UsageError(
            f"`grafter locate` sets {', '.join(taken)} itself for each of its runs. "
            "Leave it out; to narrow the points use --points EXPR."
        )


def _refuse_earlier_runs(out: Path, runs: Sequence[_PlannedRun]) -> None:
    # Ledgers are appended to: two runs in one directory would be judged as one.
    earlier = [run.name for run in runs if (out / run.name).exists()]
    if earlier:
        raise UsageError(f"{out} already holds the runs {', '.join(earlier)}. Give another --out, or remove it.")


def _check_result(run: _PlannedRun, result: PairResult) -> list[str]:
    """Notes about a run that can be used; raises GrafterError for one that cannot."""
    result.raise_if_interrupted()
    summaries = read_summaries(result.run_directory)
    failed = {role: code for role, code in result.exit_codes.items() if code != 0}
    errors = [summary for summary in summaries if summary.error is not None]
    closed_roles = {summary.role for summary in summaries}
    if errors or (failed and closed_roles != set(ROLES)):
        raise GrafterError(_run_failed(run, result, errors))
    # A script that checks its own result ends with an error because of the very fault that locate looks for.
    return [
        f"in the run `{run.name}` the {role} job ended with exit code {code}, after it had closed grafter normally"
        for role, code in failed.items()
    ]


def _run_failed(run: _PlannedRun, result: PairResult, errors: Sequence[RankSummary]) -> str:
    if result.unreached:
        return f"the run `{run.name}` failed, so nothing can be judged. {describe_unreached(result.unreached)}"
    codes = ", ".join(f"{role} {code}" for role, code in result.exit_codes.items())
    lines = [f"the run `{run.name}` failed, so nothing can be judged (exit codes: {codes})."]
    # The job that failed first has the cause; the other one only reports what it saw of it.
    errors = sorted(errors, key=lambda summary: summary.role != result.failed_role)
    lines += [f"{s.role} rank {s.role_rank}: {s.error_kind}: {s.error}" for s in errors[:2]]
    if result.failed_role is not None and all(summary.role != result.failed_role for summary in errors):
        # Its ranks reported nothing to grafter, so the reason is in the output of the job itself.
        lines.append(f"The {result.failed_role} job failed first. Its last lines:")
        lines += [f"    {line}" for line in result.last_lines.get(result.failed_role, [])[-_LAST_LINES_SHOWN:]]
    lines.append(f"What was recorded is in {result.run_directory}.")
    return "\n".join(lines)


def _nothing_measured(run: _PlannedRun, result: PairResult, point_filter: str) -> str:
    if result.unreached:
        return f"in the run `{run.name}` nothing was compared or grafted. {describe_unreached(result.unreached)}"
    return (
        f"in the run `{run.name}` no point met its other side under `{point_filter}`: nothing was compared or grafted. "
        f"Do both scripts call grafter.dump (or does --attach name their modules), and does the filter match their "
        f"tags? {result.run_directory} holds what each rank saw."
    )
