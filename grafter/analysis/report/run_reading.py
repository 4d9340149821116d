"""Reads the files of one run for a page. A damaged file is reported, and the rest is used."""

from __future__ import annotations

import json
import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from grafter.analysis.report.page_data import PageFinding, bad_lines
from grafter.core.records import LedgerRecord, RankSummary
from grafter.core.roles import ROLES, Role
from grafter.errors import GrafterError
from grafter.store.ledger import RankLedger
from grafter.store.run_files import recorded_key_tags

# A line is one point; a longer line does not belong to a ledger.
_LONGEST_LINE = 1 << 24
_LONGEST_FACTS = 1 << 22
# The text of a validation error contains data from the file.
_REASON_LENGTH = 200


@dataclass
class RunFiles:
    """The files of one run. facts: the content of each role's run.json. findings: what could not be read, and why."""

    directory: Path
    ledgers: list[RankLedger] = field(default_factory=list)
    summaries: list[RankSummary] = field(default_factory=list)
    facts: dict[Role, dict[str, Any]] = field(default_factory=dict)
    findings: list[PageFinding] = field(default_factory=list)

    @property
    def key_tags(self) -> frozenset[str] | None:
        """The tags that identify a point in this run. None: all except rank tags."""
        return next(filter(None, map(recorded_key_tags, self.facts.values())), None)


def has_ledgers(directory: Path) -> bool:
    """Whether this is `<dir>/<run_name>` with at least one rank's ledger."""
    return any(True for role in ROLES for _ in (directory / role).glob("rank*.ledger.jsonl"))


def has_records(directory: Path) -> bool:
    """Whether any rank recorded a point. A rank that only dumps leaves an empty ledger."""
    paths = [path for role in ROLES for path in (directory / role).glob("rank*.ledger.jsonl")]
    return any(path.is_file() and path.stat().st_size for path in paths)


def read_run_files(directory: Path) -> RunFiles:
    """Everything that the ranks of a run wrote about it. Raises nothing because of the files' contents."""
    run = RunFiles(directory)
    for role in ROLES:
        for rank, path in _of_ranks(run, role, ".ledger.jsonl"):
            run.ledgers.append((role, rank, _read_ledger(run, path)))
        for _, path in _of_ranks(run, role, ".summary.json"):
            _read_summary(run, path)
        facts = _read_json(run, directory / role / "run.json")
        if isinstance(facts, dict):
            run.facts[role] = facts
        elif facts is not None:
            run.findings.append(PageFinding("problem", f"{role}/run.json is not a JSON object; it is ignored."))
    return run


def _of_ranks(run: RunFiles, role: Role, ending: str) -> Iterator[tuple[int, Path]]:
    found = []
    for path in (run.directory / role).glob(f"rank*{ending}"):
        number = path.name.removeprefix("rank").removesuffix(ending)
        if number.isascii() and number.isdigit() and len(number) < 10:
            found.append((int(number), path))
        else:
            run.findings.append(PageFinding("note", f"{role}/{path.name} does not have a rank's name; it is ignored."))
    yield from sorted(found)


def _read_ledger(run: RunFiles, path: Path) -> list[LedgerRecord]:
    records: dict[int, LedgerRecord] = {}
    bad: list[str] = []
    try:
        with _opened(path) as descriptor, open(descriptor, "rb", closefd=False) as file:
            number = 0
            while line := file.readline(_LONGEST_LINE):
                number += 1
                if not line.endswith(b"\n"):
                    if len(line) == _LONGEST_LINE:
                        bad.append(f"line {number} is longer than {_LONGEST_LINE} bytes, so the rest is not read")
                    # Otherwise the process died while writing the line; the run's notes report that it did not close.
                    break
                try:
                    record = LedgerRecord.model_validate_json(line)
                except (ValidationError, RecursionError) as error:
                    bad.append(f"line {number} is not a record ({_why(error)})")
                    continue
                records[record.sequence] = record
    except (OSError, GrafterError) as error:
        run.findings.append(PageFinding("problem", f"{_place(run, path)} cannot be read: {error}"))
    run.findings += bad_lines(_place(run, path), bad)
    return [records[sequence] for sequence in sorted(records)]


def _read_summary(run: RunFiles, path: Path) -> None:
    content = _read_text(run, path)
    if content is None:
        return
    try:
        run.summaries.append(RankSummary.model_validate_json(content))
    except (ValidationError, RecursionError) as error:
        run.findings.append(
            PageFinding("problem", f"{_place(run, path)} is not a summary ({_why(error)}); it is ignored.")
        )


def _read_json(run: RunFiles, path: Path) -> Any:
    content = _read_text(run, path) if os.path.lexists(path) else None
    if content is None:
        return None
    try:
        return json.loads(content)
    except (ValueError, RecursionError) as error:
        run.findings.append(PageFinding("problem", f"{_place(run, path)} is not JSON ({_why(error)}); it is ignored."))
        return None


def _read_text(run: RunFiles, path: Path) -> bytes | None:
    try:
        with _opened(path) as descriptor, open(descriptor, "rb", closefd=False) as file:
            content = file.read(_LONGEST_FACTS + 1)
    except (OSError, GrafterError) as error:
        run.findings.append(PageFinding("problem", f"{_place(run, path)} cannot be read: {error}"))
        return None
    if len(content) > _LONGEST_FACTS:
        run.findings.append(
            PageFinding("problem", f"{_place(run, path)} is longer than {_LONGEST_FACTS} bytes; it is ignored.")
        )
        return None
    return content


@contextmanager
def _opened(path: Path) -> Iterator[int]:
    """A descriptor of a regular file. Without O_NONBLOCK, opening a pipe would wait for its writer."""
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    try:
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            raise GrafterError("it is not a regular file.")
        yield descriptor
    finally:
        os.close(descriptor)


def _place(run: RunFiles, path: Path) -> str:
    return str(path.relative_to(run.directory))


def _why(error: Exception) -> str:
    text = error.errors()[0]["msg"] if isinstance(error, ValidationError) else str(error)
    return text if len(text) <= _REASON_LENGTH else text[: _REASON_LENGTH - 1] + "…"
