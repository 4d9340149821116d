"""One row for each point of a run: the records of its ranks, merged, and how the ranks disagree. Pure."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

from grafter.core.points import FORWARD, OWN_TAGS, is_rank_tag
from grafter.core.records import Difference, LedgerLeaf, LedgerRecord
from grafter.core.roles import receiver_role
from grafter.store.ledger import RankLedger

# From good to bad; a point has the outcome of its worst rank.
_SEVERITY = {
    "posted": 0, "sent": 0, "compared": 1, "grafted": 1, "missed": 2, "expired": 2, "displaced": 2, "skipped": 3,
    "failed": 4,
}  # fmt: skip
# The outcomes of points that do not wait and whose sides did not meet; each side has its own word.
UNMET = ("missed", "expired", "displaced")


@dataclass(frozen=True)
class UnequalCopies:
    """Receivers that hold the same part of a leaf with different values.

    ranks: such as `target 0`. rels: the difference of each rank's copy from the value that it received.
    """

    leaf: str
    ranks: tuple[str, ...]
    rels: tuple[float | None, ...]


@dataclass(frozen=True)
class PointRow:
    """One point, on one rank or merged over all ranks that took part.

    Shape, dtype and differences are those of the worst leaf of the worst receiver. rel: None if no difference was
    measured. nonfinite: the number of NaN and Inf in which the sides differ. seconds: of all stages, on the slowest
    rank. disagreement: how the outcomes of the ranks differ, if they do.
    """

    step: int
    name: str
    tags: dict[str, Any]
    phase: str
    occurrence: int
    direction: str
    outcome: str
    reason: str | None
    ranks: tuple[str, ...]
    leaf: str
    shape: tuple[int, ...] | None
    dtype: str | None
    rel: float | None
    max_abs: float | None
    cosine: float | None
    nonfinite: int
    seconds: float
    bytes_received: int
    call_site: str
    disagreement: str | None = None
    # The difference between the sender's copies, if they were compared and are not equal.
    replicas: Difference | None = None
    # The same for the receiver's copies, and why some were not compared.
    copies: UnequalCopies | None = None
    copies_not_compared: str | None = None
    # The fraction of the leaf's values whose bits differ; None if no difference was measured.
    mismatched: float | None = None
    # Why a compared point, or a part of it, has no figures, so that it is unknown whether it is equal.
    unmeasured: str | None = None
    # The only job that reached a skipped point; "both" if both did and waited for each other.
    only_in: Literal["baseline", "target", "both"] | None = None

    @property
    def label(self) -> str:
        """The point in one text: `layer layer_id=3`."""
        return point_label(self.name, self.tags, self.phase, self.occurrence)

    @property
    def is_trouble(self) -> bool:
        """Whether a reader should look at the point first."""
        return self.outcome in ("failed", "skipped") or self.unmeasured is not None

    def as_json(self) -> str:
        """The row as one line of JSON; NaN and Infinity as in the ledger."""
        replicas = self.replicas.model_dump() if self.replicas is not None else None
        return json.dumps({**asdict(self), "replicas": replicas})


def point_label(name: str, tags: Mapping[str, Any], phase: str, occurrence: int) -> str:
    """A point without its step in one text: `layer layer_id=3 phase=backward #1`."""
    parts = [name, *(f"{tag}={value}" for tag, value in tags.items())]
    parts += [f"phase={phase}"] if phase != FORWARD else []
    return " ".join(parts + ([f"#{occurrence}"] if occurrence else []))


def list_ranks(ledgers: Iterable[RankLedger]) -> list[PointRow]:
    """One row for each record, sorted by step and then by the order of each rank."""
    records = [record for _, _, ranks_records in ledgers for record in ranks_records]
    records.sort(key=lambda record: (record.step, record.sequence, record.role, record.role_rank))
    return [_row([record], _tags(record, None)) for record in records]


def merge_ranks(ledgers: Sequence[RankLedger], key_tags: frozenset[str] | None = None) -> list[PointRow]:
    """One row for each point, sorted by step and then by the order of the first rank that recorded it.

    key_tags: the tags that identify a point; None: all except rank tags.
    """
    present = {f"{role} {rank}" for role, rank, _ in ledgers}
    groups = group_points(ledgers, key_tags)
    return [_row(group, _tags(group[0], key_tags), _disagreement(group, present)) for group in groups]


def group_points(ledgers: Sequence[RankLedger], key_tags: frozenset[str] | None = None) -> list[list[LedgerRecord]]:
    """The records of each point over all ranks, in the order of the rows that `merge_ranks` returns."""
    groups: dict[str, list[LedgerRecord]] = {}
    for _, _, records in ledgers:
        for record in records:
            tags = _tags(record, key_tags)
            identity = json.dumps([record.step, record.name, tags, record.phase, record.occurrence], sort_keys=True)
            groups.setdefault(identity, []).append(record)
    return sorted(groups.values(), key=lambda group: (group[0].step, group[0].sequence))


def _tags(record: LedgerRecord, key_tags: frozenset[str] | None) -> dict[str, Any]:
    """The tags that identify the point, without those that every point has."""
    return {
        tag: value
        for tag, value in record.tags.items()
        if tag not in OWN_TAGS and (tag in key_tags if key_tags is not None else not is_rank_tag(tag))
    }


def _row(group: list[LedgerRecord], tags: dict[str, Any], disagreement: str | None = None) -> PointRow:
    receiving = receiver_role(group[0].direction)
    # The receivers' reasons come first, because senders are only notified of a failure.
    group = sorted(group, key=lambda record: (record.role != receiving, record.role_rank))
    worst = max(group, key=lambda record: _SEVERITY[record.outcome])
    receivers = [record for record in group if record.role == receiving]
    leaf, difference = _worst_leaf(receivers or group)
    copies, copies_not_compared = _compare_copies(receivers)
    return PointRow(
        step=worst.step,
        name=worst.name,
        tags=tags,
        phase=worst.phase,
        occurrence=worst.occurrence,
        direction=worst.direction,
        outcome=worst.outcome,
        reason=worst.reason,
        ranks=tuple(f"{record.role} {record.role_rank}" for record in group),
        leaf=leaf.path if leaf else "",
        shape=tuple(leaf.shape) if leaf else None,
        dtype=leaf.dtype if leaf else None,
        rel=difference.rel if difference else None,
        max_abs=difference.max_abs if difference else None,
        cosine=difference.cosine if difference else None,
        nonfinite=difference.nan + difference.inf if difference else 0,
        seconds=max(sum(record.seconds.values()) for record in group),
        bytes_received=sum(record.bytes_received for record in group),
        call_site=worst.call_site,
        disagreement=disagreement,
        replicas=_unequal_replicas(group),
        copies=copies,
        copies_not_compared=copies_not_compared,
        mismatched=difference.mismatched_fraction if difference else None,
        unmeasured=_why_unmeasured(receivers),
        only_in=_only_in(group),
    )


def _only_in(group: list[LedgerRecord]) -> Literal["baseline", "target", "both"] | None:
    roles = {record.only_in for record in group if record.only_in is not None}
    came = {record.role for record in group}
    if not roles:
        return None
    return roles.pop() if len(came) == 1 else "both"


def _why_unmeasured(receivers: list[LedgerRecord]) -> str | None:
    """Why a receiver that compared the point has no figures for a leaf; None if all have."""
    for record in receivers:
        if record.outcome != "compared":
            continue
        figures = [leaf.difference for leaf in record.leaves] or [record.difference]
        if None in figures:
            return record.reason or "the ledger does not say why"
    return None


def _compare_copies(receivers: list[LedgerRecord]) -> tuple[UnequalCopies | None, str | None]:
    """The worst leaf with unequal copies on receivers, and why some copies could not be compared."""
    held: dict[tuple[str, tuple[int, ...]], dict[int, LedgerLeaf]] = {}
    for record in receivers:
        for leaf in record.leaves if record.outcome in ("grafted", "compared") else ():
            if leaf.copy_of is not None:
                held.setdefault((leaf.path, tuple(leaf.copy_of.ranks)), {})[record.role_rank] = leaf
    unequal: list[UnequalCopies] = []
    why_not: str | None = None
    for (path, ranks), leaves in held.items():
        role = receivers[0].role
        known = {rank: leaf for rank, leaf in leaves.items() if leaf.copy_of is not None and leaf.copy_of.checksum}
        if len(known) < len(ranks):
            rank = next(rank for rank in ranks if rank not in known)
            why = leaves[rank].copy_of if rank in leaves else None
            absent = "its ledger is not here, or has no record of it"
            why_not = f"{role} {rank}: {(why.reason if why else None) or absent}"
        if len({leaf.copy_of.checksum for leaf in known.values() if leaf.copy_of is not None}) > 1:
            rels = tuple(leaf.difference.rel if leaf.difference else None for leaf in known.values())
            unequal.append(UnequalCopies(path, tuple(f"{role} {rank}" for rank in known), rels))
    return max(unequal, key=lambda one: max(rel or 0.0 for rel in one.rels), default=None), why_not


def _unequal_replicas(group: list[LedgerRecord]) -> Difference | None:
    compared = (leaf.replicas for record in group for leaf in record.leaves if leaf.replicas is not None)
    return next((replicas for replicas in compared if replicas.mismatched_fraction), None)


def _worst_leaf(receivers: list[LedgerRecord]) -> tuple[LedgerLeaf | None, Difference | None]:
    """The leaf that differs most over all receivers, with its difference; the first leaf if none was measured."""
    leaves = [leaf for record in receivers for leaf in record.leaves]
    compared = [leaf for leaf in leaves if leaf.difference is not None]
    if compared:
        leaf = max(compared, key=lambda leaf: _badness(leaf.difference))
        return leaf, leaf.difference
    whole = [record.difference for record in receivers if record.difference is not None]
    return (leaves[0] if leaves else None), max(whole, key=_badness, default=None)


def _badness(difference: Difference | None) -> tuple[bool, float, float]:
    assert difference is not None
    rel, mismatched = difference.rel, difference.mismatched_fraction or 0.0
    # Values that are not numbers have no rel even if they differ.
    return difference.nan + difference.inf > 0, (2.0 if mismatched else -1.0) if rel is None else rel, mismatched


def _disagreement(group: list[LedgerRecord], present: set[str]) -> str | None:
    """How the outcomes of the point's ranks differ; None if they do not."""
    there = {f"{record.role} {record.role_rank}": record.outcome for record in group}
    called = {f"{role} {rank}" for role, ranks in group[0].participants.items() for rank in ranks}
    # A rank without a ledger may be on another machine.
    absent = sorted((called & present) - there.keys())
    kinds = {_kind(record) for record in group}
    if not absent and (len(kinds) == 1 or len(set(there.values())) == 1):
        return None
    return "; ".join([f"{rank}: {outcome}" for rank, outcome in there.items()] + [f"{r}: no record" for r in absent])


def _kind(record: LedgerRecord) -> str:
    if record.outcome in UNMET or record.only_in is not None:
        return "missed"
    return "well" if _SEVERITY[record.outcome] < 2 else record.outcome
