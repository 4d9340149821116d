"""All of A against all of B: finds pairs, compares them in several threads, reports them in A's execution order.

    open -> pairs -> points, measured by several threads -> severity -> summary

A thread holds one block of each side while the system reads the next one, and the number of points in progress is
bounded, so dumps may be larger than memory. A point that cannot be read gets the verdict `error`, and the others are
compared.
"""

from __future__ import annotations

import os
import time
from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

from grafter.analysis.compare.comparison_records import (
    ComparedLeaf,
    ComparisonHeader,
    FindingKind,
    FindingRecord,
    PointRecord,
    SummaryRecord,
)
from grafter.analysis.compare.conclusion import (
    Chosen,
    describe_verdict,
    exit_code_of,
    innermost_culprits,
    with_severity,
)
from grafter.analysis.compare.point_comparison import Compared, PointTask, compare_point, describe
from grafter.analysis.compare.point_pairs import PointPair, alone, find_pairs
from grafter.config.thresholds import Threshold, Thresholds
from grafter.core.filters.expression import parse_filter
from grafter.core.patterns import compile_match
from grafter.errors import UsageError
from grafter.store.dumps.point import DumpedPoint, Which
from grafter.store.dumps.reader import Dumps, open_dumps
from grafter.version import VERSION

BLOCK_BYTES = 16 << 20


# Called with the number of points that are done, and of all points, for a progress bar.
ComparisonProgress = Callable[[int, int], None]


@dataclass(frozen=True)
class Choice:
    """The options of one comparison.

    which: `grafted` compares values after a graft, if there are any. filter: an expression over tags; None: all points.
    allow: patterns of names that may fail. forbid_skips: skipped points change the exit code. threads: None: one per
    CPU, at most 8.
    """

    thresholds: Sequence[Threshold] = ()
    which: Which = "value"
    filter: str | None = None
    allow: Sequence[str] = ()
    forbid_skips: bool = False
    block_bytes: int = BLOCK_BYTES
    threads: int | None = None


@dataclass(frozen=True)
class Comparison:
    """The outcome of a comparison: the lines that `--json` prints."""

    header: ComparisonHeader
    points: list[PointRecord]
    findings: list[FindingRecord]
    summary: SummaryRecord


def open_both(a: Path, b: Path | None) -> tuple[Dumps, Dumps]:
    """The dumps of two roles: of two directories, or, without `b`, of the baseline and target of one run.

    Raises DumpError if the directories hold no such dumps.
    """
    if b is None:
        return open_dumps(a, role="baseline"), open_dumps(a, role="target")
    return open_dumps(a), open_dumps(b)


def compare(a: Dumps, b: Dumps, choice: Choice, progress: ComparisonProgress = lambda done, of: None) -> Comparison:
    """Compare all points of both. B is judged against A.

    Reads each file of a pair once, and once more for each further dim whose KL a rule reads. Raises ConfigError for an
    illegal filter or pattern, UsageError for another illegal option.
    """
    began = time.monotonic()
    if choice.block_bytes < 1:
        raise UsageError(f"a block has {choice.block_bytes} bytes; at least 1 is needed.")
    for pattern in choice.allow:
        compile_match(pattern)
    points_a, points_b = _chosen(a, choice.filter), _chosen(b, choice.filter)
    pairs, only_a, only_b = find_pairs(points_a, points_b)
    thresholds = Thresholds(choice.thresholds)
    tasks = _tasks(a, b, pairs, thresholds, choice)
    compared: list[Compared] = []
    for one in _run(tasks, choice.threads):
        compared.append(one)
        progress(len(compared), len(tasks))
    points = with_severity([one.record for one in compared])
    findings = [
        *_of_directories(a, b),
        *alone("a", only_a, points_b),
        *alone("b", only_b, points_a),
        *_of_points(points, pairs),
        *(
            FindingRecord(what="note", text=f"the threshold {str(rule)!r} decided no point")
            for rule in thresholds.never_matched(point.name for point in points)
        ),
    ]
    bytes_read = sum(one.bytes_read for one in compared)
    # Only a filter leaves points out.
    chosen = None if choice.filter is None else ((len(points_a), len(a.points)), (len(points_b), len(b.points)))
    summary = _summary(points, findings, choice, chosen, time.monotonic() - began, bytes_read)
    return Comparison(_header(a, b, choice), points, findings, summary)


def _chosen(dumps: Dumps, expression: str | None) -> list[DumpedPoint]:
    if expression is None:
        return list(dumps.points)
    matches = parse_filter(expression, setting="--filter").matches
    return [point for point in dumps.points if matches(point.tags)]


def _tasks(a: Dumps, b: Dumps, pairs: Sequence[PointPair], thresholds: Thresholds, choice: Choice) -> list[PointTask]:
    places = [{id(point): place for place, point in enumerate(own.points)} for own in (a, b)]
    return [
        PointTask(
            pair=pair,
            order=places[0][id(pair.a[0])],
            order_b=places[1][id(pair.b[0])],
            which=choice.which,
            rule=thresholds.rule_for(pair.a[0].name),
            is_allowed=any(compile_match(pattern).fullmatch(pair.a[0].name) for pattern in choice.allow),
            block_bytes=choice.block_bytes,
        )
        for pair in pairs
    ]


