"""The page of one live run: a point for each row of `grafter show`, with details from the ledgers of all ranks."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from grafter.analysis.compare.conclusion import split_name
from grafter.analysis.locate.judgement import judge
from grafter.analysis.locate.measure import PointId, RunMeasurement, as_text, measure_run
from grafter.analysis.locate.verdict import Verdict, describe_number
from grafter.analysis.report.dumped_pictures import draw_run
from grafter.analysis.report.page_data import Environment, PageData, PageFinding, PagePoint, PageVerdict
from grafter.analysis.report.run_reading import RunFiles, read_run_files
from grafter.analysis.run.point_rows import PointRow, group_points, merge_ranks
from grafter.analysis.run.run_findings import find_notes, find_problems
from grafter.core.records import Difference, LedgerRecord
from grafter.core.roles import ROLES, Role, receiver_role
from grafter.store.ledger import RankLedger

DIFFERENCES = ("rel", "rel_l2", "max_abs", "mean_abs", "cosine", "mismatched_fraction")
GRAFTING = ("b2t", "t2b")
_LAYER_TAG = re.compile(r"(^|_)(layer|block)(_|$)")
_LAYER_IN_NAME = re.compile(r"(?:^|[._])(?:layers?|blocks?|h)[._](\d+)(?=[._]|$)")

RUN_MEASURED = (
    "rel = sum((x-y)²) / sum(x²+y²): 0 for equal tensors, 1 for unrelated ones, 2 for opposite ones; computed before "
    "the write. x is the receiver's tensor, y is the received one."
)
_AS_LOCATE = "Judged as `grafter locate` judges without a floor."
RUN_NOT_ADDED = (
    "Nothing was grafted in this run, so each difference includes the error of earlier points. What a point itself "
    "adds is measured by a run with --b2t, or by `grafter locate`, which does both runs."
    " If a module's inputs were compared as well, the page shows them beside its output."
)


def make_run_page(directory: Path) -> PageData:
    """The page of the run `<dir>/<run_name>`. Damaged files become findings."""
    run = read_run_files(directory)
    points = read_points(run)
    judged = _judge_grafts(run, points)
    if judged is not None:
        points = [replace(point, guilty=point_id(point) in judged.guilty) for point in points]
    pictures, pictures_note, dump_findings = draw_run(directory, points)
    return PageData(
        kind="run",
        title=_title(points),
        source=str(directory),
        sides=ROLES,
        points=tuple(points),
        findings=(*run_findings(run), *dump_findings),
        verdict=describe_divergence(points) if judged is None else as_page_verdict(judged, points, (_AS_LOCATE,)),
        environments=read_environments(run),
        pictures=pictures,
        pictures_note=pictures_note,
        measured=RUN_MEASURED,
        adds_note="" if any(point.added is not None for point in points) else RUN_NOT_ADDED,
    )


def _title(points: Sequence[PagePoint]) -> str:
    grafted = sum(point.outcome == "grafted" for point in points)
    compared = sum(point.outcome == "compared" and bool(point.difference or point.nonfinite) for point in points)
    if not points:
        return "Live pair: no point was matched"
    counted = [f"{n} {what}" for n, what in ((grafted, "grafted"), (compared, "compared")) if n]
    return f"Live pair: {' and '.join(counted) or 'no point'} of {len(points)} matched points"


# Points.


def read_points(run: RunFiles) -> list[PagePoint]:
    """A point for each row of `grafter show`, in its order."""
    rows = merge_ranks(run.ledgers, run.key_tags)
    groups = group_points(run.ledgers, run.key_tags)
    points = [_point(order, row, group) for order, (row, group) in enumerate(zip(rows, groups, strict=True))]
    return with_inputs(points)


def _point(order: int, row: PointRow, group: Sequence[LedgerRecord]) -> PagePoint:
    worst = _worst_difference(row, group)
    rel = row.rel
    notes = [f"ranks disagree: {row.disagreement}"] if row.disagreement else []
    if row.replicas is not None:
        notes.append("the sender's replicas differ, though they were declared copies")
    if row.copies is not None:
        ranks = " and ".join(row.copies.ranks)
        notes.append(f"the receiver's replicas differ, though they were declared copies: {ranks}")
    if row.unmeasured is not None:
        notes.append(f"it is unknown whether it is equal: {row.unmeasured}")
    return PagePoint(
        order=order,
        label=row.label,
        name=row.name,
        tags=row.tags,
        step=row.step,
        phase=row.phase,
        occurrence=row.occurrence,
        outcome=row.outcome,
        layer=find_layer(row.name, row.tags),
        direction=row.direction,
        reason=row.reason,
        notes=tuple(notes),
        difference=difference_values(worst),
        nonfinite=row.nonfinite,
        worst_index=tuple(worst.max_abs_index) if worst is not None and worst.max_abs_index is not None else None,
        worst_values=tuple(worst.max_abs_values or ()) if worst is not None else (),
        added=(math.inf if row.nonfinite else rel) if row.direction in GRAFTING and row.outcome == "grafted" else None,
        seconds=_slowest(group),
        size_bytes=row.bytes_received,
        shape=row.shape,
        dtype=row.dtype,
        leaf=row.leaf,
        ranks=row.ranks,
        call_site=row.call_site,
    )


def _worst_difference(row: PointRow, group: Sequence[LedgerRecord]) -> Difference | None:
    """The complete difference of which the row shows three figures."""
    receiving = receiver_role(group[0].direction)
    records = [record for record in group if record.role == receiving] or list(group)
    found = [leaf.difference for record in records for leaf in record.leaves] + [r.difference for r in records]
    return next(
        (
            difference
            for difference in found
            if difference is not None
            and (difference.rel, difference.max_abs, difference.cosine) == (row.rel, row.max_abs, row.cosine)
        ),
        None,
    )


def difference_values(difference: Difference | None) -> dict[str, float]:
    """The measures that were computed, by name."""
    if difference is None:
        return {}
    measured = {name: getattr(difference, name) for name in DIFFERENCES}
    return {name: value for name, value in measured.items() if value is not None}


def _slowest(group: Sequence[LedgerRecord]) -> dict[str, float]:
    slowest = max(group, key=lambda record: sum(record.seconds.values()))
    return dict(slowest.seconds)


def find_layer(name: str, tags: Mapping[str, Any]) -> int | None:
    """The layer of a point: from its tag (`layer_id`, `block_idx`), else from its name (`layers.3.mlp`)."""
    for tag, value in tags.items():
        if _LAYER_TAG.search(tag) and isinstance(value, int) and not isinstance(value, bool):
            return value
    found = _LAYER_IN_NAME.search(name)
    return int(found[1]) if found is not None and len(found[1]) < 7 else None


def with_inputs(points: Sequence[PagePoint]) -> list[PagePoint]:
    """The same points. Outputs of modules get the worst `rel` of their inputs, by the names of `grafter.attach`."""
    inputs: dict[str, float] = {}
    sides = [_module_and_side(point) for point in points]
    for point, (module, is_input) in zip(points, sides, strict=True):
        rel = math.inf if point.nonfinite else point.difference.get("rel")
        if module is not None and is_input and rel is not None:
            inputs[module] = max(rel, inputs.get(module, 0.0))
    return [
        point if module is None or is_input or module not in inputs else replace(point, inputs_rel=inputs[module])
        for point, (module, is_input) in zip(points, sides, strict=True)
    ]


def _module_and_side(point: PagePoint) -> tuple[str | None, bool]:
    """The module call to which a point belongs, and whether the point is its input."""
    found = split_name(point.name)
    if found is None:
        return None, False
    module, side = found
    # Gradients flow backwards: a module computes those of its inputs from those of its outputs.
    flows_in = "out" if point.phase == "backward" else "in"
    place = [module, point.tags, point.step, point.phase, point.occurrence]
    return json.dumps(place, sort_keys=True), side == flows_in


# What was found.


def run_findings(run: RunFiles, title: str = "") -> tuple[PageFinding, ...]:
    """What a reader should know before any figure: problems first. `title` names the run if there are several."""
    rows = merge_ranks(run.ledgers, run.key_tags)
    head = f"{title}: " if title else ""
    problems = [PageFinding("problem", head + text) for text in find_problems(rows, run.summaries)]
    notes = [PageFinding("note", head + text) for text in find_notes(run.ledgers, rows, run.summaries)]
    damaged = [PageFinding(finding.level, head + finding.text) for finding in run.findings]
    return (*damaged, *problems, *notes)


def read_environments(run: RunFiles) -> tuple[Environment, ...]:
    """One per role, with the same facts in the same order. A role without run.json has a sentence instead."""
    found = []
    for role in ROLES:
        facts = run.facts.get(role)
        if facts is None:
            found.append(Environment(role, {"run.json": "missing (the job ran on another machine, or never joined)"}))
        else:
            found.append(Environment(role, flatten_facts(role, facts)))
    return tuple(found)


def flatten_facts(role: Role | str, facts: Mapping[str, Any]) -> dict[str, str]:
    """run.json as rows of text: the job's own facts first, then versions, then the settings that are set."""
    command = facts.get("command")
    rows = {
        "command": " ".join(map(str, command)) if isinstance(command, list) else _as_text(command),
        "host": _as_text(facts.get("hostname")),
        "ranks": _as_text(facts.get(f"{role}_world_size")),
        "run": _as_text(facts.get("run_name")),
    }
    for group, prefix in (("versions", ""), ("configuration", "GRAFTER_")):
        content = facts.get(group)
        for name, value in content.items() if isinstance(content, dict) else ():
            rows[f"{prefix}{name.upper()}" if prefix else str(name)] = _as_text(value)
    known = {"command", "hostname", "run_name", "versions", "configuration", "schema_version", "role"}
    for name, value in facts.items():
        if name not in known and not name.endswith("_world_size"):
            rows[str(name)] = _as_date(value) if name == "time" else _as_text(value)
    return {name: text for name, text in rows.items() if text}


