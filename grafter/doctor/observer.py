"""Observer effect: the command with grafter off, against the same one armed with hooks and no filter that matches."""

from __future__ import annotations

from grafter.doctor.finding import Finding, fault, ok, warning
from grafter.doctor.notes import JobNotes, first_change, what_was_seen


def observed_change(without: JobNotes, armed: JobNotes) -> str | None:
    """What is not the same to the last bit; None where nothing is, or nothing was seen."""
    return first_change(without, armed) if without.processes else None


def judge_observer(
    subject: str, without: JobNotes, armed: JobNotes, unmatched_calls: int, again: str | None, repeatable: bool
) -> Finding:
    """`unmatched_calls`: how many points came in the armed run. `again`: what two runs with grafter off did not do
    alike, which matters only where something changed."""
    check = f"{subject}: observer effect"
    if not without.processes:
        text = "no call of a torch model was seen without grafter, so it cannot be judged"
        return warning(check, text, "Compare what the command prints with and without grafter yourself.")
    change = observed_change(without, armed)
    if change is None:
        return ok(
            check, f"none: points came {unmatched_calls} times, none matched, and equal are {what_was_seen(without)}"
        )
    if again is not None or not repeatable:
        text = f"cannot be judged: the command is not deterministic ({again or change})"
        return warning(check, text, "Make it deterministic first.")
    text = f"with grafter armed and no point matched, {change}; without it, two runs are equal"
    return fault(check, text, "Report it with the command: watching must not change what is watched.")