def _run(tasks: Sequence[PointTask], threads: int | None) -> Iterator[Compared]:
    """The outcomes of the tasks in order. NumPy and torch do the work, and let other threads run in the meantime.

    A thread without a point measures parts of the other threads' points.
    """
    count = threads or min(8, len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1)
    if count == 1:
        yield from map(compare_point, tasks)
        return
    with ThreadPoolExecutor(count, thread_name_prefix="grafter-compare") as pool:
        under_way: deque[Future[Compared]] = deque()
        try:
            for task in tasks:
                under_way.append(pool.submit(compare_point, replace(task, helpers=pool)))
                if len(under_way) > 2 * count:
                    yield under_way.popleft().result()
            while under_way:
                yield under_way.popleft().result()
        finally:
            # After Ctrl-C, tasks that have not begun are cancelled.
            for future in under_way:
                future.cancel()


def _of_directories(a: Dumps, b: Dumps) -> Iterator[FindingRecord]:
    for side, dumps in (("A", a), ("B", b)):
        for problem in dumps.problems:
            yield FindingRecord(what="damaged", text=f"{side}: {problem}", is_error=True)
        for note in dumps.notes:
            yield FindingRecord(what="note", text=f"{side}: {note}")


def _of_points(points: Sequence[PointRecord], pairs: Sequence[PointPair]) -> Iterator[FindingRecord]:
    """The findings about single points, for readers who do not look through all points."""
    for point, pair in zip(points, pairs, strict=True):
        if point.verdict == "error":
            kind: FindingKind = "no_rule" if point.rule is None else "cannot_compare"
            yield _of_point(point, kind, f"{point.label}: {point.reason}", is_error=True)
        elif point.verdict == "skipped":
            yield _of_point(point, "no_values", f"{point.label}: {point.reason}")
        for side, of_side in (("A", pair.a), ("B", pair.b)):
            missing = sorted({rank for one in of_side for rank in one.missing_ranks})
            if missing:
                text = f"{point.label}: {side}'s ranks {missing} take part in it and left no dump of it"
                yield _of_point(point, "missing_ranks", text)
        for leaf in point.leaves:
            if leaf.replicas:
                yield _of_copies(point, leaf)
        tokens = point.tokens
        if tokens is not None and (tokens.only_a or tokens.only_b):
            examples = ", ".join((*tokens.only_a_tokens, *tokens.only_b_tokens)[:4])
            once = tokens.paired - tokens.again
            again = f" ({tokens.again} rows repeat a token)" if tokens.again else ""
            text = (
                f"{point.label}: {once} tokens are on both sides{again}, {tokens.only_a} only in A and "
                f"{tokens.only_b} only in B ({examples})"
            )
            yield _of_point(point, "other_rows", text)


def _of_copies(point: PointRecord, leaf: ComparedLeaf) -> FindingRecord:
    """The finding that copies differ, even within the rule, which is meant for the difference of two programs."""
    worst = max(leaf.replicas, key=lambda one: (not one.passed, one.difference.rel or 0.0))
    judged = "within" if worst.passed else "beyond"
    text = (
        f"{point.label}{f', {leaf.path}' if leaf.path else ''}: the copies at {worst.side.upper()} differ: ranks "
        f"{worst.ranks} from ranks {worst.first_ranks}, by rel {describe(worst.difference.rel)}, {judged} the rule"
    )
    return FindingRecord(what="unequal_copies", text=text, name=point.name, points=[point.label])


def _of_point(point: PointRecord, what: FindingKind, text: str, *, is_error: bool = False) -> FindingRecord:
    return FindingRecord(
        what=what, text=text, name=point.name, points=[point.label], is_error=is_error, is_skip=not is_error
    )


def _header(a: Dumps, b: Dumps, choice: Choice) -> ComparisonHeader:
    return ComparisonHeader(
        grafter_version=VERSION,
        a=str(a.directory),
        b=str(b.directory),
        role_a=a.role,
        role_b=b.role,
        world_size_a=a.world_size,
        world_size_b=b.world_size,
        which=choice.which,
        filter=choice.filter,
        thresholds=[{"match": rule.match, "require": rule.require} for rule in choice.thresholds],
        allow=list(choice.allow),
        forbid_skips=choice.forbid_skips,
    )


def _summary(
    points: Sequence[PointRecord],
    findings: Sequence[FindingRecord],
    choice: Choice,
    chosen: Chosen | None,
    seconds: float,
    bytes_read: int,
) -> SummaryRecord:
    failed = [point for point in points if point.verdict == "failed"]
    errors = sum(finding.is_error for finding in findings)
    skips = sum(finding.count for finding in findings if finding.is_skip)
    counts: Counter[str] = Counter(point.verdict for point in points)
    exit_code = exit_code_of(counts, errors=errors, skips=skips, forbid_skips=choice.forbid_skips)
    sentence = describe_verdict(
        points, findings, has_rules=bool(choice.thresholds), forbid_skips=choice.forbid_skips, chosen=chosen
    )
    return SummaryRecord(
        counts=dict(counts),
        skips=skips,
        errors=errors,
        first_divergence=failed[0].label if failed else None,
        culprits=[point.label for point in innermost_culprits(points)],
        sentence=sentence,
        exit_code=exit_code,
        seconds=seconds,
        bytes_read=bytes_read,
    )
