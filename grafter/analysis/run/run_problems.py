"""What makes a run a failure, whatever its jobs' exit codes say. Pure; each problem is a sentence."""

from __future__ import annotations

from grafter.analysis.run.point_rows import UNMET, PointRow
from grafter.core.records import RankSummary, Role


def find_problems(rows: list[PointRow], summaries: list[RankSummary], attach: str | None = None) -> list[str]:
    """What makes a run a failure, whatever its jobs' exit codes say. attach: the patterns of `--attach`, if any."""
    problems = []
    failed = [row for row in rows if row.outcome == "failed"]
    if failed:
        problems.append(f"{_points(len(failed))} failed; the first is {failed[0].label} at step {failed[0].step}.")
    apart = [row for row in rows if row.replicas is not None]
    if apart:
        worst = max(apart, key=lambda row: row.replicas.max_abs or 0.0 if row.replicas else 0.0)
        figure = worst.replicas.max_abs if worst.replicas else None
        problems.append(
            f"the sender's replicas differ at {_points(len(apart))}, though they were declared copies; the worst is "
            f"{worst.label} at step {worst.step}" + (f" (max |d| {figure:.3g})." if figure is not None else ".")
        )
    problems += _problems_of_copies(rows) + _problems_of_unmeasured(rows) + _problems_of_late_gradients(summaries)
    by_error: dict[str, list[str]] = {}
    for summary in summaries:
        if summary.error:
            text = f"{summary.error_kind}: {summary.error}" if summary.error_kind else summary.error
            by_error.setdefault(text, []).append(f"{summary.role} {summary.role_rank}")
    problems += [f"{', '.join(ranks)} left with {text}" for text, ranks in by_error.items()]
    if summaries and all(summary.only_dumps for summary in summaries):
        if not any(summary.dumped or summary.dumps_left_out for summary in summaries):
            problems.append(_why_nothing(rows, summaries, "nothing was saved", attach))
        elif not any(summary.dumped for summary in summaries):
            problems.append("nothing was saved: all points that the dump filter matched were left out (see the notes).")
    elif not any(row.outcome in ("grafted", "compared") for row in rows):
        problems.append(_why_nothing(rows, summaries, attach=attach))
    return problems


def _problems_of_copies(rows: list[PointRow]) -> list[str]:
    """The receiver's copies; those of the sender are compared where they arrive."""
    apart = [(row, row.copies) for row in rows if row.copies is not None]
    problems = []
    if apart:
        row, worst = max(apart, key=lambda one: max(rel or 0.0 for rel in one[1].rels))
        known = [f"{rank} {rel:.3g}" for rank, rel in zip(worst.ranks, worst.rels, strict=True) if rel is not None]
        problems.append(
            f"the receiver's replicas differ at {_points(len(apart))}, though they were declared copies; the worst is "
            f"{row.label} at step {row.step}, on {' and '.join(worst.ranks)}"
            + (f" (rel to what came: {', '.join(known)})." if known else ".")
        )
    unknown = [row for row in rows if row.copies_not_compared is not None]
    if unknown:
        problems.append(
            f"not all of the receiver's replicas could be compared at {_points(len(unknown))}; the first is "
            f"{unknown[0].label} at step {unknown[0].step} ({unknown[0].copies_not_compared}). They are compared by "
            "their ledgers, so GRAFTER_DIR must be one directory for all ranks."
        )
    return problems


def _problems_of_unmeasured(rows: list[PointRow]) -> list[str]:
    """Points that met, of which nobody can say whether they are equal."""
    unmeasured = [row for row in rows if row.unmeasured is not None]
    if not unmeasured:
        return []
    first = unmeasured[0]
    why = (first.unmeasured or "").rstrip(".")
    return [
        f"{_points(len(unmeasured))} met without figures, so nothing says whether the values are equal; the first is "
        f"{first.label} at step {first.step}: {why}."
    ]


def _problems_of_late_gradients(summaries: list[RankSummary]) -> list[str]:
    """Gradients that the program made when their step was over: nobody compared them."""
    late = [summary for summary in summaries if summary.gradients_late]
    if not late:
        return []
    counts = ", ".join(f"{s.role} {s.role_rank}: {sum(s.gradients_late.values())}" for s in late)
    return [
        f"gradients came after their step had ended, and were neither grafted nor compared ({counts}); one is that of "
        f"{next(iter(late[0].gradients_late))}. Call grafter.step() after backward, in both jobs."
    ]


def _points(count: int) -> str:
    return "1 point" if count == 1 else f"{count} points"


def _why_nothing(
    rows: list[PointRow],
    summaries: list[RankSummary],
    head: str = "nothing was grafted or compared",
    attach: str | None = None,
) -> str:
    if rows and all(row.outcome in UNMET for row in rows):
        return (
            f"{head}: all {len(rows)} points were missed. A side with wait=job does not wait for the other: let the "
            "receiver wait (wait=both there), or come later, and see that entries are kept for long enough "
            "(GRAFTER_OUTBOX_SECONDS, GRAFTER_OUTBOX_BYTES)."
        )
    if rows and all(row.only_in is not None for row in rows):
        first = {
            role: next((row.name for row in rows if row.only_in == role), "none") for role in ("baseline", "target")
        }
        return (
            f"{head}: no point came in both jobs; the first of the baseline is {first['baseline']}, the first of the "
            f"target {first['target']}. Where they are the same modules under other names, `grafter plan suggest` "
            "writes a plan that maps them."
        )
    if rows:
        return f"{head}: of {len(rows)} matched points none got through."
    if not summaries:
        hint = "" if attach else " Programs that never import grafter need --attach '*'."
        return (
            f"{head}: the jobs ended before both had joined. A job joins at its first call of grafter; one that never "
            f"calls it, or fails before, keeps the other waiting.{hint} See the ends of their outputs above."
        )
    unmatched = count_unmatched(summaries)
    if any(summary.error for summary in summaries):
        return f"{head}: the run ended before its first point was complete (see above)."
    if not unmatched:
        if any(summary.hooks_never_fired for summary in summaries):
            return f"{head}: modules have hooks, and no call reached them."
        if attach:
            return f"{head}: no module was attached: --attach {attach!r} matches none (see the jobs' outputs above)."
        return f"{head}: no rank called `grafter.dump` at all."
    calls = max(max(counts.values()) for counts in unmatched.values())
    names = f"{len(unmatched)} name{'s' * (len(unmatched) != 1)}"
    return f"{head}: no filter matched a point; {names} came, up to {calls} times a rank (see the notes)."


def count_unmatched(summaries: list[RankSummary]) -> dict[str, dict[Role, int]]:
    """Name -> role -> how often the rank that called it most did."""
    counts: dict[str, dict[Role, int]] = {}
    for summary in summaries:
        for name, count in summary.unmatched.items():
            by_role = counts.setdefault(name, {})
            by_role[summary.role] = max(count, by_role.get(summary.role, 0))
    return counts
