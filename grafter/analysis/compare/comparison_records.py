"""The output of `grafter compare --json`: one JSON object a line, of four kinds, with a published schema.

    {"kind": "comparison", ...}   first: the two directories, and the rules
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

# failed: beyond its threshold. allowed: the same, but --allow names it. error: it could not be compared, or no rule
# matches it. skipped: there are no values to compare (a level that saves none, say).
ComparisonVerdict = Literal["passed", "failed", "allowed", "error", "skipped"]
# Of a failed point. culprit: a module's output that is bad although all its inputs are good. inherited: one of the
# inputs is bad too. unknown: no input was compared, or the point is not a module's output.
Severity = Literal["culprit", "inherited", "unknown"]
FindingKind = Literal[
    "only_in_a", "only_in_b", "no_rule", "cannot_compare", "no_values", "missing_ranks", "damaged", "other_rows",
    "unequal_copies", "note",
]  # fmt: skip


class _JsonRecord(BaseModel):
    """The base of all lines and their parts: frozen."""

    # Unknown fields are ignored: a newer grafter may have written the line.
    model_config = ConfigDict(frozen=True, extra="ignore", ser_json_inf_nan="strings")


class BoundsRecord(_JsonRecord):
    """Bounds of a number that is known up to its bin: low <= number <= high."""

    low: float
    high: float


class UlpRecord(_JsonRecord):
    """Distances in ULPs over the `counted` positions at which both values are normal and have the same sign."""

    counted: int
    max: int | None = None
    mean: float | None = None


class RowRecord(_JsonRecord):
    """One row, by its index in the row dims; with sequence and position if tokens were given."""

    index: list[int]
    rel: float
    sequence: str | int | None = None
    position: int | None = None


class RowsRecord(_JsonRecord):
    """The measures by row. Rows are tokens: the dims `t` or `b s`, otherwise all dims except the last.

    percentiles: of the rows' rel. differing: rows whose rel is not 0. far: rows whose rel is more than ten times that
    of the median row. nonfinite: rows with unequal non-finite values. worst: the rows with the largest rel, worst
    first.
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


class KlRecord(_JsonRecord):
    """KL(A||B) in nats over a dim, for all rows except the `undefined` ones, which have NaN logits."""

    dim: str
    rows: int
    undefined: int
    mean: float | None = None
    max: float | None = None
    worst: list[int] | None = None


class Measures(_JsonRecord):
    """The difference of B (x) from A (y). max_abs_index_b: in B, the place of `difference.max_abs_index` in A.

    magnitudes: the number of |d| that are 0 ("0"), and of those from 2**e up to 2**(e+1) ("2**e").
    """

    difference: Difference
    max_abs_index_b: list[int] | None = None
    ulps: UlpRecord | None = None
    percentiles: dict[str, BoundsRecord] = {}
    magnitudes: dict[str, int] = {}
    rows: RowsRecord | None = None
    kl: list[KlRecord] = []
    # All measures again in the narrower dtype, if the two dtypes differ.
    narrow_dtype: str | None = None
    narrow: Measures | None = None


class SideRecord(_JsonRecord):
    """One side of a leaf. shape: of the whole tensor, without padding. layouts: each rank's declared layout."""

    which: Literal["value", "grafted"]
    shape: list[int]
    dtype: str
    dims: list[str] | None = None
    layouts: dict[int, str] = {}
    ranks: list[int] = []
    summands: int = 1
    replicas: int = 1
    statistics: TensorStatistics | None = None


class ReplicaRecord(_JsonRecord):
    """A copy that differs in any bit from the first one of its side. difference: x is this copy."""

    side: Literal["a", "b"]
    ranks: list[int]
    first_ranks: list[int]
    difference: Difference
    passed: bool


class ComparedLeaf(_JsonRecord):
    """One leaf of a pair of points; a bare tensor's path is empty. values: every measure by its name in a rule."""

    path: str
    verdict: ComparisonVerdict
    reason: str | None = None
    a: SideRecord | None = None
    b: SideRecord | None = None
    measures: Measures | None = None
    values: dict[str, float | int | None] = {}
    replicas: list[ReplicaRecord] = []


class TokenRecord(_JsonRecord):
    """The counts of rows that were paired by (sequence, position), and of tokens that only one side has.

    again: the number of paired rows that repeat a token (a server computed it again).
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


class ComparisonHeader(_JsonRecord):
    """The first line: what was compared, and how."""

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


class PointRecord(_JsonRecord):
    """One pair of points. order, order_b: the place of the point in the execution order of A's and of B's points.

    label: name, tags, step, phase and occurrence in one text. rule: the threshold that decided, "pattern: expression".
    values, worst_leaf: those of the worst leaf, by verdict and then by rel.
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


class FindingRecord(_JsonRecord):
    """A finding that is not a pair of points. count: the number of points that it concerns. points: the first ones."""

    kind: Literal["finding"] = "finding"
    what: FindingKind
    text: str
    name: str | None = None
    count: int = 1
    points: list[str] = []
    near: list[str] = []
    is_skip: bool = False
    is_error: bool = False


class SummaryRecord(_JsonRecord):
    """The last line. counts: points by verdict. culprits: those that contain no other culprit."""

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
    """The published JSON schema of a line."""
    return _lines.json_schema(mode="serialization")


def read_line(text: str) -> ComparisonHeader | PointRecord | FindingRecord | SummaryRecord:
    """The object of one line. Raises pydantic.ValidationError if the text is not a line."""
    return _lines.validate_json(text)
