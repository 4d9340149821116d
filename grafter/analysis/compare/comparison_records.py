"""What `grafter compare --json` prints: one JSON object a line, of four kinds, published as a schema.

    {"kind": "comparison", ...}   first: what was compared with what, and by which rules
    {"kind": "point", ...}        one per pair of points, in the baseline's (A's) execution order
    {"kind": "finding", ...}      what was skipped, damaged or could not be compared, and what deserves mention
    {"kind": "summary", ...}      last: counts, the first divergence, the verdict as a sentence, the exit code

Infinite numbers and NaN are the JSON texts "Infinity", "-Infinity" and "NaN". `python -m json.tool` reads a line, and
`json_schema()` describes all of them. A is the reference (y in docs/compare.md), B is judged (x).
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter

from grafter.core.records import Difference, TensorStatistics

COMPARISON_SCHEMA_VERSION = 1

# failed: beyond its threshold. allowed: the same, and --allow names it. error: it could not be compared, or no rule is
# for it. skipped: neither side holds values (a level that saves none).
ComparisonVerdict = Literal["passed", "failed", "allowed", "error", "skipped"]
# Of a failed point: a module's output that is bad where all its inputs are good; or where one is bad, too; or unknown,
# since no input of it was compared, or the point is no module's output.
Severity = Literal["culprit", "inherited", "unknown"]
FindingKind = Literal[
    "only_in_a", "only_in_b", "no_rule", "cannot_compare", "no_values", "missing_ranks", "damaged", "other_rows",
    "unequal_copies", "note",
]  # fmt: skip


class _Record(BaseModel):
    # Unknown fields are kept out, not refused: a newer grafter may have written the line.
    model_config = ConfigDict(frozen=True, extra="ignore", ser_json_inf_nan="strings")


class BoundsRecord(_Record):
    """A number known up to its bin: low <= number <= high."""

    low: float
    high: float


class UlpRecord(_Record):
    """Over the `counted` positions at which both values have one sign and are normal."""

    counted: int
    max: int | None = None
    mean: float | None = None


class RowRecord(_Record):
    """One row, by its index in the row dims; sequence and position where tokens were given."""

    index: list[int]
    rel: float
    sequence: str | int | None = None
    position: int | None = None


class RowsRecord(_Record):
    """Rows are tokens: `t` or `b s` by the dims, else all but the last dim. percentiles: of the rows' rel.

    differing: rows whose rel is not 0. far: rows whose rel is more than ten times the median row's. nonfinite: rows
    with unequal non-finite values. worst: the rows of the largest rel, the worst first.
    """

    dims: list[str]
    shape: list[int]
    count: int
    differing: int
    far: int
    nonfinite: int
    first_nonfinite: list[int] | None = None
    percentiles: dict[str, BoundsRecord] = {}
    worst: list[RowRecord] = []


class KlRecord(_Record):
    """KL(A||B) in nats over a dim, of all rows: `undefined` ones have NaN logits, and are in no number."""

    dim: str
    rows: int
    undefined: int
    mean: float | None = None
    max: float | None = None
    worst: list[int] | None = None


class Measures(_Record):
    """How far B (x) is from A (y). difference.max_abs_index is A's; `max_abs_index_b` the same place in B.

    magnitudes: how many |d| are 0 ("0"), and how many lie from 2**e up to 2**(e+1) ("2**e").
    """

    difference: Difference
    max_abs_index_b: list[int] | None = None
    ulps: UlpRecord | None = None
    percentiles: dict[str, BoundsRecord] = {}
    magnitudes: dict[str, int] = {}
    rows: RowsRecord | None = None
    kl: list[KlRecord] = []
    # Everything once more in the narrower dtype, where the two differ.
    narrow_dtype: str | None = None
    narrow: Measures | None = None


class SideRecord(_Record):
    """One side of a leaf. shape: of the whole tensor, without padding. layouts: as each rank declared, by rank."""

    which: Literal["value", "grafted"]
    shape: list[int]
    dtype: str
    dims: list[str] | None = None
    layouts: dict[int, str] = {}
    ranks: list[int] = []
    summands: int = 1
    replicas: int = 1
    statistics: TensorStatistics | None = None


class ReplicaRecord(_Record):
    """A copy that differs from the first one of its side, in any bit, and by how much: `x` is this copy."""

    side: Literal["a", "b"]
    ranks: list[int]
    first_ranks: list[int]
    difference: Difference
    passed: bool


class ComparedLeaf(_Record):
    """One tensor of the point; a bare tensor's path is empty. values: every measure by its name in a rule."""

    path: str
    verdict: ComparisonVerdict
    reason: str | None = None
    a: SideRecord | None = None
    b: SideRecord | None = None
    measures: Measures | None = None
    values: dict[str, float | int | None] = {}
    replicas: list[ReplicaRecord] = []


