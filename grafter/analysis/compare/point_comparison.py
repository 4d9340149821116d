"""One pair of points compared: its tensors found on both sides, measured, and judged by the rule of its name."""

from __future__ import annotations

import time
from collections.abc import Sequence
from concurrent.futures import Executor
from dataclasses import dataclass

from grafter.analysis.compare.measuring import Measured, Value, measure_pair, with_row_tokens
from grafter.analysis.compare.other_leaves import (
    Which,
    compare_checksums,
    compare_others,
    with_missing_ranks,
    with_unsaved,
)
from grafter.analysis.compare.paired_rows import PairedRows
from grafter.analysis.compare.pairs import Pair
from grafter.analysis.compare.record import LeafRecord, PointRecord, ReplicaRecord, SideRecord, TokenRecord, Verdict
from grafter.analysis.compare.token_rows import RowSource, possible_row_ndims, tokens_of
from grafter.config.thresholds import Threshold
from grafter.core.rows.matching import common_row_ndim
from grafter.core.rows.tokens import Tokens
from grafter.errors import GrafterError
from grafter.store.dumps.lazy_tensor import LazyTensor
from grafter.store.dumps.point import DumpedPoint

# The worse, the later.
_ORDER: Sequence[Verdict] = ("passed", "skipped", "allowed", "failed", "error")
_WITHOUT_NARROW = "narrow_"


@dataclass(frozen=True)
class PointTask:
    """What to compare, and how. `order`, `order_b`: the places of the points among all of their side.

    rule: the threshold of its name, None where none covers it. is_allowed: whether it may fail. helpers: threads that
    may measure parts of it.
    """

    pair: Pair
    order: int
    order_b: int
    which: Which
    rule: Threshold | None
    is_allowed: bool
    block_bytes: int
    helpers: Executor | None = None


@dataclass(frozen=True)
class Compared:
    """What came of a task."""

    record: PointRecord
    bytes_read: int


def compare_point(task: PointTask) -> Compared:
    """Reads the files of both sides; what is wrong with one is the verdict `error` of this point, and no exception."""
    began = time.monotonic()
    try:
        leaves, tokens, bytes_read = _compare_leaves(task)
        verdict, reason = _worst(leaves)
    except GrafterError as error:
        leaves, tokens, bytes_read, verdict, reason = [], None, 0, "error", str(error)
    except MemoryError:
        leaves, tokens, bytes_read, verdict, reason = [], None, 0, "error", "it needs more memory than there is"
    except Exception as error:
        # A fault of grafter's own costs this point, not the others.
        reason = f"a fault of grafter's own, which is worth a report: {type(error).__name__}: {error}"
        leaves, tokens, bytes_read, verdict = [], None, 0, "error"
    finally:
        _let_go(task.pair)
    if task.rule is None and verdict != "skipped":
        verdict = "error"
        reason = "no threshold is for this name; add one, or a last one for `*`"
    if verdict == "failed" and task.is_allowed:
        verdict = "allowed"
    first, other = task.pair.a[0], task.pair.b[0]
    worst = _worst_leaf(leaves)
    record = PointRecord(
        order=task.order,
        order_b=task.order_b,
        label=task.pair.label,
        name=first.name,
        tags=dict(first.key.identifying),
        step=first.step,
        phase=first.phase,
        occurrence=first.occurrence,
        call_site_a=first.first.call_site,
        call_site_b=other.first.call_site,
        verdict=verdict,
        rule=str(task.rule) if task.rule is not None else None,
        reason=reason,
        worst_leaf=worst.path if worst is not None else None,
        values=worst.values if worst is not None else {},
        leaves=leaves,
        tokens=tokens,
        seconds=time.monotonic() - began,
    )
    return Compared(record, bytes_read)


def _compare_leaves(task: PointTask) -> tuple[list[LeafRecord], TokenRecord | None, int]:
    pair = task.pair
    if not any(_has_tensors(point) for point in (*pair.a, *pair.b)):
        leaves = with_unsaved(compare_others(pair, keep_equal=True), pair, with_values=False)
        leaves = with_missing_ranks(leaves, pair)
        return leaves or [LeafRecord(path="", verdict="skipped", reason="neither side has a leaf here")], None, 0
    with_values = _holds_values(pair.a) and _holds_values(pair.b)
    if with_values:
        leaves, tokens, bytes_read = _compare_tensors(task)
    else:
        leaves, tokens, bytes_read = [compare_checksums(pair, task.which)], None, 0
    leaves = with_missing_ranks(with_unsaved(leaves, pair, with_values=with_values) + compare_others(pair), pair)
    if not leaves:
        leaves = [LeafRecord(path="", verdict="skipped", reason="neither side has a tensor here")]
    return leaves, tokens, bytes_read


