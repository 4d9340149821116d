"""The end of `grafter run`: the summary table, what went wrong, and the exit code."""

from __future__ import annotations

import signal
from dataclasses import replace
from typing import TextIO

from grafter.analysis.run.run_problems import find_problems
from grafter.analysis.run.run_summary import RunSummary, read_run_summary
from grafter.cli.show import show_run
from grafter.core.processes.exit import describe_exit
from grafter.store.ledger import read_summaries
from grafter.tools.launch.launcher import PairResult


def report_run(result: PairResult, stream: TextIO, limit: int = 0) -> int:
    """Print what the run recorded; return the exit code of `grafter run`: 0, 1, or 128 + the signal that ended it."""
    summary = _read(result)
    if result.stop_signal is None:
        problems = [*_job_problems(result), *_recording_problems(result), *summary.problems]
    else:
        # How the jobs ended, and that little was grafted, is then no news.
        problems = [f"the run was ended by {signal.Signals(result.stop_signal).name}."]
        problems += find_problems(summary.rows, []) if summary.rows else []
    show_run(replace(summary, problems=problems), stream, limit=limit)
    stream.flush()
    if result.stop_signal is not None:
        return 128 + result.stop_signal
    return 1 if problems else 0


def _read(result: PairResult) -> RunSummary:
    if result.run_directory.is_dir():
        return read_run_summary(result.run_directory)
    # Taken away because nothing was written into it.
    return RunSummary(result.run_directory, [], [], find_problems([], [], result.attach))


def _recording_problems(result: PairResult) -> list[str]:
    """A graft later would skip what is not there now."""
    if not result.is_recorded or not result.run_directory.is_dir():
        return []
    lost = [
        f"{summary.role} {summary.role_rank} lost {summary.dumps_lost} point{'s' * (summary.dumps_lost != 1)}"
        for summary in read_summaries(result.run_directory)
        if summary.dumps_lost
    ]
    return [f"the recording is not complete: {', '.join(lost)} (a full disk? see the log)."] if lost else []


def _job_problems(result: PairResult) -> list[str]:
    """Which job failed by itself; one that the launcher ended is not to blame for how it ended."""
    problems = []
    if result.failed_role is not None:
        problems.append(f"the {result.failed_role} job {describe_exit(result.exit_codes[result.failed_role])}.")
    for role, code in result.exit_codes.items():
        if role == result.failed_role or (code == 0 and role not in result.ended_roles):
            continue
        if role in result.ended_roles:
            problems.append(f"the {role} job was ended by grafter ({describe_exit(code)}).")
        else:
            problems.append(f"the {role} job {describe_exit(code)}, after that.")
    return problems