class TokenRecord(_Record):
    """Rows paired by (sequence, position): how many, and how many tokens only one side has.

    again: how many of the paired rows repeat a token that one side has more than once (a server computed it again).
    """

    paired: int
    again: int = 0
    only_a: int
    only_b: int
    points_a: int
    points_b: int
    # The first tokens that only one side has, as "sequence:first position..last position".
    only_a_tokens: list[str] = []
    only_b_tokens: list[str] = []
    by_content: list[list[str | int]] = []


class ComparisonHeader(_Record):
    """The first line."""

    kind: Literal["comparison"] = "comparison"
    schema_version: int = COMPARISON_SCHEMA_VERSION
    grafter_version: str
    a: str
    b: str
    role_a: str | None
    role_b: str | None
    world_size_a: int | None
    world_size_b: int | None
    which: Literal["value", "grafted"]
    filter: str | None
    thresholds: list[dict[str, str]]
    allow: list[str]
    forbid_skips: bool


class PointRecord(_Record):
    """One pair of points. order: A's place in the execution order of all its points; order_b: B's.

    label: name, tags, step, phase and occurrence in one text. rule: the threshold that decided, "pattern: expression".
    values, worst_leaf: of the leaf that is worst, by verdict and then by rel.
    """

    kind: Literal["point"] = "point"
    order: int
    order_b: int | None
    label: str
    name: str
    tags: dict[str, Any]
    step: int
    phase: str
    occurrence: int
    call_site_a: str | None = None
    call_site_b: str | None = None
    verdict: ComparisonVerdict
    severity: Severity | None = None
    rule: str | None = None
    reason: str | None = None
    worst_leaf: str | None = None
    values: dict[str, float | int | None] = {}
    leaves: list[ComparedLeaf] = []
    tokens: TokenRecord | None = None
    seconds: float = 0.0


class FindingRecord(_Record):
    """Something that is no pair of points. count: how many points it is about; points: the first of them."""

    kind: Literal["finding"] = "finding"
    what: FindingKind
    text: str
    name: str | None = None
    count: int = 1
    points: list[str] = []
    near: list[str] = []
    is_skip: bool = False
    is_error: bool = False


class SummaryRecord(_Record):
    """The last line. counts: points by verdict. culprits: those that have no other culprit inside of them."""

    kind: Literal["summary"] = "summary"
    counts: dict[str, int]
    skips: int
    errors: int
    first_divergence: str | None
    culprits: list[str]
    sentence: str
    exit_code: int
    seconds: float
    bytes_read: int


Line = Annotated[ComparisonHeader | PointRecord | FindingRecord | SummaryRecord, Field(discriminator="kind")]
_lines: TypeAdapter[ComparisonHeader | PointRecord | FindingRecord | SummaryRecord] = TypeAdapter(Line)


def json_schema() -> dict[str, Any]:
    """The published schema of a line."""
    return _lines.json_schema(mode="serialization")


def read_line(text: str) -> ComparisonHeader | PointRecord | FindingRecord | SummaryRecord:
    """One line back. Raises pydantic.ValidationError for what is none."""
    return _lines.validate_json(text)