def _as_date(seconds: Any) -> str:
    """Seconds since 1970 as a date in UTC, because the jobs may be in two places. Anything else is returned as text."""
    try:
        return datetime.fromtimestamp(seconds, tz=timezone.utc).strftime("%Y-%m-%d %H:%M:%S UTC")
    except (TypeError, ValueError, OverflowError, OSError):
        return _as_text(seconds)


def _as_text(value: Any) -> str:
    if value is None or value == "" or value == [] or value == {}:
        return ""
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)


# The verdict.


def _judge_grafts(run: RunFiles, points: Sequence[PagePoint]) -> Verdict | None:
    """The verdict on what the grafted points add, judged against each other. None if nothing was grafted."""
    if all(point.added is None for point in points):
        return None
    grafted: list[RankLedger] = [
        (role, rank, [record for record in records if record.direction in GRAFTING])
        for role, rank, records in run.ledgers
    ]
    return judge(RunMeasurement({}), measure_run(grafted, run.key_tags))


def as_page_verdict(verdict: Verdict, points: Sequence[PagePoint], details: tuple[str, ...] = ()) -> PageVerdict:
    """The verdict of `grafter locate` for a page. It names points over all steps, as `PointId` does."""
    named = verdict.named
    candidates = [point for point in points if point_id(point) == named]
    culprit = max(candidates, key=lambda point: point.added if point.added is not None else -1.0, default=None)
    tone = "bad" if named is not None else ("good" if verdict.exit_code == 0 else "open")
    return PageVerdict(
        verdict.sentence,
        tone,  # type: ignore[arg-type]
        (*details, *verdict.notes),
        culprit.order if culprit is not None else None,
    )


