"""Checks the user's commands: runs them in this order, and says what follows from each run.

without     both, grafting off: do they run at all; do they start from the same state
armed       both, hooks placed and no filter that matches: observer effect, names
repeat      each against itself, all points compared: is it deterministic
self-graft  each against itself, all points grafted b2t: does that change nothing
pair        both, with the user's filters, or all points compared
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

from grafter.core.roles import ROLES, Role
from grafter.rank.job_environment import ANY_MASTER, job_environment, what_defeats_attach
from grafter.tools.doctor.determinism import judge_determinism, judge_observer, judge_self_graft
from grafter.tools.doctor.finding import Finding, fault, first_line, ok
from grafter.tools.doctor.initial_state import judge_initial_state
from grafter.tools.doctor.pair_checks import common_points, judge_names, judge_pair, names_by_role
from grafter.tools.doctor.probe_log import first_change
from grafter.tools.doctor.runs import EVERY_POINT, NO_POINT, ProbedRun, ProbedRuns
from grafter.tools.launch.job import split_command

_CALL = "Give --attach PATTERN, such as --attach '*', or call grafter.attach(model) or grafter.dump(...) in it."


class CommandChecks:
    """The checks of one or two commands.

    `commands` by role, one or both, as text or words. `filters` by field, those that the user gave; `settings` all
    other settings. `report_progress` is called with the title of each run. The constructor raises ConfigError or
    UsageError, before anything is started.
    """

    def __init__(
        self,
        commands: Mapping[str, str],
        *,
        out: Path,
        settings: Mapping[str, str],
        filters: Mapping[str, str],
        report_progress: Callable[[str], None],
    ) -> None:
        split = {role: split_command(role, text, os.environ) for role, text in commands.items()}
        only = next(iter(split.values()))
        self._commands = {role: split.get(role, only) for role in ROLES}
        self._is_pair = self._commands["baseline"] != self._commands["target"]
        # The name of each command in findings -> the role that it has in the runs of both.
        alone = "command" if len(split) == 1 else "both"
        self._subjects: dict[str, Role] = {role: role for role in ROLES} if self._is_pair else {alone: "baseline"}
        self._filters, self._report_progress = filters, report_progress
        self._attach, self._has_filter = _read_settings({**settings, **filters})
        self._runs = ProbedRuns(out, settings)
        self._planned_runs = 2 + 2 * len(self._subjects) + self._is_pair
        self._started_runs = 0

    def findings(self) -> Iterator[Finding]:
        """The findings, each as soon as it is known. Raises Interrupted."""
        defeated = list(self._judge_commands())
        yield from defeated
        if defeated:
            return
        self._announce("without grafter")
        without = self._runs.run_without("without", **self._commands)
        yield from self._judge_start(without)
        if without.failed_roles:
            return
        self._announce("armed, and no point matches")
        armed = self._runs.run("armed", **self._commands, filters={"compare_filter": NO_POINT})
        lost = list(self._judge_reach(without, armed))
        yield from lost
        if lost:
            return
        if self._is_pair:
            yield from judge_initial_state(without.logs["baseline"], without.logs["target"])
            yield from judge_names(armed)
        for subject, role in self._subjects.items():
            yield from self._check_alone(subject, role, without, armed)
        if self._is_pair:
            yield from judge_pair(self._run_pair(armed))

    def _announce(self, title: str) -> None:
        self._started_runs += 1
        self._report_progress(f"[{self._started_runs} of {max(self._started_runs, self._planned_runs)}] {title}")

    def _judge_commands(self) -> Iterator[Finding]:
        for subject, role in self._subjects.items() if self._attach is not None else ():
            defeat = what_defeats_attach(self._commands[role])
            if defeat is not None:
                text = f"--attach cannot reach it: its command has {defeat}"
                yield fault(f"{subject}: command", text, "Remove it, or call grafter.attach(model) in the program.")

    def _judge_start(self, without: ProbedRun) -> Iterator[Finding]:
        for subject, role in self._subjects.items():
            check = f"{subject}: runs"
            if role in without.result.ended_roles:
                continue
            if without.result.exit_codes[role] != 0:
                text = f"it fails without grafter: {first_line(without.how_ended(role), 600)}"
                yield fault(check, text, "Repair the command first; start it by hand to see all of its output.")
                continue
            ranks = len(without.logs[role].processes)
            seen = f"a model is called in {ranks} process{'es' * (ranks != 1)}" if ranks else "no torch model is called"
            yield ok(check, f"it runs to its end without grafter; {seen}")

    def _judge_reach(self, without: ProbedRun, armed: ProbedRun) -> Iterator[Finding]:
        """Faults if grafter did not reach points in both commands."""
        silent = [(subject, role) for subject, role in self._subjects.items() if not armed.logs[role].uses_grafter]
        for subject, role in silent:
            yield self._why_not_reached(subject, role, without)
        if silent:
            return
        error = armed.error()
        if error is not None:
            text = f"with grafter on, the run fails: {first_line(error, 600)}"
            yield fault("armed run", text, f"`grafter show {armed.result.run_directory}` shows what was recorded.")
            return
        names = names_by_role(armed.summaries)
        other_pattern = "Give another --attach PATTERN, such as '*': it matches no module that is called."
        for subject, role in self._subjects.items():
            if not names[role]:
                text = "grafter is on, but no point was reached"
                yield fault(f"{subject}: points", text, other_pattern if self._attach else _CALL)

    def _why_not_reached(self, subject: str, role: Role, without: ProbedRun) -> Finding:
        log = without.logs[role]
        if not log.pythons:
            text = "all of its Pythons ignore PYTHONPATH (python -I, -E or -S; a script that sets it)"
            advice = "Remove that, or call grafter.attach(model) in the program."
        elif self._attach is None:
            text, advice = "the program never calls grafter", _CALL
        elif not log.processes:
            text = "it calls no torch model that has parameters"
            advice = "Call grafter.dump in it where tensors are computed."
        else:
            text, advice = "--attach had no effect in it", "Check what it prints under `grafter run --attach ...`."
        return fault(f"{subject}: reach", text, advice)

    def _check_alone(self, subject: str, role: Role, without: ProbedRun, armed: ProbedRun) -> Iterator[Finding]:
        """Check one command alone: against itself, and with and without grafter."""
        command = self._commands[role]
        self._announce(f"the {subject} against itself, all points compared")
        repeated = self._runs.run(f"{subject}-repeat", command, command, {"compare_filter": EVERY_POINT})
        finding, repeatable = judge_determinism(subject, repeated)
        yield finding
        seen, observed, again = without.logs[role], armed.logs[role], None
        if repeatable and seen.processes and first_change(seen, observed) is not None:
            # One more run distinguishes an observer effect from a program that is not deterministic.
            self._announce(f"the {subject} without grafter, twice")
            alone = self._runs.run_without(f"{subject}-without", command, command)
            again = first_change(alone.logs["baseline"], alone.logs["target"])
        points = sum(names_by_role(armed.summaries)[role].values())
        yield judge_observer(subject, seen, observed, points, again, repeatable)
        if not repeatable:
            return
        self._announce(f"the {subject} against itself, every point grafted")
        grafted = self._runs.run(f"{subject}-self-graft", command, command, {"b2t_filter": EVERY_POINT})
        yield judge_self_graft(subject, grafted, seen)

    def _run_pair(self, armed: ProbedRun) -> ProbedRun:
        if self._has_filter:
            self._announce("the pair, with the filters that are given")
            return self._runs.run_as_given("pair", **self._commands, filters=self._filters)
        self._announce("the pair, all points compared")
        return self._runs.run("pair", **self._commands, filters={"compare_filter": common_points(armed)})


def _read_settings(settings: Mapping[str, str]) -> tuple[str | None, bool]:
    """(pattern of --attach, whether there is a filter), wherever they are set."""
    from grafter.config.settings.config import GrafterConfig

    environment = job_environment(os.environ, "target", settings, master=ANY_MASTER)
    # With grafting off, because a filter may be missing here.
    config = GrafterConfig.from_environment({**environment, "GRAFTER_ENABLE": "0"})
    return config.attach, bool(config.filters)
