"""Records: what a ledger holds of each point, and what a rank reports at close."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict

from grafter.core.roles import Direction, Role

PointOutcome = Literal[
    "grafted", "compared", "sent", "skipped", "failed", "posted", "missed", "expired", "displaced"
]  # fmt: skip

LEDGER_SCHEMA_VERSION = 1


class Record(BaseModel):
    """What every record has in common: frozen, and fields of a newer grafter are passed over."""

    # Unknown fields are kept out, not refused: a newer grafter may have written the file.
    model_config = ConfigDict(frozen=True, extra="ignore", ser_json_inf_nan="constants")


class TensorStatistics(Record):
    """What one tensor holds. All moments are over the finite values, in float64."""

    numel: int
    mean: float | None = None
    std: float | None = None
    min: float | None = None
    max: float | None = None
    abs_mean: float | None = None
    nan: int = 0
    inf: int = 0


class Difference(Record):
    """x (the receiver's value before the write) against y (what came). The fields: `grafter/core/measures/stats.py`."""

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


class CopyRecord(Record):
    """A receiver's tensor of which other receivers hold copies (GRAFTER_CHECK_REPLICAS=1), as it was before the write.

    ranks: the role ranks that hold the same part, this one among them. checksum: SHA-256 of its values, row by row,
    every NaN as one and the same. Copies are equal where their checksums are.
    """

    ranks: list[int]
    checksum: str | None = None
    # Why there is no checksum.
    reason: str | None = None


class LedgerLeaf(Record):
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


class TokenCounts(Record):
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


class LedgerRecord(Record):
    """What happened to one point on one rank. `seconds` is by stage: snapshot, pairing, exchange, transform, agreement,
    write, statistics. `before`, `incoming` and `difference` are those of the worst leaf (by `rel`)."""

    schema_version: int = LEDGER_SCHEMA_VERSION
    sequence: int
    time: float
    name: str
    tags: dict[str, Any]
    step: int
    phase: str
    occurrence: int
    direction: Direction
    role: Role
    role_rank: int
    outcome: PointOutcome
    reason: str | None = None
    call_site: str
    participants: dict[str, list[int]]
    bytes_sent: int = 0
    bytes_received: int = 0
    seconds: dict[str, float] = {}
    before: TensorStatistics | None = None
    incoming: TensorStatistics | None = None
    difference: Difference | None = None
    leaves: list[LedgerLeaf] = []
    # None where rows are not addressed by token.
    tokens: TokenCounts | None = None
    # Of a point that was skipped since only one job came to it (`one_sided`): which.
    only_in: Role | None = None


# All fields of a LedgerRecord in its order, as a point of our own gives them: validating them would take as long again
# as all else that the ledger costs.
LedgerLine = dict[str, Any]


class RankSummary(Record):
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
    # Gradients of weights that came and were gone when they were to be taken, by name.
    gradients_lost: dict[str, int] = {}
    # Gradients of points that came when their step was over, by name.
    gradients_late: dict[str, int] = {}
    # None: closed in good order. Else the error with which this rank left.
    error: str | None = None
    # The class of that error, e.g. "PairingError".
    error_kind: str | None = None
