"""Compares a command with itself: is it deterministic, and does grafting every point onto itself change nothing?"""

from __future__ import annotations

from grafter.analysis.locate.measure import Measurement
from grafter.tools.doctor.finding import Finding, fault, first_line, listed, ok, warning
from grafter.tools.doctor.notes import JobNotes, first_change, first_different, what_was_seen
from grafter.tools.doctor.pairing import describe_size
from grafter.tools.doctor.trials import Trial

_SEED = "torch.manual_seed(0), and numpy.random.seed(0) and random.seed(0) where they are used"


def judge_determinism(subject: str, trial: Trial) -> tuple[Finding, bool]:
    """(what was found, whether the command is deterministic). `trial`: the command compared with itself
    at all points.
    """
    check = f"{subject}: repeatable"
    error = trial.error()
    if error is not None:
        advice = (
            "Two copies of the command ran at once. Give each its own ports and output files; check that its points "
            "have the same order each time."
        )
        return fault(check, f"it cannot be compared with itself: {first_line(error, 400)}", advice), False
    points = trial.measured.points
    different = [point for point, at in points.items() if _differs(at)]
    baseline, target = trial.notes["baseline"], trial.notes["target"]
    change = first_change(baseline, target)
    if different:
        # Measured points cover all steps; the rows show which came first.
        first = next((row for row in trial.summary.rows if row.rel or row.nonfinite), None)
        where = f"{first.label} at step {first.step} ({describe_size(first)})" if first else str(different[0])
        text = f"not deterministic: {len(different)} of {len(points)} points differ in two copies, first {where}"
        return fault(check, text, hint(baseline, target)), False
    if change is not None:
        text = f"not deterministic: its {len(points)} points are equal in two copies, but {change}"
        return fault(check, text, hint(baseline, target)), False
    seen = f"; so are {what_was_seen(baseline)}" if baseline.processes else ""
    if not points:
        return warning(
            check,
            f"no point was paired{seen}",
            "Check that the command calls grafter, or that --attach matches its modules.",
        ), (bool(baseline.processes))
    return ok(
        check, f"deterministic: {len(points)} points are equal to the last bit in two copies, at all steps{seen}"
    ), True


def _differs(at: Measurement) -> bool:
    return not at.bitwise_equal and (at.rel is not None or not at.problems)


def hint(one: JobNotes, other: JobNotes) -> str:
    """What to do about a program that is not deterministic, from what the witnesses of two copies saw."""
    a, b = one.first_process, other.first_process
    if a is None or b is None:
        return f"Usual causes: no seed ({_SEED}), dropout, input that depends on the time, non-deterministic kernels."
    if first_different(a.first["weights"], b.first["weights"]) is not None:
        return f"The weights differ at the first call: load them, or seed before the model is made ({_SEED})."
    if first_different(a.first["inputs"], b.first["inputs"]) is not None:
        return f"The inputs of the first call differ: fix the data and its order, without time or chance ({_SEED})."
    if a.first["dropout"]:
        return f"Dropout is active in {listed(a.first['dropout'])}: call model.eval(), or seed before it ({_SEED})."
    if a.first["random_states"] != b.first["random_states"]:
        kinds = [
            kind for kind, state in a.first["random_states"].items() if b.first["random_states"].get(kind) != state
        ]
        return f"The random states differ at the first call ({', '.join(kinds)}): seed them ({_SEED})."
    if any("cuda" in device for device in a.first["devices"]):
        return "Set torch.use_deterministic_algorithms(True) and CUBLAS_WORKSPACE_CONFIG=:4096:8: a kernel may do it."
    return "Weights, inputs and random states are equal: look for time, os.urandom, threads or empty memory."


def judge_self_graft(subject: str, trial: Trial, without: JobNotes) -> Finding:
    """The finding. `trial`: the command with every point grafted b2t onto itself. `without`: the command without
    grafter.
    """
    check = f"{subject}: self-graft"
    error = trial.error()
    if error is not None:
        return fault(check, f"it failed: {first_line(error, 400)}", _LOOK.format(trial.result.run_directory))
    failed = [row for row in trial.summary.rows if row.outcome == "failed"]
    if failed:
        text = f"{len(failed)} points cannot be written; first {failed[0].label}: {first_line(failed[0].reason, 300)}"
        return fault(check, text, "Set write=return, or exclude them with the filter.")
    grafted = trial.summary.count("grafted")
    if not grafted:
        return warning(
            check, "no point was grafted", "Check that the command calls grafter, or that --attach matches its modules."
        )
    change = first_change(without, trial.notes["target"])
    if change is not None:
        text = f"grafting {grafted} points onto themselves changes the program: {change}"
        return fault(check, text, "Set write=return, or report it: a graft of equal values should change nothing.")
    if not without.processes:
        return ok(
            check, f"{grafted} points were grafted onto themselves; each was equal before, so nothing before it changed"
        )
    return ok(check, f"{grafted} points were grafted onto themselves and nothing changed: {what_was_seen(without)}")


_LOOK = "See `grafter show {}`."


# Observer effect: compares the command with grafter off and the same command armed, with hooks and no matching
# filter.


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
