"""The fate of a point: what a rank does with one that it reaches; one rule for values, gradients and recordings.

ignore      nothing: no filter matches, or this rank continues ungrafted
save        written to disk, without the other job
record      the same, with what a later graft from the recording needs
defer       both jobs have not joined yet, and this point does not wait: kept until they have
skip        recorded in the ledger as skipped: no rank of the other job has the point's module
exchange    sent to the other job, or received from it
"""

from __future__ import annotations

from typing import Literal, NamedTuple

from grafter.core.roles import Direction

PointFate = Literal["ignore", "save", "record", "defer", "skip", "exchange"]


class PointSituation(NamedTuple):
    """What the fate of a point depends on; frozen.

    direction: which way the tensor goes; None where no filter for a direction matches.
    is_saved: whether the point is written to disk.
    is_detached: this rank lost the other job and continues ungrafted.
    records_alone: there is no other job; points are recorded for a later graft.
    is_too_early: both jobs have not joined yet, and the point does not wait for that (`wait="job"`).
    has_counterpart: False where it is known that no rank of the other job has the point's module.
    """

    direction: Direction | None
    is_saved: bool
    is_detached: bool = False
    records_alone: bool = False
    is_too_early: bool = False
    has_counterpart: bool = True


def fate_of(point: PointSituation) -> PointFate:
    """The fate of a point. Asked again once both jobs have joined, where it depends on the other job's modules."""
    if point.direction is None or point.is_detached:
        return "save" if point.is_saved else "ignore"
    if point.records_alone:
        return "record"
    if point.is_too_early:
        return "defer"
    return "exchange" if point.has_counterpart else "skip"
