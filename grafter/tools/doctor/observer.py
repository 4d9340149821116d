"""Observer effect: compares the command with grafter off and the same command armed, with hooks and no
matching filter.
"""

from __future__ import annotations

from grafter.tools.doctor.finding import Finding, fault, ok, warning
from grafter.tools.doctor.notes import JobNotes, first_change, what_was_seen


def observed_change(without: JobNotes, armed: JobNotes) -> str | None:
    """What is not equal to the last bit; None if everything is, or if nothing was seen."""
    return first_change(without, armed) if without.processes else None


def judge_observer(
    subject: str, without: JobNotes, armed: JobNotes, unmatched_calls: int, again: str | None, repeatable: bool
) -> Finding:
    """The finding about one command.

    `unmatched_calls`: how many points the armed run reached. `again`: what differed between two runs with grafter off,
    which matters only if something changed.
    """
    check = f"{subject}: observer effect"
    if not without.processes:
        text = "no call of a torch model was seen without grafter, so this cannot be judged"
        return warning(check, text, "Compare what the command prints with and without grafter yourself.")
    change = observed_change(without, armed)
    if change is None:
        return ok(
            check,
            f"none: points were reached {unmatched_calls} times, none matched, and these are equal: "
            f"{what_was_seen(without)}",
        )
    if again is not None or not repeatable:
        text = f"cannot be judged: the command is not deterministic ({again or change})"
        return warning(check, text, "Make it deterministic first.")
    text = f"with grafter armed and no point matched, {change}; without it, two runs are equal"
    return fault(check, text, "Report it with the command: watching must not change what is watched.")
