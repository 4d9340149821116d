"""One run directory, found and read: its points as rows, its problems, and notes. `grafter/cli/show.py` prints it."""

from __future__ import annotations

import json
import os
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from grafter.analysis.run.point_rows import PointRow, list_ranks, merge_ranks
from grafter.analysis.run.run_findings import ONLY_IN, find_notes, find_problems, n_points
from grafter.core.roles import ROLES
from grafter.errors import GrafterError
from grafter.store.ledger import read_run, read_summaries
from grafter.store.run_files import history_notes, recorded_configuration, recorded_key_tags


@dataclass(frozen=True)
class RunSummary:
    """The content of one run directory.

    notes: sentences worth reading. problems: sentences on what makes the run a failure.
    saved: the number of points on disk, of all ranks. is_recording: whether later runs can graft from them.
    """

    run_directory: Path
    rows: list[PointRow]
    notes: list[str]
    problems: list[str]
    saved: int = 0
    is_recording: bool = False

    def count(self, *outcomes: str) -> int:
        """The number of rows with one of these outcomes."""
        return sum(row.outcome in outcomes for row in self.rows)


def read_run_summary(run_directory: Path, all_ranks: bool = False) -> RunSummary:
    """Read everything under `<dir>/<run_name>`. all_ranks: one row for each point and rank, senders included.

    Raises GrafterError if a line of a ledger is not a record.
    """
    ledgers = list(read_run(run_directory))
    summaries = read_summaries(run_directory)
    facts = [_read_facts(path.parent) for path in sorted(run_directory.glob("*/run.json"))]
    rows = merge_ranks(ledgers, next(filter(None, map(recorded_key_tags, facts)), None))
    attach = next(filter(None, (recorded_configuration(own).get("attach") for own in facts)), None)
    problems = find_problems(rows, summaries, str(attach) if attach else None)
    notes = history_notes(run_directory) + find_notes(ledgers, rows, summaries)
    saved = sum(summary.dumped for summary in summaries)
    is_recording = any(_is_recording(run_directory / role) for role in ROLES)
    shown = list_ranks(ledgers) if all_ranks else rows
    return RunSummary(run_directory, shown, notes, problems, saved, is_recording)


def find_run(directory: Path) -> Path:
    """`directory` if it is a run, otherwise the newest run in it. Raises GrafterError if there is none."""
    if not directory.is_dir():
        if directory.exists():
            raise GrafterError(
                f"{directory} is a file, not a run's directory. Give a run directory, or the --out directory of "
                "`grafter run`; `grafter report` also takes what `grafter compare --json` wrote."
            )
        raise GrafterError(
            f"{directory}: there is no such file or directory. Give a run directory, or the --out directory of "
            "`grafter run`; `grafter report` also takes a file of `grafter compare --json`."
        )
    if _written(directory):
        return directory
    runs = [(max(times), path) for path in directory.iterdir() if path.is_dir() and (times := _written(path))]
    if not runs:
        raise GrafterError(_why_no_run(directory))
    return max(runs)[1]


def _why_no_run(directory: Path) -> str:
    """What the directory holds instead of ledgers, and what can be done with it."""
    if directory.name in ROLES and any(directory.glob("rank*.dumps.jsonl")):
        directory, roles = directory.parent, [directory.name]
    else:
        roles = [role for role in ROLES if any((directory / role).glob("rank*.dumps.jsonl"))]
    if any(_is_recording(directory / role) for role in roles):
        return (
            f"{directory} holds a recording of the {' and the '.join(roles)}, which has met no other job. Graft from "
            f"it: grafter run --peer {directory} ..."
        )
    if len(roles) == 1:
        return (
            f"{directory} holds only dumps of the {roles[0]}, and nothing to compare them with. Give two directories: "
            "grafter compare BASELINE TARGET, or grafter report BASELINE TARGET."
        )
    if roles:
        return (
            f"{directory} holds dumps of both roles, and no ledger, as the jobs did not meet. Compare them: "
            f"grafter compare {directory}, or grafter report {directory}."
        )
    return (
        f"{directory} holds no run: no <run>/<role>/rank<r>.ledger.jsonl is in it. A rank writes one once both jobs "
        f"have joined."
    )


def _is_recording(role_directory: Path) -> bool:
    return bool(recorded_configuration(_read_facts(role_directory)).get("record"))


def _read_facts(role_directory: Path) -> object:
    """The content of run.json; None if it is missing or damaged."""
    try:
        return json.loads((role_directory / "run.json").read_bytes())
    except (OSError, ValueError, RecursionError):
        return None


def _written(run_directory: Path) -> list[float]:
    files = [path for role in ROLES for path in (run_directory / role).glob("rank*.ledger.jsonl")]
    return [path.stat().st_mtime for path in files]


# The outcomes in the order in which they are counted.
_OUTCOMES = ("grafted", "compared", "sent", "posted", "missed", "expired", "displaced", "skipped", "failed")


def describe_counts(summary: RunSummary) -> str:
    """The counts of outcomes: `5 grafted, 1 failed`; for a run that only dumps, the number of saved points."""
    unmeasured = sum(row.unmeasured is not None for row in summary.rows)
    counts = Counter(row.outcome for row in summary.rows if row.only_in is None)
    counts["compared"] -= unmeasured
    parts = [f"{counts[outcome]} {outcome}" for outcome in _OUTCOMES if counts[outcome]]
    if unmeasured:
        parts.append(f"{unmeasured} met without figures")
    counted = {where: sum(row.only_in == role for row in summary.rows) for role, where in ONLY_IN.items()}
    one_sided = ", ".join(f"{count} {where}" for where, count in counted.items() if count)
    if one_sided:
        return f"{', '.join(parts) or 'nothing grafted or compared'}; {one_sided}: not judged"
    if parts or not summary.saved:
        return ", ".join(parts) or "no points"
    points = n_points(summary.saved)
    if not summary.is_recording:
        return f"{points} saved"
    near = os.path.relpath(summary.run_directory)
    directory = str(summary.run_directory) if near.startswith("..") else near
    return f"{points} recorded; graft from it with --peer {directory}"