def _compare_tensors(task: PointTask) -> tuple[list[LeafRecord], TokenRecord | None, int]:
    pair = task.pair
    paths = dict.fromkeys(path for point in (*pair.a, *pair.b) for path in point.paths)
    leaves: list[LeafRecord] = []
    tokens: TokenRecord | None = None
    bytes_read = 0
    for path in paths:
        try:
            leaf, own_tokens, count = _compare_leaf(task, path)
            tokens = tokens or own_tokens
            bytes_read += count
        except GrafterError as error:
            leaf = LeafRecord(path=path, verdict="error", reason=str(error))
        leaves.append(leaf)
    return leaves, tokens, bytes_read


def _has_tensors(point: DumpedPoint) -> bool:
    """Whether its value has tensors, saved or not."""
    return any(record.leaves or record.unsaved for record in point.records.values())


def _holds_values(points: Sequence[DumpedPoint]) -> bool:
    """Whether there are files of tensors; of a point that is a mere structure, there is nothing to hold."""
    return all(any(record.file is not None for record in point.records.values()) for point in points)


def _compare_leaf(task: PointTask, path: str) -> tuple[LeafRecord, TokenRecord | None, int]:
    """One tensor. Raises GrafterError where it cannot be read, or the two do not fit together."""
    pair = task.pair
    missing = [side for side, points in (("A", pair.a), ("B", pair.b)) if not all(path in p.paths for p in points)]
    if missing:
        there = "B" if missing == ["A"] else "A"
        return LeafRecord(path=path, verdict="error", reason=f"only {there} has this tensor of the point"), None, 0
    which = [_which(task, point, path) for point in (pair.a[0], pair.b[0])]
    kl_dims = task.rule.kl_dims if task.rule is not None else frozenset()
    tokens: TokenRecord | None = None
    if pair.by_token:
        rows = PairedRows(*_rows_of_both(task, path))
        tokens = _token_record(rows, pair)
        if not tokens.paired:
            return LeafRecord(path=path, verdict="error", reason="no token is on both sides"), tokens, 0
        measured = measure_pair(rows.a, rows.b, kl_dims=kl_dims, block_bytes=task.block_bytes, helpers=task.helpers)
        measured = Measured(
            with_row_tokens(measured.measures, rows.token_at),
            *(measured.values, measured.a, measured.b, measured.replicas, measured.bytes_read),
        )
    else:
        whole = [_reader(task, point, path) for point in (pair.a[0], pair.b[0])]
        measured = measure_pair(*whole, kl_dims=kl_dims, block_bytes=task.block_bytes, helpers=task.helpers)
    leaf = _judged(task, path, measured)
    sides = [_reader(task, point, path) for point in (pair.a[0], pair.b[0])]
    leaf = leaf.model_copy(
        update={
            "a": _side(sides[0], which[0]).model_copy(update={"statistics": measured.a}),
            "b": _side(sides[1], which[1]).model_copy(update={"statistics": measured.b}),
        }
    )
    return leaf, tokens, measured.bytes_read


def _which(task: PointTask, point: DumpedPoint, path: str) -> Which:
    """`grafted` where that is asked for and a graft changed the tensor; else what the program came with."""
    return "grafted" if task.which == "grafted" and point.ranks_with(path, "grafted") else "value"


def _reader(task: PointTask, point: DumpedPoint, path: str) -> LazyTensor:
    return point.reader(path, _which(task, point, path))


def _rows_of_both(task: PointTask, path: str) -> list[list[tuple[RowSource, Tokens]]]:
    """The rows of both sides' points.

    Which dims count the rows is decided over all points, because a pass of one token leaves it open.
    """
    sides = [
        [(_reader(task, point, path), tokens_of(point, path, _which(task, point, path))) for point in points]
        for points in (task.pair.a, task.pair.b)
    ]
    possible = [[possible_row_ndims(tensor, tokens.rows) for tensor, tokens in side] for side in sides]
    of_both = common_row_ndim(own for side in possible for own in side)
    of_each = [of_both if of_both is not None else common_row_ndim(side) for side in possible]
    return [
        [(RowSource(tensor, tokens.rows, row_ndim), tokens) for tensor, tokens in side]
        for side, row_ndim in zip(sides, of_each, strict=True)
    ]


