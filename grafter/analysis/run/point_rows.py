"""A row per point of a run: the records of its ranks, merged, and where the ranks disagree. Pure."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

from grafter.core.points import OWN_TAGS, PHASE, is_rank_tag
from grafter.core.records import Difference, LeafRecord, LedgerRecord, Role
from grafter.core.roles import receiver_role

# From good to bad; a point is as bad as its worst rank.
_SEVERITY = {
    "posted": 0, "sent": 0, "compared": 1, "grafted": 1, "missed": 2, "expired": 2, "displaced": 2, "skipped": 3,
    "failed": 4,
}  # fmt: skip
# Points that do not wait, where the two sides came at different times; each side says it in its own way.
UNMET = ("missed", "expired", "displaced")

RankLedger = tuple[Role, int, list[LedgerRecord]]


@dataclass(frozen=True)
class UnequalCopies:
    """Receivers that hold one part of a leaf with different values.

    ranks: such as `target 0`. rels: how far each differs from the value that it received.
    """

    leaf: str
    ranks: tuple[str, ...]
    rels: tuple[float | None, ...]


@dataclass(frozen=True)
class PointRow:
    """One point, on one rank or merged over all that took part.

    Shape, dtype and differences are those of the worst leaf of the worst receiver. `rel` is None where no difference
    was taken; `nonfinite` counts NaN and Inf on which the sides differ. `seconds` is the slowest rank's, of all stages.
    `disagreement` says how, where ranks had different outcomes.
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
    # How far the sender's copies are apart, where they were compared and are not equal.
    replicas: Difference | None = None
    # The same of the receiver's copies, and why some were not compared.
    copies: UnequalCopies | None = None
    copies_not_compared: str | None = None
    # Over all values of the leaf: the fraction whose bits differ; None where no difference was taken.
    mismatched: float | None = None
    # Of a point that was compared: why some of it has no figures, so that nothing says whether it is equal.
    unmeasured: str | None = None
    # Of a point that was skipped since only one job came to it: which; "both" where the two waited for each other.
    only_in: Literal["baseline", "target", "both"] | None = None

    @property
    def label(self) -> str:
        """The point as a person reads it: `layer layer_id=3`."""
        parts = [self.name, *(f"{tag}={value}" for tag, value in self.tags.items())]
        if self.phase != PHASE:
            parts.append(f"phase={self.phase}")
        if self.occurrence:
            parts.append(f"#{self.occurrence}")
        return " ".join(parts)

    @property
    def is_trouble(self) -> bool:
        return self.outcome in ("failed", "skipped") or self.unmeasured is not None

    def as_json(self) -> str:
        """One line; NaN and Infinity as in the ledger."""
        replicas = self.replicas.model_dump() if self.replicas is not None else None
        return json.dumps({**asdict(self), "replicas": replicas})


def list_ranks(ledgers: Iterable[RankLedger]) -> list[PointRow]:
    """A row per record, in the order of steps and then of each rank."""
    records = [record for _, _, ranks_records in ledgers for record in ranks_records]
    records.sort(key=lambda record: (record.step, record.sequence, record.role, record.role_rank))
    return [_row([record], _tags(record, None)) for record in records]


def merge_ranks(ledgers: Sequence[RankLedger], key_tags: frozenset[str] | None = None) -> list[PointRow]:
    """A row per point, in the order of steps and then of the first rank that recorded it."""
    present = {f"{role} {rank}" for role, rank, _ in ledgers}
    groups = group_points(ledgers, key_tags)
    return [_row(group, _tags(group[0], key_tags), _disagreement(group, present)) for group in groups]


def group_points(ledgers: Sequence[RankLedger], key_tags: frozenset[str] | None = None) -> list[list[LedgerRecord]]:
    """The records of each point, over all ranks; in the order of `merge_ranks`, one for each of its rows."""
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
    # A point that failed is told in the receiver's words; a sender only hears of it.
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
    """Of a comparison: why a receiver has no figures of a leaf."""
    for record in receivers:
        if record.outcome != "compared":
            continue
        figures = [leaf.difference for leaf in record.leaves] or [record.difference]
        if None in figures:
            return record.reason or "the ledger does not say why"
    return None


def _compare_copies(receivers: list[LedgerRecord]) -> tuple[UnequalCopies | None, str | None]:
    """Those of the worst leaf of which receivers have unequal copies; and why some copies could not be compared."""
    held: dict[tuple[str, tuple[int, ...]], dict[int, LeafRecord]] = {}
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


def _worst_leaf(receivers: list[LedgerRecord]) -> tuple[LeafRecord | None, Difference | None]:
    """The leaf that differs most over all receivers, and by how much; without differences, the first leaf."""
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
    # Values that are no numbers, and differ, have no rel.
    return difference.nan + difference.inf > 0, (2.0 if mismatched else -1.0) if rel is None else rel, mismatched


def _disagreement(group: list[LedgerRecord], present: set[str]) -> str | None:
    """How the ranks of one point differ in what happened, or None."""
    there = {f"{record.role} {record.role_rank}": record.outcome for record in group}
    called = {f"{role} {rank}" for role, ranks in group[0].participants.items() for rank in ranks}
    # A rank whose ledger is not here at all may be on another machine.
    absent = sorted((called & present) - there.keys())
    kinds = {_kind(record) for record in group}
    if not absent and (len(kinds) == 1 or len(set(there.values())) == 1):
        return None
    return "; ".join([f"{rank}: {outcome}" for rank, outcome in there.items()] + [f"{r}: no record" for r in absent])


def _kind(record: LedgerRecord) -> str:
    if record.outcome in UNMET or record.only_in is not None:
        return "missed"
    return "well" if _SEVERITY[record.outcome] < 2 else record.outcome
