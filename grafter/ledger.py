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
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, ValidationError
from pydantic_core import to_json

from grafter.errors import GrafterError
from grafter.written_files import LineFile, write_whole

Role = Literal["baseline", "target"]
DirectionName = Literal["b2t", "t2b", "compare"]
Outcome = Literal[
    "grafted", "compared", "sent", "skipped", "failed", "posted", "missed", "expired", "displaced"
]  # fmt: skip

SCHEMA_VERSION = 1


class _Record(BaseModel):
    # Unknown fields are kept out, not refused: a newer grafter may have written the file.
    model_config = ConfigDict(frozen=True, extra="ignore", ser_json_inf_nan="constants")


class TensorStatistics(_Record):
    """What one tensor holds. All moments are over the finite values, in float64."""

    numel: int
    mean: float | None = None
    std: float | None = None
    min: float | None = None
    max: float | None = None
    abs_mean: float | None = None
    nan: int = 0
    inf: int = 0


class Difference(_Record):
    """x (the receiver's value before the write) against y (what came). The fields: `grafter/measures/stats.py`."""

    rel: float | None = None
    rel_l2: float | None = None
    max_abs: float | None = None
    max_abs_index: list[int] | None = None
    # Whole numbers where the dtype is int64 or uint64, of which float64 does not hold all.
    max_abs_values: list[int | float] | None = None
    mean_abs: float | None = None
    cosine: float | None = None
    mismatched_fraction: float | None = None
    nan: int = 0
    inf: int = 0


class CopyRecord(_Record):
    """A receiver's tensor of which other receivers hold copies (GRAFTER_CHECK_REPLICAS=1), as it was before the write.

    ranks: the role ranks that hold the same part, this one among them. checksum: SHA-256 of its values, row by row,
    every NaN as one and the same. Copies are equal where their checksums are.
    """

    ranks: list[int]
    checksum: str | None = None
    # Why there is no checksum.
    reason: str | None = None


class LeafRecord(_Record):
    """One tensor of the point; a point that is a bare tensor has one leaf, whose path is empty."""

    path: str
    shape: list[int]
    dtype: str
    device: str
    before: TensorStatistics | None = None
    incoming: TensorStatistics | None = None
    difference: Difference | None = None
    # How many values left the range of the target's dtype in the write (they became its largest, or infinite).
    saturated: int | None = None
    # What this rank declared of where the tensor lies; None where it declared nothing.
    layout: str | None = None
    # How far the sender's replicas are apart (GRAFTER_CHECK_REPLICAS=1); None where none were compared.
    replicas: Difference | None = None
    # Where receivers hold copies of this tensor that are to be compared; None elsewhere.
    copy_of: CopyRecord | None = None
    # Where rows are addressed by token: the one that `max_abs_index` lies in, as `sequence:position`.
    token: str | None = None


class TokenCounts(_Record):
    """Rows addressed by token (`tokens=`).

    matched: rows of this rank that were paired with a row of the other side. only_here: its rows that the other side
    lacks; only_there: tokens of the other side that no rank of this one has, with their first ones as
    `sequence:position..position`. kept_out: rows of this rank that the other side excludes (`start=`).
    """

    matched: int
    only_here: int
    only_there: int
    kept_out: int = 0
    only_here_tokens: list[str] = []
    only_there_tokens: list[str] = []


class LedgerRecord(_Record):
    """What happened to one point on one rank. `seconds` is by stage: snapshot, pairing, exchange, transform, agreement,
    write, statistics. `before`, `incoming` and `difference` are those of the worst leaf (by `rel`)."""

    schema_version: int = SCHEMA_VERSION
    sequence: int
    time: float
    name: str
    tags: dict[str, Any]
    step: int
    phase: str
    occurrence: int
    direction: DirectionName
    role: Role
    role_rank: int
    outcome: Outcome
    reason: str | None = None
    call_site: str
    participants: dict[str, list[int]]
    bytes_sent: int = 0
    bytes_received: int = 0
    seconds: dict[str, float] = {}
    before: TensorStatistics | None = None
    incoming: TensorStatistics | None = None
    difference: Difference | None = None
    leaves: list[LeafRecord] = []
    # None where rows are not addressed by token.
    tokens: TokenCounts | None = None
    # Of a point that was skipped since only one job came to it (`one_sided`): which.
    only_in: Role | None = None


# All fields of a LedgerRecord in its order, as a point of our own gives them: validating them would take as long again
# as all else that the ledger costs.
LedgerLine = dict[str, Any]


class RankSummary(_Record):
    """What one rank says at close."""

    role: Role
    role_rank: int
    outcomes: dict[str, int]
    # Points that no filter matched, per name: they are counted, not recorded.
    unmatched: dict[str, int]
    filters_never_matched: list[str]
    tags_never_seen: list[str]
    # Modules with hooks that no call reached, and those that no rank of the other job has.
    hooks_never_fired: list[str] = []
    modules_only_here: list[str] = []
    # Of hooks_never_fired, those whose parts were called: by `module.forward(...)`, say.
    modules_bypassed: list[str] = []
    # Whether no filter of a direction was set. Points saved to disk; those whose file or record could not be written;
    # and those that a limit left out, by limit.
    only_dumps: bool = False
    dumped: int = 0
    dumps_lost: int = 0
    dumps_left_out: dict[str, int] = {}
    # None: closed in good order. Else the error with which this rank left.
    error: str | None = None
    # The class of that error, e.g. "PairingError".
    error_kind: str | None = None


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
