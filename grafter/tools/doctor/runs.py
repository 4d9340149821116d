"""Runs the user's commands as pairs, with a probe in each process, and reads what each run left."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from grafter.analysis.locate.measure import RunMeasurement, measure_run
from grafter.analysis.run.run_summary import RunSummary, read_run_summary
from grafter.config.settings.field_types import FILTER_FIELDS
from grafter.core.processes import describe_exit
from grafter.core.records import RankSummary
from grafter.store.ledger import read_run, read_summaries
from grafter.tools.doctor.probe.sitecustomize import DIRECTORY
from grafter.tools.doctor.probe_log import JobLog, read_probe_logs
from grafter.tools.launch.launcher import run_pair
from grafter.tools.launch.pair_result import PairResult

PROBE_DIRECTORY = Path(__file__).parent / "probe"
EVERY_POINT = "name is not None"
# No point has this name. It uses `in` rather than `==`, so that no similar name is suggested.
NO_POINT = "name in ('no point of any program: grafter doctor',)"
# Empty means unset: a filter from the caller's environment must not be added.
_NO_FILTERS = dict.fromkeys(FILTER_FIELDS.values(), "")
_LAST_LINES_SHOWN = 5

Command = Sequence[str]


@dataclass(frozen=True)
class ProbedRun:
    """One finished run of two commands. `logs`: what the probes recorded, by role."""

    result: PairResult
    logs: dict[str, JobLog]

    @property
    def failed_roles(self) -> list[str]:
        return [role for role, code in self.result.exit_codes.items() if code != 0]

    @cached_property
    def summaries(self) -> list[RankSummary]:
        return read_summaries(self.result.run_directory)

    @cached_property
    def measured(self) -> RunMeasurement:
        return measure_run(read_run(self.result.run_directory), self.result.key_tags)

    @cached_property
    def summary(self) -> RunSummary:
        return read_run_summary(self.result.run_directory)

    def error(self) -> str | None:
        """Why the run ended early: the error of a rank, or else how a job ended and its last lines."""
        errors = [summary for summary in self.summaries if summary.error is not None]
        if errors:
            # The job that failed first has the cause; the other one only reports what it saw of it.
            first = min(errors, key=lambda summary: summary.role != self.result.failed_role)
            return f"{first.role} rank {first.role_rank}: {first.error_kind}: {first.error}"
        return self.how_ended(self.result.failed_role) if self.result.failed_role is not None else None

    def how_ended(self, role: str) -> str:
        lines = self.result.last_lines.get(role, [])[-_LAST_LINES_SHOWN:]
        last = " | ".join(line.strip() for line in lines if line.strip())
        return describe_exit(self.result.exit_codes[role]) + (f"; its last lines: {last}" if last else "")


class ProbedRuns:
    """The runs of one examination. `settings` apply to all of them; each writes to its own directory in `out`.

    Each method runs both commands to their end. It raises Interrupted and ConfigError.
    """

    def __init__(self, out: Path, settings: Mapping[str, str]) -> None:
        self._out, self._settings = out, dict(settings)

    def run(self, name: str, baseline: Command, target: Command, filters: Mapping[str, str]) -> ProbedRun:
        """A run with grafting on, and no other filters than these."""
        return self._run(name, baseline, target, {**self._settings, **_NO_FILTERS, **filters})

    def run_as_given(self, name: str, baseline: Command, target: Command, filters: Mapping[str, str]) -> ProbedRun:
        """A run that also has the filters of the environment and the plan file."""
        return self._run(name, baseline, target, {**self._settings, **filters})

    def run_without(self, name: str, baseline: Command, target: Command) -> ProbedRun:
        """A run of both commands side by side with grafting off."""
        off = ["env", "GRAFTER_ENABLE=0"]
        settings = {"attach": "", "plan": "", **_NO_FILTERS, "compare_filter": NO_POINT}
        return self._run(name, [*off, *baseline], [*off, *target], settings)

    def _run(self, name: str, baseline: Command, target: Command, settings: Mapping[str, str]) -> ProbedRun:
        logs = self._out / f"{name}.probe"
        logs.mkdir(parents=True, exist_ok=True)
        try:
            with _with_probe(logs.absolute()):
                result = run_pair(baseline, target, settings=settings, out=self._out, run_name=name, quiet=True)
            result.raise_if_interrupted()
            return ProbedRun(result, read_probe_logs(logs))
        finally:
            shutil.rmtree(logs, ignore_errors=True)
            # A run that recorded nothing leaves no directory.
            if self._out.is_dir() and not any(self._out.iterdir()):
                self._out.rmdir()


@contextmanager
def _with_probe(directory: Path) -> Iterator[None]:
    """Jobs that start within this context inherit the probe, which writes to this directory."""
    before = {name: os.environ.get(name) for name in ("PYTHONPATH", DIRECTORY)}
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [str(PROBE_DIRECTORY), before["PYTHONPATH"]]))
    os.environ[DIRECTORY] = str(directory)
    try:
        yield
    finally:
        for name, value in before.items():
            os.environ.pop(name, None)
            if value is not None:
                os.environ[name] = value
