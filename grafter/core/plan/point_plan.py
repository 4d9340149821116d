"""The plan of one point on one rank: what both sides' manifests say about it, worked out alike on every rank."""

from __future__ import annotations

from dataclasses import dataclass

from grafter.core.messages.manifest import Pair
from grafter.core.messages.roster import Roster
from grafter.core.plan.decision import Decision, decide
from grafter.core.plan.transfer_plan import TransferPlan, make_plan
from grafter.core.processes import is_from_signal_handler
from grafter.core.roles import Direction

Sides = tuple[tuple[int, ...], tuple[int, ...]]


@dataclass(frozen=True)
class PointPlan:
    """The plan of one point. It is worked out once, since the same manifests come again in every step.

    transfer: what this rank sends and receives; None where nothing is transferred. sides: the baseline's participants,
    and the target's. receivers: role ranks, in order. is_posted: the senders do not wait.
    """

    decision: Decision
    transfer: TransferPlan | None
    sides: Sides
    receivers: tuple[int, ...]
    is_posted: bool


def plan_point(digest: str, direction: Direction, pair: Pair, roster: Roster, graft_rank: int) -> PointPlan:
    """The plan of the rank `graft_rank`. digest: that of the point's key."""
    transfer, decision = None, decide(direction, pair)
    if decision.outcome is None:
        try:
            transfer = make_plan(digest, direction, pair, decision, roster, graft_rank)
        except ValueError as error:
            if is_from_signal_handler(error):
                raise
            decision = Decision({}, "failed", str(error))
    return PointPlan(
        decision,
        transfer,
        sides=(pair.baseline.headers[0].participants, pair.target.headers[0].participants),
        receivers=tuple(sorted(decision.sources)),
        is_posted=pair.is_posted(direction),
    )
