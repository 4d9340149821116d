"""Runs the user's commands as pairs, watched by witnesses, and reads what each run left."""

from __future__ import annotations

import os
import shutil
import signal
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from grafter.analysis.locate.measure import RunMeasurement, measure_run
from grafter.analysis.run.run_summary import RunSummary, read_run_summary
from grafter.core.processes import describe_exit
from grafter.core.records import RankSummary
from grafter.errors import GrafterError
from grafter.store.ledger import read_run, read_summaries
from grafter.tools.doctor.notes import JobNotes, read_notes
from grafter.tools.doctor.witness.sitecustomize import DIRECTORY
from grafter.tools.launch.launcher import PairResult, run_pair

WITNESS_DIRECTORY = Path(__file__).parent / "witness"
EVERY_POINT = "name is not None"
# No point has this name. It uses `in` rather than `==`, so that no similar name is suggested.
NO_POINT = "name in ('no point of any program: grafter doctor',)"
FILTER_FIELDS = ("b2t_filter", "t2b_filter", "compare_filter")
_LAST_LINES_SHOWN = 5

Command = Sequence[str]


class Interrupted(GrafterError):
    """Ctrl-C, or a signal to end; `exit_code` as a shell reports it."""

    def __init__(self, stop_signal: int | None) -> None:
        super().__init__("interrupted")
        self.exit_code = 128 + (stop_signal or signal.SIGINT)


@dataclass(frozen=True)
class Trial:
    """One finished run of two commands."""

    result: PairResult
    notes: dict[str, JobNotes]
    key_tags: list[str] | None

    @property
    def failed_roles(self) -> list[str]:
        return [role for role, code in self.result.exit_codes.items() if code != 0]

    @cached_property
    def summaries(self) -> list[RankSummary]:
        return read_summaries(self.result.run_directory)

    @cached_property
    def measured(self) -> RunMeasurement:
        return measure_run(read_run(self.result.run_directory), self.key_tags)

    @cached_property
    def summary(self) -> RunSummary:
        return read_run_summary(self.result.run_directory)

    def error(self) -> str | None:
        """Why the run ended early: the error of a rank, or else how a job ended and its last lines."""
        errors = [summary for summary in self.summaries if summary.error is not None]
        # The job that failed first has the cause; the other one only reports what it saw of it.
        errors.sort(key=lambda summary: summary.role != self.result.failed_role)
        if errors:
            return f"{errors[0].role} rank {errors[0].role_rank}: {errors[0].error_kind}: {errors[0].error}"
        if self.result.failed_role is not None:
            return self.how_ended(self.result.failed_role)
        return None

    def how_ended(self, role: str) -> str:
        lines = self.result.last_lines.get(role, [])[-_LAST_LINES_SHOWN:]
        last = " | ".join(line.strip() for line in lines if line.strip())
        return describe_exit(self.result.exit_codes[role]) + (f"; its last lines: {last}" if last else "")


class Laboratory:
    """Runs trials. `settings` apply to all of them; each writes to its own directory in `out`."""

    def __init__(self, out: Path, settings: Mapping[str, str]) -> None:
        self.out, self._settings = out, dict(settings)
        key = (settings.get("key") or os.environ.get("GRAFTER_KEY", "")).strip()
        self._key_tags = [tag.strip() for tag in key.split(",")] if key else None

    def run(self, name: str, baseline: Command, target: Command, filters: Mapping[str, str]) -> Trial:
        """Run both commands with grafting on, and no other filters than these. Raises Interrupted and ConfigError."""
        # Empty means unset: a filter from the caller's environment must not be added.
        settings = {**self._settings, **dict.fromkeys(FILTER_FIELDS, ""), **filters}
        return self._run(name, baseline, target, settings)

    def run_as_given(self, name: str, baseline: Command, target: Command, filters: Mapping[str, str]) -> Trial:
        """Run both commands, also with the filters of the environment and the plan file."""
        return self._run(name, baseline, target, {**self._settings, **filters})

    def run_without(self, name: str, baseline: Command, target: Command) -> Trial:
        """Run both commands side by side with grafting off."""
        off = ["env", "GRAFTER_ENABLE=0"]
        settings = {"attach": "", "plan": "", **dict.fromkeys(FILTER_FIELDS, ""), "compare_filter": NO_POINT}
        return self._run(name, [*off, *baseline], [*off, *target], settings)

    def _run(self, name: str, baseline: Command, target: Command, settings: Mapping[str, str]) -> Trial:
        place = self.out / f"{name}.notes"
        place.mkdir(parents=True, exist_ok=True)
        try:
            with _witnessed(place.absolute()):
                result = run_pair(baseline, target, settings=settings, out=self.out, run_name=name, quiet=True)
            notes = read_notes(place)
        finally:
            shutil.rmtree(place, ignore_errors=True)
            # A run that recorded nothing leaves no directory.
            if self.out.is_dir() and not any(self.out.iterdir()):
                self.out.rmdir()
        if result.interrupted:
            raise Interrupted(result.stop_signal)
        return Trial(result, notes, self._key_tags)


@contextmanager
def _witnessed(directory: Path) -> Iterator[None]:
    """Jobs that start within this context inherit the witness."""
    before = {name: os.environ.get(name) for name in ("PYTHONPATH", DIRECTORY)}
    os.environ["PYTHONPATH"] = os.pathsep.join([str(WITNESS_DIRECTORY), *filter(None, [before["PYTHONPATH"]])])
    os.environ[DIRECTORY] = str(directory)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value