def _token_record(rows: PairedRows, pair: Pair) -> TokenRecord:
    only_a, only_b = rows.only_a, rows.only_b
    return TokenRecord(
        paired=rows.paired,
        again=rows.again,
        only_a=only_a[0],
        only_b=only_b[0],
        points_a=len(pair.a),
        points_b=len(pair.b),
        only_a_tokens=only_a[1],
        only_b_tokens=only_b[1],
        by_content=[list(ids) for ids in rows.by_content],
    )


def _judged(task: PointTask, path: str, measured: Measured) -> LeafRecord:
    rule = task.rule
    replicas = [
        ReplicaRecord(
            side="a" if one.side == "a" else "b",
            ranks=list(one.ranks),
            first_ranks=list(one.first_ranks),
            difference=one.difference,
            passed=rule is not None and _copy_holds(rule, one.values),
        )
        for one in measured.replicas
    ]
    verdict: Verdict = "passed"
    reason = None
    if rule is not None and not rule.holds(measured.values):
        verdict, reason = "failed", why_failed(rule, measured.values)
    elif any(not one.passed for one in replicas):
        worst = next(one for one in replicas if not one.passed)
        verdict = "failed"
        reason = (
            f"copies at {worst.side.upper()} differ: ranks {worst.ranks} from ranks {worst.first_ranks}, "
            f"rel {describe(worst.difference.rel)}, {_fraction(worst.difference.mismatched_fraction)} of the values"
        )
    has_narrow = measured.measures.narrow is not None
    values = {
        name: value for name, value in measured.values.items() if has_narrow or not name.startswith(_WITHOUT_NARROW)
    }
    return LeafRecord(
        path=path, verdict=verdict, reason=reason, measures=measured.measures, values=values, replicas=replicas
    )


def _copy_holds(rule: Threshold, values: dict[str, Value]) -> bool:
    """Copies have no KL of their own: a rule that reads nothing else is one for the pair alone."""
    return rule.holds(values) or all("kl" in name.split("_") for name in rule.names)


def why_failed(rule: Threshold, values: dict[str, Value]) -> str:
    """What the rule read, such as `rel 0.031, max_abs 2`; or the non-finite values that no rule allows."""
    nonfinite = {name: values.get(name) for name in ("nan", "inf") if values.get(name)}
    if nonfinite:
        listed = " and ".join(f"{count} {name}" for name, count in nonfinite.items())
        return f"unequal non-finite values, which no rule allows: {listed}"
    read = ", ".join(f"{name} {describe(values.get(name))}" for name in sorted(rule.names))
    return f"{read}, where the rule is {rule.require}"


def describe(value: Value) -> str:
    """A measure in a sentence."""
    if value is None:
        return "unknown"
    return str(value) if isinstance(value, int) else f"{value:.3g}"


def _fraction(value: float | None) -> str:
    return "some" if value is None else f"{100 * value:.2g} %"


def _side(tensor: LazyTensor, which: Which) -> SideRecord:
    return SideRecord(
        which=which,
        shape=list(tensor.shape),
        dtype=str(tensor.stored_dtype).removeprefix("torch."),
        dims=list(tensor.dim_names) if tensor.dim_names is not None else None,
        layouts=tensor.layouts,
        ranks=list(tensor.ranks),
        summands=tensor.summands,
        replicas=tensor.replicas,
    )


def _worst_leaf(leaves: Sequence[LeafRecord]) -> LeafRecord | None:
    def badness(leaf: LeafRecord) -> tuple[int, bool, float, float]:
        rel, mismatched = leaf.values.get("rel"), leaf.values.get("mismatched_fraction")
        # Equal by checksum, or by value, is equal.
        return _ORDER.index(leaf.verdict), rel is None and mismatched != 0, float(rel or 0.0), float(mismatched or 0.0)

    return max(leaves, key=badness, default=None)


def _worst(leaves: Sequence[LeafRecord]) -> tuple[Verdict, str | None]:
    worst = _worst_leaf(leaves)
    if worst is None:
        return "skipped", None
    reason = worst.reason
    if reason is not None and worst.path:
        reason = f"{worst.path}: {reason}"
    return worst.verdict, reason


def _let_go(pair: Pair) -> None:
    for point in (*pair.a, *pair.b):
        point.let_go()
