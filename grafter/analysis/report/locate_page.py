"""The page of `grafter locate`: the target left alone, what each point adds, and the point that the verdict names."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from pydantic import TypeAdapter, ValidationError

from grafter.analysis.locate.judgement import judge
from grafter.analysis.locate.measure import measure_run
from grafter.analysis.locate.verdict import Verdict
from grafter.analysis.report.dumped_pictures import draw_run
from grafter.analysis.report.page_data import PageData, PageFinding, PagePoint
from grafter.analysis.report.run_page import (
    RUN_MEASURED,
    as_page_verdict,
    point_id,
    read_environments,
    read_points,
    run_findings,
)
from grafter.analysis.report.run_reading import RunFiles, has_ledgers, read_run_files
from grafter.core.roles import ROLES
from grafter.errors import DumpError
from grafter.store.dumps.record_file import opened

ALONE, GRAFTED = "alone", "grafted"
FLOOR_ALONE, FLOOR_GRAFTED = "floor-alone", "floor-grafted"
_NOT_FINISHED = (
    "The run `grafted` does not exist, so what each point adds is unknown: `grafter locate` ended before this run."
)


def is_locate_directory(directory: Path) -> bool:
    """Whether this is the --out directory of `grafter locate`."""
    return has_ledgers(directory / ALONE)


def make_locate_page(directory: Path) -> PageData:
    """The page of all runs of one `grafter locate`. Damaged or missing files become findings."""
    runs = {
        name: read_run_files(directory / name)
        for name in (ALONE, GRAFTED, FLOOR_ALONE, FLOOR_GRAFTED)
        if has_ledgers(directory / name)
    }
    findings = [finding for name, run in runs.items() for finding in run_findings(run, f"run `{name}`")]
    if GRAFTED not in runs:
        findings.insert(0, PageFinding("problem", _NOT_FINISHED))
    verdict = _read_verdict(directory, runs, findings)
    points = _join_runs(runs, verdict)
    pictures, pictures_note, dump_findings = draw_run(directory / ALONE, points)
    return PageData(
        kind="locate",
        title="Which module of the target is wrong",
        source=str(directory),
        sides=ROLES,
        points=tuple(points),
        findings=tuple(sorted(findings + dump_findings, key=lambda finding: finding.level != "problem")),
        verdict=as_page_verdict(verdict, points, (verdict.inputs,)) if verdict is not None else None,
        environments=read_environments(runs[ALONE]),
        pictures=pictures,
        pictures_note=pictures_note,
        measured=f"{RUN_MEASURED} The lines show the target left alone. The bars show what each point adds when all "
        "others are given the baseline's values.",
        adds_note="" if GRAFTED in runs else _NOT_FINISHED,
    )


def _read_verdict(directory: Path, runs: dict[str, RunFiles], findings: list[PageFinding]) -> Verdict | None:
    """The verdict that `grafter locate` wrote. If its file is damaged, the runs are judged again."""
    if GRAFTED not in runs:
        return None
    try:
        with opened(directory, "verdict.json") as descriptor, open(descriptor, "rb", closefd=False) as file:
            return TypeAdapter(Verdict).validate_json(file.read(1 << 24))
    except (DumpError, ValidationError, RecursionError):
        findings.append(
            PageFinding("note", "verdict.json cannot be read; the runs were judged again from the ledgers.")
        )
    measured = {name: measure_run(run.ledgers, run.key_tags) for name, run in runs.items()}
    return judge(measured[ALONE], measured[GRAFTED], measured.get(FLOOR_ALONE), measured.get(FLOOR_GRAFTED))


def _join_runs(runs: dict[str, RunFiles], verdict: Verdict | None) -> list[PagePoint]:
    """The points of the run left alone, each with what it adds and with its floor."""
    grafted = _by_place(runs.get(GRAFTED))
    floor = _by_place(runs.get(FLOOR_GRAFTED))
    guilty = set(verdict.guilty) if verdict is not None else set()
    notes = {row.point: row.note for row in verdict.points if row.note} if verdict is not None else {}
    points = []
    for point in read_points(runs[ALONE]):
        place = (point.label, point.step)
        its_graft, its_floor = grafted.get(place), floor.get(place)
        own_notes = [notes[point_id(point)]] if point_id(point) in notes else []
        if its_graft is not None and its_graft.is_trouble:
            own_notes.append(f"in the grafted run: {its_graft.outcome}, {its_graft.reason or 'no reason was recorded'}")
        points.append(
            replace(
                point,
                added=its_graft.added if its_graft is not None else None,
                floor=its_floor.added if its_floor is not None else None,
                guilty=point_id(point) in guilty,
                # The grafted run has all stages, including the write.
                seconds=its_graft.seconds if its_graft is not None else point.seconds,
                notes=tuple(dict.fromkeys([*point.notes, *own_notes])),
            )
        )
    return points


def _by_place(run: RunFiles | None) -> dict[tuple[str, int], PagePoint]:
    return {} if run is None else {(point.label, point.step): point for point in read_points(run)}
