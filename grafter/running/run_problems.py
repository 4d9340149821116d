"""What makes a run a failure, whatever its jobs' exit codes say. Pure; each problem is a sentence."""

from __future__ import annotations

from grafter.ledger import RankSummary, Role
from grafter.running.point_rows import UNMET, PointRow


def find_problems(rows: list[PointRow], summaries: list[RankSummary], attach: str | None = None) -> list[str]:
    """What makes a run a failure, whatever its jobs' exit codes say. attach: the patterns of `--attach`, if any."""
    problems = []
    failed = [row for row in rows if row.outcome == "failed"]
    if failed:
        points = "1 point" if len(failed) == 1 else f"{len(failed)} points"
        problems.append(f"{points} failed; the first is {failed[0].label} at step {failed[0].step}.")
    apart = [row for row in rows if row.replicas is not None]
    if apart:
        points = "1 point" if len(apart) == 1 else f"{len(apart)} points"
        worst = max(apart, key=lambda row: row.replicas.max_abs or 0.0 if row.replicas else 0.0)
        figure = worst.replicas.max_abs if worst.replicas else None
        problems.append(
            f"the sender's replicas differ at {points}, though they were declared copies; the worst is {worst.label} "
            f"at step {worst.step}" + (f" (max |d| {figure:.3g})." if figure is not None else ".")
        )
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
