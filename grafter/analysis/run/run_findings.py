"""What a reader of a run should know besides its rows, and what makes a run a failure whatever the exit codes of its
jobs say. Pure; each finding is a sentence.
"""

from __future__ import annotations

import difflib
import re
from collections import Counter

from grafter.analysis.run.point_rows import UNMET, PointRow, RankLedger
from grafter.core.records import RankSummary, Role

_NAMES_SHOWN = 8
_NUMBER = re.compile(r"(?<![A-Za-z0-9])\d+(?![A-Za-z0-9])")
# Where a point was that the two jobs did not both come to, by `PointRow.only_in`.
ONLY_IN = {
    "baseline": "only in the baseline",
    "target": "only in the target",
    "both": "in both jobs, which did not meet there",
}


def find_notes(ledgers: list[RankLedger], rows: list[PointRow], summaries: list[RankSummary]) -> list[str]:
    """What a reader should know besides the rows."""
    notes = [
        f"ranks disagree on {row.label} at step {row.step}: {row.disagreement}" for row in rows if row.disagreement
    ]
    if len(notes) > _NAMES_SHOWN:
        notes = [*notes[:_NAMES_SHOWN], f"and {len(notes) - _NAMES_SHOWN} more points on which ranks disagree"]
    if any(row.nonfinite for row in rows):
        notes.append("! marks points where the sides differ in NaN or Inf; rel and max_abs are over the finite values")
    if any(row.mismatched and not row.rel and not row.nonfinite for row in rows):
        notes.append(
            "!= marks points of which some values differ in their bits though rel is 0 or unknown: -0.0 against 0.0, "
            "or values that are no numbers"
        )
    notes += _one_sided_notes(rows) + _unmet_notes(rows) + _token_notes(ledgers)
    notes += _dump_notes(summaries) + _hook_notes(summaries) + _lost_gradient_notes(summaries)
    unmatched = count_unmatched(summaries)
    notes += [_filter_note(text, list(unmatched)) for text in _common([s.filters_never_matched for s in summaries])]
    for tag in _common([s.tags_never_seen for s in summaries]):
        notes.append(f"no point had the tag {tag}, which a filter asks for{_near(tag, _seen_tags(rows))}")
    if unmatched:
        shown = [f"{name} ({_counts(counts)})" for name, counts in list(unmatched.items())[:_NAMES_SHOWN]]
        more = f", and {len(unmatched) - _NAMES_SHOWN} more" if len(unmatched) > _NAMES_SHOWN else ""
        notes.append(f"names that no filter matched: {', '.join(shown)}{more}")
    closed = {(summary.role, summary.role_rank) for summary in summaries}
    silent = [f"{role} {rank}" for role, rank, _ in ledgers if (role, rank) not in closed]
    if silent:
        notes.append(f"ended without closing (killed, crashed, or still running): {', '.join(silent)}")
    return notes


def _one_sided_notes(rows: list[PointRow]) -> list[str]:
    """Points that only one job came to: which kinds of them, by name."""
    notes = []
    for role, where in ONLY_IN.items():
        kinds = Counter(_NUMBER.sub("*", row.name) for row in rows if row.only_in == role)
        if not kinds:
            continue
        shown = [f"{kind} ({count} call{'s' * (count != 1)})" for kind, count in kinds.most_common(_NAMES_SHOWN)]
        more = f", and {len(kinds) - _NAMES_SHOWN} more" if len(kinds) > _NAMES_SHOWN else ""
        points = "1 point was" if kinds.total() == 1 else f"{kinds.total()} points were"
        notes.append(f"{points} {where}, and not judged: {', '.join(shown)}{more}")
    return notes


def _unmet_notes(rows: list[PointRow]) -> list[str]:
    """Points that do not wait, and that did not meet: how many, and why the first did not."""
    unmet = [row for row in rows if row.outcome in UNMET]
    if not unmet:
        return []
    first = unmet[0]
    points = "1 point was" if len(unmet) == 1 else f"{len(unmet)} points were"
    return [f"{points} missed, as nobody waited; the first is {first.label} at step {first.step}: {first.reason}"]


