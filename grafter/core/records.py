"""Records: the lines of a ledger, one for each point, and the summary that a rank writes at close."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict

from grafter.core.roles import Direction, Role

PointOutcome = Literal[
    "grafted", "compared", "sent", "skipped", "failed", "posted", "missed", "expired", "displaced"
]  # fmt: skip

LEDGER_SCHEMA_VERSION = 1


class Record(BaseModel):
    """The base of all records: frozen. Unknown fields are ignored, since a newer grafter may have written the file."""

    model_config = ConfigDict(frozen=True, extra="ignore", ser_json_inf_nan="constants")


class TensorStatistics(Record):
    """The statistics of one tensor. All moments are over the finite values, in float64."""

    numel: int
    mean: float | None = None
    std: float | None = None
    min: float | None = None
    max: float | None = None
    abs_mean: float | None = None
    nan: int = 0
    inf: int = 0


class Difference(Record):
    """The difference of x, the receiver's value before the write, and y, the incoming value.

    The fields are defined in `grafter/core/measures/stats.py`.
    """

    rel: float | None = None
    rel_l2: float | None = None
    max_abs: float | None = None
    max_abs_index: list[int] | None = None
    # Whole numbers if the dtype is int64 or uint64, whose values float64 cannot all represent.
    max_abs_values: list[int | float] | None = None
    mean_abs: float | None = None
    cosine: float | None = None
    mismatched_fraction: float | None = None
    nan: int = 0
    inf: int = 0


class CopyRecord(Record):
    """A receiver's tensor of which other receivers hold copies (GRAFTER_CHECK_REPLICAS=1), as it was before the write.

    ranks: the role ranks that hold the same part, including this one. checksum: SHA-256 of the values in row-major
    order, with all NaNs equal. Copies are equal if their checksums are. reason: why there is no checksum.
    """

    ranks: list[int]
    checksum: str | None = None
    reason: str | None = None


class LedgerLeaf(Record):
    """One tensor of the point. A point that is a bare tensor has one leaf, whose path is empty."""

    path: str
    shape: list[int]
    dtype: str
    device: str
    before: TensorStatistics | None = None
    incoming: TensorStatistics | None = None
    difference: Difference | None = None
    # How many values were outside the range of the target's dtype (they became its largest value, or infinite).
    saturated: int | None = None
    # The layout that this rank declared; None if it declared none.
    layout: str | None = None
    # How far the sender's replicas are apart (GRAFTER_CHECK_REPLICAS=1); None if none were compared.
    replicas: Difference | None = None
    # If receivers hold copies of this tensor that are to be compared.
    copy_of: CopyRecord | None = None
    # If rows are addressed by token, the token of `max_abs_index`, as `sequence:position`.
    token: str | None = None


class TokenCounts(Record):
    """How many rows that are addressed by token (`tokens=`) were paired.

    matched: rows of this rank that were paired with a row of the other side. only_here: its rows that the other side
    lacks. only_there: tokens of the other side that no rank of this side has. kept_out: rows of this rank that the
    other side excludes (`start=`). only_here_tokens, only_there_tokens: the first, `sequence:position..position`.
    """

    matched: int
    only_here: int
    only_there: int
    kept_out: int = 0
    only_here_tokens: list[str] = []
    only_there_tokens: list[str] = []


class LedgerRecord(Record):
    """What happened to one point on one rank.

    seconds: by stage (snapshot, pairing, exchange, transform, agreement, write, statistics). before, incoming,
    difference: those of the leaf with the largest `rel`. tokens: None if rows are not addressed by token. only_in: the
    job that reached a point that was skipped because only one job reached it (`one_sided`).
    """

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
    tokens: TokenCounts | None = None
    only_in: Role | None = None


# All fields of a LedgerRecord, in its order, from our own points. Validating them would double the cost of the ledger.
LedgerLine = dict[str, Any]


class RankSummary(Record):
    """The summary that one rank writes at close."""

    role: Role
    role_rank: int
    outcomes: dict[str, int]
    # Points that no filter matched, by name. They are counted, not recorded.
    unmatched: dict[str, int]
    filters_never_matched: list[str]
    tags_never_seen: list[str]
    # Modules with hooks that no call reached; those that no rank of the other job has.
    hooks_never_fired: list[str] = []
    modules_only_here: list[str] = []
    # Those of hooks_never_fired whose parts were called, by `module.forward(...)`, say.
    modules_bypassed: list[str] = []
    # Whether no filter of a direction was set.
    only_dumps: bool = False
    # Points saved to disk; those whose file or record could not be written; those that a limit left out, by limit.
    dumped: int = 0
    dumps_lost: int = 0
    dumps_left_out: dict[str, int] = {}
    # Gradients of weights that no longer existed when they were to be read, by name.
    gradients_lost: dict[str, int] = {}
    # Gradients of points that were computed after their step had ended, by name.
    gradients_late: dict[str, int] = {}
    # The error with which this rank left; None if it closed normally.
    error: str | None = None
    # The class of this error, such as "PairingError".
    error_kind: str | None = None
