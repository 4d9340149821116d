"""The ledger: one JSON line per matched point per rank, written as it happens, so that a crash loses nothing.

A rank's files are `<dir>/<run_name>/<role>/rank<r>.ledger.jsonl` (one `LedgerRecord` a line) and, at close,
`rank<r>.summary.json` (one `RankSummary`). A later line with the `sequence` of an earlier one replaces it: that is
how a sender learns that its receivers could not use what it sent. `LedgerRecord.model_json_schema()` is the
published schema.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

from pydantic import ValidationError
from pydantic_core import to_json

from grafter.core.records import LedgerLine, LedgerRecord, RankSummary
from grafter.core.roles import Role
from grafter.errors import GrafterError
from grafter.store.written_files import LineFile, write_whole


class LedgerWriter:
    """Appends records to one rank's file. One `write` call a line: what was written survives a crash of the process."""

    def __init__(self, directory: Path, role_rank: int) -> None:
        directory.mkdir(parents=True, exist_ok=True)
        self._directory = directory
        self.path = directory / f"rank{role_rank}.ledger.jsonl"
        self._lines = LineFile(self.path)

    def write(self, record: LedgerRecord | LedgerLine) -> None:
        """Append one line; on a full disk raises OSError, which the caller reports once."""
        self._lines.append(to_json(record, inf_nan_mode="constants"))

    def write_summary(self, summary: RankSummary) -> None:
        write_summary(self._directory, summary)

    def close(self) -> None:
        self._lines.close()


def write_summary(directory: Path, summary: RankSummary) -> None:
    """Write what a rank says at close into its role's directory. Raises OSError."""
    write_whole(directory / f"rank{summary.role_rank}.summary.json", summary.model_dump_json(indent=1))


def read_ledger(path: Path) -> list[LedgerRecord]:
    """All records of one rank's file, amended ones replaced, in the order of `sequence`.

    A last line without its newline (the process died in the middle of it) is left out; any other line that is not a
    record raises GrafterError with the file and line.
    """
    records: dict[int, LedgerRecord] = {}
    lines = path.read_bytes().split(b"\n")
    for number, line in enumerate(lines[:-1], start=1):
        try:
            record = LedgerRecord.model_validate_json(line)
        except ValidationError as error:
            raise GrafterError(f"{path}:{number}: not a ledger record: {error.errors()[0]['msg']}") from error
        records[record.sequence] = record
    return [records[sequence] for sequence in sorted(records)]


def read_run(run_directory: Path) -> Iterator[tuple[Role, int, list[LedgerRecord]]]:
    """(role, role rank, records) of every rank that wrote a ledger under `<dir>/<run_name>`."""
    roles: tuple[Role, ...] = ("baseline", "target")
    for role in roles:
        paths = (run_directory / role).glob("rank*.ledger.jsonl")
        for path in sorted(paths, key=lambda p: int(p.name.removeprefix("rank").split(".")[0])):
            yield role, int(path.name.removeprefix("rank").split(".")[0]), read_ledger(path)


def read_summaries(run_directory: Path) -> list[RankSummary]:
    """The summaries of all ranks that closed under `<dir>/<run_name>`."""
    paths = sorted(run_directory.glob("*/rank*.summary.json"))
    return [RankSummary.model_validate(json.loads(path.read_text())) for path in paths]