def _token_notes(ledgers: list[RankLedger]) -> list[str]:
    """Rows addressed by token that only one side had: how many points have any, and what the first of them left out."""
    found: dict[tuple[str, str, int, str, int], str] = {}
    for role, role_rank, records in ledgers:
        for record in records:
            tokens = record.tokens
            if tokens is None or not (tokens.only_here or tokens.only_there):
                continue
            key = (record.name, repr(record.tags), record.step, record.phase, record.occurrence)
            sides = [
                f"{count} {where} ({', '.join(names)}{', say' if len(names) > 3 else ''})"
                for count, where, names in (
                    (tokens.only_here, f"only at {role} rank {role_rank}", tokens.only_here_tokens),
                    (tokens.only_there, "only at the other side", tokens.only_there_tokens),
                )
                if count
            ]
            found.setdefault(key, f"{record.name} at step {record.step}: {'; '.join(sides)}")
    if not found:
        return []
    first = next(iter(found.values()))
    return [f"points with rows whose token only one side had, which were left out: {len(found)}. {first}"]


def _dump_notes(summaries: list[RankSummary]) -> list[str]:
    """What of the dumps is not what was asked for."""
    saved = {
        role: sum(s.dumped for s in summaries if s.role == role) for role in dict.fromkeys(s.role for s in summaries)
    }
    notes = []
    if any(saved.values()):
        notes.append(f"points saved to disk: {', '.join(f'{role} {count}' for role, count in saved.items())}")
    lost = [f"{s.role} {s.role_rank}: {s.dumps_lost}" for s in summaries if s.dumps_lost]
    if lost:
        notes.append(f"points that were to be saved and are lost (a full disk, say; see the log): {', '.join(lost)}")
    for limit in ("steps", "points", "bytes"):
        left_out = [f"{s.role} {s.role_rank}: {n}" for s in summaries if (n := s.dumps_left_out.get(limit, 0))]
        if left_out:
            notes.append(f"points that the limit of {limit} kept from being saved: {', '.join(left_out)}")
    return notes


def _hook_notes(summaries: list[RankSummary]) -> list[str]:
    """Modules that have hooks and no points, since no call ran these."""
    notes = []
    for role in dict.fromkeys(summary.role for summary in summaries):
        own = [summary for summary in summaries if summary.role == role]
        bypassed = list(dict.fromkeys(path for summary in own for path in summary.modules_bypassed))
        if bypassed:
            notes.append(
                f"modules of the {role} that have no points though parts of them were called (called as "
                f"module.forward(...), which runs no hooks; or their parts called one by one): {_shown(bypassed)}"
            )
        # Where ranks have the same modules, an expert that one of them never needs is no news.
        silent = [_called(path) for path in _common([summary.hooks_never_fired for summary in own])]
        silent = [path for path in silent if path not in bypassed]
        if silent:
            notes.append(f"modules of the {role} with hooks that no call reached: {_shown(silent)}")
    return notes


def _lost_gradient_notes(summaries: list[RankSummary]) -> list[str]:
    """Gradients of weights that the program cleared before they could be points."""
    return [
        f"gradients of weights of {s.role} {s.role_rank} that came and were gone before they could be points: "
        + _shown([f"{name} ({count})" for name, count in s.gradients_lost.items()])
        for s in summaries
        if s.gradients_lost
    ]


def _called(path: str) -> str:
    return path or "root"


def _shown(names: list[str]) -> str:
    more = f", and {len(names) - _NAMES_SHOWN} more" if len(names) > _NAMES_SHOWN else ""
    return ", ".join(names[:_NAMES_SHOWN]) + more


def _counts(by_role: dict[Role, int]) -> str:
    if len(by_role) == 2 and len(set(by_role.values())) == 1:
        return f"{next(iter(by_role.values()))} calls each"
    return ", ".join(f"{role} {count}" for role, count in by_role.items())


def _common(lists: list[list[str]]) -> list[str]:
    """What all ranks say: of a pipeline, each stage alone leaves filters unmatched."""
    return [text for text in lists[0] if all(text in other for other in lists)] if lists else []


def _filter_note(text: str, names: list[str]) -> str:
    """`text` is `direction: expression`."""
    wanted = re.findall(r"'([^']*)'|\"([^\"]*)\"", text)
    near = [name for pair in wanted for name in difflib.get_close_matches(pair[0] or pair[1], names, n=2)]
    hint = f"; there are points named {', '.join(dict.fromkeys(near))}" if near else ""
    return f"a filter never matched: {text}{hint}"


def _near(tag: str, tags: list[str]) -> str:
    near = difflib.get_close_matches(tag, tags, n=1)
    return f"; did you mean {near[0]}?" if near else ""


def _seen_tags(rows: list[PointRow]) -> list[str]:
    return sorted({tag for row in rows for tag in row.tags})


# What makes a run a failure, whatever its jobs' exit codes say. Pure; each problem is a sentence.


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
