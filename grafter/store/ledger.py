"""The ledger: one JSON line per matched point per rank, written at once, so that a crash loses nothing.

A rank's files are `<dir>/<run_name>/<role>/rank<r>.ledger.jsonl` (one `LedgerRecord` a line) and, at close,
`rank<r>.summary.json` (one `RankSummary`). A later line with the `sequence` of an earlier one replaces it. A sender
amends its record in this way when its receivers could not use what it sent. `LedgerRecord.model_json_schema()` is the
published schema.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import TypeVar

from pydantic import BaseModel, ValidationError
from pydantic_core import to_json

from grafter.core.records import LedgerLine, LedgerRecord, RankSummary
from grafter.core.roles import ROLES, Role
from grafter.errors import GrafterError
from grafter.store.written_files import LineFile, write_whole

# (role, role rank, records of that rank in the order of `sequence`).
RankLedger = tuple[Role, int, list[LedgerRecord]]
_Line = TypeVar("_Line", bound=BaseModel)


class LedgerWriter:
    """The ledger of one rank, open for writing. A line is one `write` call, so it survives a crash of the process."""

    def __init__(self, directory: Path, role_rank: int) -> None:
        """directory: the role's; it is created if it is missing. Raises OSError."""
        directory.mkdir(parents=True, exist_ok=True)
        self._directory = directory
        self.path = directory / f"rank{role_rank}.ledger.jsonl"
        self._lines = LineFile(self.path)

    def write(self, record: LedgerRecord | LedgerLine) -> None:
        """Append one line. Raises OSError on a full disk, on which no part of the line stays."""
        self._lines.append(to_json(record, inf_nan_mode="constants"))

    def write_summary(self, summary: RankSummary) -> None:
        """Write the rank's summary beside its ledger. Raises OSError."""
        write_summary(self._directory, summary)

    def close(self) -> None:
        """Close the file; later calls do nothing."""
        self._lines.close()


def write_summary(directory: Path, summary: RankSummary) -> None:
    """Write a rank's summary into its role's directory. Raises OSError."""
    write_whole(directory / f"rank{summary.role_rank}.summary.json", summary.model_dump_json(indent=1))


def read_ledger(path: Path) -> list[LedgerRecord]:
    """All records of one rank's file in the order of `sequence`; amended records replace earlier ones.

    Raises GrafterError as `read_json_lines` does.
    """
    records = {record.sequence: record for record in read_json_lines(path, LedgerRecord, "a ledger record")}
    return [records[sequence] for sequence in sorted(records)]


def read_json_lines(path: Path, model: type[_Line], what: str) -> Iterator[_Line]:
    """The lines of a file as objects of `model`.

    A last line without a newline is left out: the process died while writing it. Any other line that does not fit the
    model raises GrafterError, which names file and line and says that the line is not `what`.
    """
    for number, line in enumerate(path.read_bytes().split(b"\n")[:-1], start=1):
        try:
            yield model.model_validate_json(line)
        except ValidationError as error:
            raise GrafterError(f"{path}:{number}: not {what}: {error.errors()[0]['msg']}") from error


def read_run(run_directory: Path) -> Iterator[RankLedger]:
    """The ledger of every rank that wrote one under `<dir>/<run_name>`, by role and rank. Raises GrafterError."""
    for role in ROLES:
        ranks = {_rank_of(path): path for path in (run_directory / role).glob("rank*.ledger.jsonl")}
        for rank in sorted(ranks):
            yield role, rank, read_ledger(ranks[rank])


def _rank_of(path: Path) -> int:
    return int(path.name.removeprefix("rank").split(".")[0])


def read_summaries(run_directory: Path) -> list[RankSummary]:
    """The summaries of all ranks that closed under `<dir>/<run_name>`."""
    paths = sorted(run_directory.glob("*/rank*.summary.json"))
    return [RankSummary.model_validate(json.loads(path.read_text())) for path in paths]
