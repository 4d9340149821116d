"""What the pair's own points show: names that only one side has, filters that match nothing, points that do not fit."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator

from grafter.analysis.run.point_rows import PointRow
from grafter.analysis.run.run_summary import describe_counts
from grafter.core.records import RankSummary
from grafter.tools.doctor.finding import Finding, fault, first_line, listed, ok, warning
from grafter.tools.doctor.trials import EVERY_POINT, Trial

# Names, by the last part of a point's name, of the values that tell a model where its tokens are.
_POSITIONS = re.compile(r"(.*[._])?(input_ids|positions?|position_ids|cache_position|cu_seqlens\w*|\w*mask)", re.I)
_REASONS_SHOWN = 3


def names_by_role(summaries: Iterable[RankSummary]) -> dict[str, dict[str, int]]:
    """Role -> name -> calls on the rank with the most calls, for a run in which no filter matched."""
    names: dict[str, dict[str, int]] = {"baseline": {}, "target": {}}
    for summary in summaries:
        counts = names[summary.role]
        for name, count in summary.unmatched.items():
            counts[name] = max(count, counts.get(name, 0))
    return names


def judge_names(armed: Trial) -> Iterator[Finding]:
    """Judge the names of points. `armed`: the run of both commands in which no filter matched."""
    names = names_by_role(armed.summaries)
    baseline, target = names["baseline"], names["target"]
    common = [name for name in baseline if name in target]
    if not common:
        text = f"none in common: baseline {listed(baseline, 3) or 'none'}; target {listed(target, 3) or 'none'}"
        advice = (
            "Give the points the same names in both: in the code, or by `names:` in the plan file "
            "(docs/configuration.md)."
        )
        yield fault("names", text, advice)
        return
    for role, own, others in (("baseline", baseline, target), ("target", target, baseline)):
        single = [name for name in own if name not in others]
        if single:
            text = f"{len(single)} only in the {role}: {listed(single)}"
            yield warning("names", text, "Exclude them with the filter, or map them in the plan file.")
    uneven = [f"{name} ({baseline[name]} / {target[name]} calls)" for name in common if baseline[name] != target[name]]
    if uneven:
        advice = (
            "Check that both run the same number of steps and layers: a job waits for a point that the "
            "other never reaches."
        )
        yield warning("names", f"different numbers of calls: {listed(uneven)}", advice)
    if len(common) == len(baseline) == len(target) and not uneven:
        yield ok("names", f"{len(common)} on both sides, the same number of times")
    yield from _judge_modules(armed.summaries)


def _judge_modules(summaries: Iterable[RankSummary]) -> Iterator[Finding]:
    for role in ("baseline", "target"):
        own = [summary for summary in summaries if summary.role == role]
        silent = set.intersection(*(set(summary.hooks_never_fired) for summary in own)) if own else set()
        if silent:
            advice = "They may be called in another way (compiled, or by a kernel): choose a module around them."
            yield warning("hooks", f"{role}: {len(silent)} modules were never called: {listed(sorted(silent))}", advice)
        alone = set.intersection(*(set(summary.modules_only_here) for summary in own)) if own else set()
        if alone:
            text = f"{len(alone)} modules only in the {role}: {listed(sorted(alone))}"
            yield warning("modules", text, "Map them in the plan file, or attach less.")


def common_points(armed: Trial) -> str:
    """The filter for all points whose name both sides have."""
    names = names_by_role(armed.summaries)
    common = [name for name in names["baseline"] if name in names["target"]]
    if len(common) == len(names["baseline"]) == len(names["target"]):
        return EVERY_POINT
    return f"name in ({', '.join(map(repr, common))},)"


def judge_pair(trial: Trial) -> Iterator[Finding]:
    """Judge the run of the pair. `trial`: the pair, with the user's filters or with all points compared."""
    look = f"`grafter show {trial.result.run_directory}` shows each point."
    summary = trial.summary
    missed = [note for note in summary.notes if note.startswith(("a filter never matched", "no point had the tag"))]
    for note in missed:
        yield fault("filter", note, "Correct it: a filter is about `name` and the tags of a point (docs/filters.md).")
    error = trial.error()
    if error is not None:
        yield fault("pair", first_line(error, 500), f"{look} Both sides must reach the same points in the same order.")
    failed = [row for row in summary.rows if row.outcome == "failed"]
    skipped = [row for row in summary.rows if row.outcome == "skipped"]
    yield from _judge_trouble("failed", failed)
    yield from _judge_trouble("skipped", skipped)
    if not any(row.outcome in ("grafted", "compared") for row in summary.rows):
        if not missed and error is None and not failed and not skipped:
            yield fault("pair", "no point was paired", "Give a filter that both sides' points match.")
        return
    yield from _judge_positions(summary.rows)
    if error is None:
        yield ok("pair", f"{describe_counts(summary)}; {_first_difference(summary.rows)}. {look}")


def _judge_trouble(outcome: str, rows: list[PointRow]) -> Iterator[Finding]:
    by_reason: dict[str, list[PointRow]] = {}
    for row in rows:
        by_reason.setdefault(first_line(row.reason, 300), []).append(row)
    for reason, same in list(by_reason.items())[:_REASONS_SHOWN]:
        text = f"{len(same)} {outcome}, first {same[0].label}: {reason}"
        advice = "Declare how the two fit (dims=, a transform, the plan file), or exclude them with the filter."
        yield fault("points", text, advice) if outcome == "failed" else warning("points", text, advice)


def _judge_positions(rows: Iterable[PointRow]) -> Iterator[Finding]:
    told = [row for row in rows if _POSITIONS.fullmatch(row.name) and row.rel is not None]
    wrong = [row for row in told if row.rel or row.nonfinite]
    if wrong:
        text = f"{wrong[0].label} differs at step {wrong[0].step}"
        yield fault(
            "positions", text, "Feed both the same tokens, positions and masks first: all later values depend on them."
        )
    elif told:
        yield ok("positions", f"equal: {listed(dict.fromkeys(row.name for row in told))}")


def _first_difference(rows: Iterable[PointRow]) -> str:
    for row in rows:
        if row.rel or row.nonfinite:
            return f"the first that differs is {row.label} at step {row.step} ({describe_size(row)})"
    return "none differs"


def describe_size(row: PointRow) -> str:
    return "NaN or Inf on one side" if row.nonfinite else f"rel {row.rel:.1e}"
