"""Examines the user's commands: trials in order, and what follows from each.

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

from grafter.rank.job_environment import job_environment, what_defeats_attach
from grafter.tools.doctor.finding import Finding, fault, first_line, ok
from grafter.tools.doctor.notes import first_change, judge_likeness
from grafter.tools.doctor.pairing import common_points, judge_names, judge_pair, names_by_role
from grafter.tools.doctor.repeats import judge_determinism, judge_observer, judge_self_graft, observed_change
from grafter.tools.doctor.trials import EVERY_POINT, NO_POINT, Laboratory, Trial
from grafter.tools.launch.job import split_command

ROLES = ("baseline", "target")


class Examination:
    """The examination of one or two commands.

    `commands` by role, one or both, as text or words. `filters` by field, those that the user gave; `settings` all
    other settings. `tell` is called with the title of each run. The constructor raises ConfigError or UsageError,
    before anything is started.
    """

    def __init__(
        self,
        commands: Mapping[str, str],
        *,
        out: Path,
        settings: Mapping[str, str],
        filters: Mapping[str, str],
        tell: Callable[[str], None],
    ) -> None:
        self._commands = {role: split_command(role, text, os.environ) for role, text in commands.items()}
        only = next(iter(self._commands.values()))
        self._baseline = self._commands.get("baseline", only)
        self._target = self._commands.get("target", only)
        self._filters, self._tell = filters, tell
        self._attach, self._has_filter = self._read_settings({**settings, **filters})
        self._laboratory = Laboratory(out, settings)
        self._subjects = self._find_subjects()
        self._run_count = 2 + 2 * len(self._subjects) + self._is_pair
        self._runs = 0

    def findings(self) -> Iterator[Finding]:
        """The findings, each as soon as it is known. Raises Interrupted."""
        defeated = list(self._judge_commands())
        yield from defeated
        if defeated:
            return
        without = self._start("without", "without grafter")
        yield from self._judge_start(without)
        if without.failed_roles:
            return
        armed = self._start("armed", "armed, and no point matches")
        lost = list(self._judge_reach(without, armed))
        yield from lost
        if lost:
            return
        if self._is_pair:
            yield from judge_likeness(without.notes["baseline"], without.notes["target"])
            yield from judge_names(armed)
        for subject, role in self._subjects.items():
            yield from self._examine_alone(subject, role, without, armed)
        if self._is_pair:
            yield from judge_pair(self._run_pair(armed))

    # Before anything runs.

    def _read_settings(self, settings: Mapping[str, str]) -> tuple[str | None, bool]:
        """(pattern of --attach, whether there is a filter), wherever they are set."""
        from grafter.config.settings.config import GrafterConfig

        environment = job_environment(
            os.environ, "target", settings, master=("127.0.0.1", 1), directory=None, run_name=None
        )
        # With grafting off, because a filter may be missing here.
        config = GrafterConfig.from_environment({**environment, "GRAFTER_ENABLE": "0"})
        return config.attach, bool(config.filters)

    @property
    def _is_pair(self) -> bool:
        return self._baseline != self._target

    def _find_subjects(self) -> dict[str, str]:
        """The name of each command in findings -> the role that it has in the runs of both."""
        if self._is_pair:
            return {role: role for role in ROLES}
        return {"command" if len(self._commands) == 1 else "both": "baseline"}

    def _judge_commands(self) -> Iterator[Finding]:
        for subject, role in self._subjects.items() if self._attach is not None else ():
            defeat = what_defeats_attach(self._command(role))
            if defeat is not None:
                text = f"--attach cannot reach it: its command has {defeat}"
                yield fault(f"{subject}: command", text, "Remove it, or call grafter.attach(model) in the program.")

    # The runs.

    def _start(self, name: str, title: str) -> Trial:
        self._announce(title)
        if name == "without":
            return self._laboratory.run_without(name, self._baseline, self._target)
        return self._laboratory.run(name, self._baseline, self._target, {"compare_filter": NO_POINT})

    def _announce(self, title: str) -> None:
        self._runs += 1
        self._tell(f"[{self._runs} of {max(self._runs, self._run_count)}] {title}")

    def _command(self, role: str) -> list[str]:
        return self._baseline if role == "baseline" else self._target

    def _run_pair(self, armed: Trial) -> Trial:
        if self._has_filter:
            self._announce("the pair, with the filters that are given")
            return self._laboratory.run_as_given("pair", self._baseline, self._target, self._filters)
        self._announce("the pair, all points compared")
        filters = {"compare_filter": common_points(armed)}
        return self._laboratory.run("pair", self._baseline, self._target, filters)

    def _examine_alone(self, subject: str, role: str, without: Trial, armed: Trial) -> Iterator[Finding]:
        """Examine one command alone: against itself, and with and without grafter."""
        command = self._command(role)
        self._announce(f"the {subject} against itself, all points compared")
        repeated = self._laboratory.run(f"{subject}-repeat", command, command, {"compare_filter": EVERY_POINT})
        finding, repeatable = judge_determinism(subject, repeated)
        yield finding
        again = None
        if repeatable and observed_change(without.notes[role], armed.notes[role]) is not None:
            # One more run distinguishes an observer effect from a program that is not deterministic.
            self._announce(f"the {subject} without grafter, twice")
            alone = self._laboratory.run_without(f"{subject}-without", command, command)
            again = first_change(alone.notes["baseline"], alone.notes["target"])
        points = sum(names_by_role(armed.summaries)[role].values())
        yield judge_observer(subject, without.notes[role], armed.notes[role], points, again, repeatable)
        if not repeatable:
            return
        self._announce(f"the {subject} against itself, every point grafted")
        grafted = self._laboratory.run(f"{subject}-self-graft", command, command, {"b2t_filter": EVERY_POINT})
        yield judge_self_graft(subject, grafted, without.notes[role])

    # What the first two runs show.

    def _judge_start(self, without: Trial) -> Iterator[Finding]:
        for subject, role in self._subjects.items():
            check = f"{subject}: runs"
            code = without.result.exit_codes[role]
            if role in without.result.ended_roles:
                continue
            if code != 0:
                text = f"it fails without grafter: {first_line(without.how_ended(role), 600)}"
                yield fault(check, text, "Repair the command first; start it by hand to see all of its output.")
                continue
            ranks = len(without.notes[role].processes)
            seen = f"a model is called in {ranks} process{'es' * (ranks != 1)}" if ranks else "no torch model is called"
            yield ok(check, f"it runs to its end without grafter; {seen}")

    def _judge_reach(self, without: Trial, armed: Trial) -> Iterator[Finding]:
        """Faults if grafter did not reach points in both commands."""
        silent = [(subject, role) for subject, role in self._subjects.items() if not armed.notes[role].uses_grafter]
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
        for subject, role in self._subjects.items():
            if not names[role]:
                text = "grafter is on, but no point was reached"
                advice = (
                    "Give another --attach PATTERN, such as '*': it matches no module that is called."
                    if self._attach
                    else _CALL
                )
                yield fault(f"{subject}: points", text, advice)

    def _why_not_reached(self, subject: str, role: str, without: Trial) -> Finding:
        notes = without.notes[role]
        if not notes.pythons:
            text = "all of its Pythons ignore PYTHONPATH (python -I, -E or -S; a script that sets it)"
            advice = "Remove that, or call grafter.attach(model) in the program."
        elif self._attach is None:
            text, advice = "the program never calls grafter", _CALL
        elif not notes.processes:
            text, advice = (
                "it calls no torch model that has parameters",
                "Call grafter.dump in it where tensors are computed.",
            )
        else:
            text, advice = "--attach had no effect in it", "Check what it prints under `grafter run --attach ...`."
        return fault(f"{subject}: reach", text, advice)


_CALL = "Give --attach PATTERN, such as --attach '*', or call grafter.attach(model) or grafter.dump(...) in it."