def point_id(point: PagePoint) -> str:
    """The name of the point over all steps, as in the verdict of `grafter locate`."""
    tags = tuple((tag, as_text(value)) for tag, value in sorted(point.tags.items()))
    return str(PointId(point.name, tags, point.phase, point.occurrence))


def describe_divergence(points: Sequence[PagePoint]) -> PageVerdict | None:
    """Where a compared run starts to differ, and where it differs most. No judgement, because there is no threshold."""
    compared = [point for point in points if point.outcome == "compared" and (point.difference or point.nonfinite)]
    if not compared:
        return None
    differing = [point for point in compared if point.nonfinite or _differs(point)]
    others = len(points) - len(compared)
    if not differing:
        rest = f"; {others} of {len(points)} were not compared" if others else ""
        return PageVerdict(f"All {len(compared)} compared points are equal{rest}.", "open" if others else "good")
    first = differing[0]
    worst = max(differing, key=lambda point: point.badness)
    sentence = f"The first difference is at {first.label}, step {first.step} ({_size(first)})"
    if worst is not first:
        sentence += f"; the largest at {worst.label}, step {worst.step} ({_size(worst)})"
    details = [
        "This does not say whether the difference is rounding or a fault: `grafter locate` measures what each point "
        "adds."
    ]
    jump = _largest_growth(compared)
    if jump is not None:
        details.insert(0, jump)
    if others:
        details.append(f"{others} of {len(points)} points were not compared.")
    return PageVerdict(f"{sentence}.", "open", tuple(details), worst.order)


def _differs(point: PagePoint) -> bool:
    """In any bit: rel is 0 for -0.0 against 0.0, and unknown of values that are not numbers."""
    return point.difference.get("rel", 0.0) > 0 or point.difference.get("mismatched_fraction", 0.0) > 0


def _size(point: PagePoint) -> str:
    if point.nonfinite:
        return "NaN or Inf on one side"
    rel = point.difference.get("rel")
    bits = point.difference.get("mismatched_fraction")
    return f"rel {describe_number(rel)}" if rel or bits is None else f"other bits in {bits:.2g} of the values"


def _largest_growth(compared: Sequence[PagePoint]) -> str | None:
    """Where the difference grows most from one point to the next in its step, if by a factor of 100 or more."""
    best: tuple[float, PagePoint, PagePoint] | None = None
    before: PagePoint | None = None
    for point in compared:
        rel = point.difference.get("rel", 0.0)
        if before is not None and before.step == point.step and not point.nonfinite:
            earlier = before.difference.get("rel", 0.0)
            if earlier > 0 and rel / earlier >= 100 and (best is None or rel / earlier > best[0]):
                best = (rel / earlier, before, point)
        before = point
    if best is None:
        return None
    return f"It grows most from {best[1].label} to {best[2].label}, step {best[2].step}: {best[0]:.0e} times."
