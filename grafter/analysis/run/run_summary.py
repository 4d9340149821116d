"""One run directory, found and read: its points as rows, what went wrong, and what else is worth knowing.

`grafter/cli/show.py` draws it.
"""

from __future__ import annotations

import json
import os
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from grafter.analysis.run.point_rows import PointRow, list_ranks, merge_ranks
from grafter.analysis.run.run_findings import ONLY_IN, find_notes, find_problems
from grafter.errors import GrafterError
from grafter.store.ledger import read_run, read_summaries
from grafter.store.run_files import history_notes

_ROLES = ("baseline", "target")


@dataclass(frozen=True)
class RunSummary:
    """One run directory, read. `notes` are worth knowing, `problems` make the run a failure; both are sentences."""

    run_directory: Path
    rows: list[PointRow]
    notes: list[str]
    problems: list[str]
    # Points on disk, of all ranks; and whether they can be grafted from later.
    saved: int = 0
    is_recording: bool = False

    def count(self, *outcomes: str) -> int:
        return sum(row.outcome in outcomes for row in self.rows)


def read_run_summary(run_directory: Path, all_ranks: bool = False) -> RunSummary:
    """Read everything under `<dir>/<run_name>`. `all_ranks`: a row per point and rank, senders too.

    Raises GrafterError where a line of a ledger is not a record.
    """
    ledgers = list(read_run(run_directory))
    summaries = read_summaries(run_directory)
    key_tags = _read_key_tags(run_directory)
    rows = merge_ranks(ledgers, key_tags)
    problems = find_problems(rows, summaries, _read_attach(run_directory))
    notes = history_notes(run_directory) + find_notes(ledgers, rows, summaries)
    saved = sum(summary.dumped for summary in summaries)
    is_recording = any(_is_recording(run_directory / role) for role in _ROLES)
    shown = list_ranks(ledgers) if all_ranks else rows
    return RunSummary(run_directory, shown, notes, problems, saved, is_recording)


def find_run(directory: Path) -> Path:
    """`directory` if it is a run, else the newest run in it. Raises GrafterError where there is none."""
    if not directory.is_dir():
        if directory.exists():
            raise GrafterError(
                f"{directory} is a file and no run's directory. Give a run directory, or the --out directory of "
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
    """What the directory has instead of ledgers, and what to do with it."""
    if directory.name in _ROLES and any(directory.glob("rank*.dumps.jsonl")):
        directory, roles = directory.parent, [directory.name]
    else:
        roles = [role for role in _ROLES if any((directory / role).glob("rank*.dumps.jsonl"))]
    if any(_is_recording(directory / role) for role in roles):
        return (
            f"{directory} holds a recording of the {' and the '.join(roles)}, which has met nobody. Graft from it: "
            f"grafter run --peer {directory} ..."
        )
    if len(roles) == 1:
        return (
            f"{directory} holds dumps of the {roles[0]} alone, and nothing to set them against. Give two directories: "
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
    return bool(_configuration(role_directory / "run.json").get("record"))


def _configuration(run_facts: Path) -> dict[str, Any]:
    """The settings that a run.json has; none where it is missing or damaged, which those who need it tell."""
    try:
        found = json.loads(run_facts.read_bytes())["configuration"]
    except (OSError, ValueError, RecursionError, KeyError, TypeError):
        return {}
    return found if isinstance(found, dict) else {}


def _written(run_directory: Path) -> list[float]:
    files = [path for role in _ROLES for path in (run_directory / role).glob("rank*.ledger.jsonl")]
    return [path.stat().st_mtime for path in files]


def _read_key_tags(run_directory: Path) -> frozenset[str] | None:
    """Which tags identify a point in this run; None: all but rank tags."""
    key = _read_setting(run_directory, "key")
    return frozenset(tag.strip() for tag in key.split(",")) if key else None


def _read_attach(run_directory: Path) -> str | None:
    """The patterns of `--attach`, where the run has any."""
    return _read_setting(run_directory, "attach")


def _read_setting(run_directory: Path, name: str) -> str | None:
    """A setting of the run as its first role has it that has it; None where no role has."""
    for path in sorted(run_directory.glob("*/run.json")):
        value = _configuration(path).get(name)
        if value:
            return str(value)
    return None


# How many points ended how, in words.

_OUTCOMES = ("grafted", "compared", "sent", "posted", "missed", "expired", "displaced", "skipped", "failed")


def describe_counts(summary: RunSummary) -> str:
    """`5 grafted, 1 failed`; of a run that met nobody, what it saved."""
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
    points = "1 point" if summary.saved == 1 else f"{summary.saved} points"
    if not summary.is_recording:
        return f"{points} saved"
    near = os.path.relpath(summary.run_directory)
    directory = str(summary.run_directory) if near.startswith("..") else near
    return f"{points} recorded; graft from it with --peer {directory}"
