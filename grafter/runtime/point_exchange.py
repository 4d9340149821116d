"""The exchange of one point on one rank: pairing, plan, transfer, agreement, and its line in the ledger.

What both ends do is here, and what a sender does; a receiver's part is `point_receiver`.
"""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any

import torch

from grafter.core.leaves import Leaves
from grafter.core.measures.stats import ZERO_DIFFERENCE
from grafter.core.messages.manifest import Header, Pair, store_keys
from grafter.core.messages.states import NotMet
from grafter.core.plan.point_plan import PointPlan, Sides, plan_point
from grafter.core.plan.row_pairing import RowPairing
from grafter.core.plan.transfer_plan import TransferPlan
from grafter.core.processes import Abandoned, PeerGone
from grafter.core.records import LEDGER_SCHEMA_VERSION, Difference, LedgerLine, PointOutcome
from grafter.core.tensor_access import without_gradient
from grafter.errors import PeerLostError, PointFailed, RunError
from grafter.runtime.leaf_figures import LeafFigures
from grafter.runtime.point_preparation import Point
from grafter.runtime.session import Session
from grafter.wire.monitor.status_board import Stage


# Not frozen: one is made at every point, and freezing triples the time that takes.
@dataclass
class PairedPoint:
    """What both sides have brought to one point, and what this rank does with it.

    transfer: what this rank sends and receives of it. extras: tensors for the other side's transform.
    """

    pair: Pair
    plan: PointPlan
    transfer: TransferPlan
    leaves: Leaves
    extras: list[torch.Tensor]


class PointExchange(ABC):
    """One point on one participant, from its header to its line in the ledger. `run` is called once."""

    # Whether this rank receives.
    is_receiver = False

    def __init__(self, session: Session, point: Point, header: Header, sequence: int) -> None:
        """header: this rank's own. sequence: the number of the line in the ledger."""
        assert point.direction is not None
        self._session, self._header, self._sequence = session, header, sequence
        self._key, self._direction, self._options, self._tags = point.key, point.direction, point.options, point.tags
        self._bytes_sent = self._bytes_received = 0
        # For the board, while it lasts.
        self.point, self.call_site = point.key, header.call_site
        self.stage: Stage = "pairing"
        # How long each stage took, for the ledger.
        self._seconds: dict[str, float] = {}
        self._stage_since = time.perf_counter()
        # Where rows are addressed by token: how they paired.
        self.rows: RowPairing | None = None
        # Of a receiver, from when both sides have met: what it measures.
        self._figures: LeafFigures | None = None
        # Of values without tensors, which are compared by their headers.
        self._plain_difference: Difference | None = None

    def run(self, leaves: Leaves | None, extras: list[torch.Tensor]) -> tuple[Any, PointOutcome]:
        """(what `dump` returns, outcome). Raises what ended the run, or PointFailed where the options say so."""
        session, monitor = self._session, self._session.monitor
        monitor.underway = self
        try:
            pair = session.pairing.meet(self._key, self._header, one_sided=self._options.one_sided == "skip")
            if isinstance(pair, NotMet):
                self._end_stage("pairing")
                return leaves.value if leaves is not None else None, self._pass_by(pair)
            try:
                plan = self._plan_of(pair)
                self._end_stage("pairing")
                return self._carry_out(pair, plan, leaves, extras)
            except BaseException as error:
                self._leave(pair, error)
                if pair.is_posted(self._direction):
                    why = f"{self._header.who} left with {type(error).__name__}"
                    session.pairing.claims.settle(self._key.digest, "failed", why)
                raise
        finally:
            monitor.underway = None

    def _plan_of(self, pair: Pair) -> PointPlan:
        known: PointPlan | None = pair.memo.get(self._direction)
        if known is None:
            roster = self._session.roster
            own = roster.graft_rank(self._header.role, self._header.role_rank)
            known = pair.memo[self._direction] = plan_point(self._key.digest, self._direction, pair, roster, own)
        return known

    def _carry_out(
        self, pair: Pair, plan: PointPlan, leaves: Leaves | None, extras: list[torch.Tensor]
    ) -> tuple[Any, PointOutcome]:
        decision = plan.decision
        self.rows = decision.rows
        outcome: PointOutcome
        if decision.outcome is not None or leaves is None or plan.transfer is None:
            outcome, reason = decision.outcome or "skipped", decision.reason
            value = leaves.value if leaves is not None else None
            self._plain_difference = ZERO_DIFFERENCE if outcome == "compared" else None
        else:
            paired = PairedPoint(pair, plan, plan.transfer.of_point(self._key.digest), leaves, extras)
            value, outcome, reason = self._transfer(paired)
        self._finish(plan, outcome, reason)
        if outcome == "failed" and self.is_receiver and self._options.on_transform_error == "raise":
            raise PointFailed(f"the point {self._key} failed on every receiver, and nothing was written: {reason}")
        return value, outcome

    @abstractmethod
    def _transfer(self, paired: PairedPoint) -> tuple[Any, PointOutcome, str | None]:
        """(what `dump` returns, outcome, reason). This rank's part, once both sides have met."""

    def _leave(self, pair: Pair, error: BaseException) -> None:  # noqa: B027 a sender does nothing
        """An exception has ended this rank's part."""

    def _end_of_run(self, gone: PeerGone) -> RunError:
        """A process is gone in the middle of the point: what all ranks raise."""
        session = self._session
        process = session.roster.all[gone.graft_rank].process
        error = PeerLostError(
            f"{session.roster.who(gone.graft_rank)} (pid {process.pid} on {process.hostname}) is gone in the middle of "
            f"the point {self._key}: {gone}. Nothing of this point was written where it was not complete. Look at the "
            "end of its output first."
        )
        return session.monitor.abort(error, session.client)

    def _end_stage(self, stage: str) -> None:
        """All time since the end of the stage before belongs to this one."""
        now, seconds = time.perf_counter(), self._seconds
        seconds[stage] = seconds.get(stage, 0.0) + now - self._stage_since
        self._stage_since = now

    # The end.

    def _pass_by(self, not_met: NotMet) -> PointOutcome:
        """The two sides have not met, since one of them does not wait: the value stays as it is."""
        session, header = self._session, self._header
        sides: Sides = ((), header.participants) if header.role == "target" else (header.participants, ())
        session.finished(sides, session.pairing.keys_to_delete(self._key, header))
        only_in = header.role if not_met.outcome == "skipped" else None
        session.ledger.record({**self._line(sides, not_met.outcome, not_met.reason), "only_in": only_in})
        return not_met.outcome

    def _finish(self, plan: PointPlan, outcome: PointOutcome, reason: str | None) -> None:
        session, receivers = self._session, plan.receivers
        self.stage = "finishing"
        sent = not self.is_receiver and outcome in ("sent", "compared")
        # First, since the store, which the rest may need, can be lost.
        session.ledger.record(self._line(plan.sides, outcome, reason), self._key if sent else None)
        if outcome == "failed":
            self._log_failure(receivers if self.is_receiver else (), reason or "")
        deletable = session.pairing.keys_to_delete(self._key, self._header)
        if self.is_receiver and receivers:
            deletable += session.agreement.keys_to_delete(self._key, receivers, has_failed=outcome == "failed")
            if outcome == "failed" and not plan.is_posted:
                session.ledger.report_failure(self._key, reason or "")
        if plan.is_posted:
            state = "taken" if outcome in ("grafted", "compared") else outcome
            session.pairing.claims.settle(self._key.digest, state, reason)
        session.finished(plan.sides, deletable)

    def _log_failure(self, receivers: tuple[int, ...], reason: str) -> None:
        """One rank of each job logs it. receivers: of this side, where there are any."""
        failure_reporter_rank = min(receivers or self._header.participants)
        if self._session.place.role_rank == failure_reporter_rank:
            self._session.ledger.failures.add(self._key.name, self._key, reason)

    def _line(self, sides: Sides, outcome: PointOutcome, reason: str | None) -> LedgerLine:
        key, place, figures = self._key, self._session.place, self._figures
        worst = figures.worst if figures is not None else None
        return {
            "schema_version": LEDGER_SCHEMA_VERSION,
            "sequence": self._sequence,
            "time": time.time(),
            "name": key.name,
            "tags": self._tags,
            "step": key.step,
            "phase": key.phase,
            "occurrence": key.occurrence,
            "direction": self._direction,
            "role": place.role,
            "role_rank": place.role_rank,
            "outcome": outcome,
            "reason": reason,
            "call_site": self._header.call_site,
            "participants": {"baseline": sides[0], "target": sides[1]},
            "bytes_sent": self._bytes_sent,
            "bytes_received": self._bytes_received,
            "seconds": self._seconds,
            "before": worst.before if worst else None,
            "incoming": worst.incoming if worst else None,
            "difference": worst.difference if worst else self._plain_difference,
            "leaves": figures.records if figures is not None else [],
            "tokens": self.rows.counts(self._header) if self.rows is not None else None,
            "only_in": None,
        }


class SentPoint(PointExchange):
    """One point on one sender."""

    def _transfer(self, paired: PairedPoint) -> tuple[Any, PointOutcome, str | None]:
        session, tensors = self._session, paired.leaves.tensors
        rows = paired.plan.decision.rows_of(self._header)
        if rows is not None:
            tensors = [own.of(tensor) for own, tensor in zip(rows, tensors, strict=True)]
        self.stage = "sending"
        session.ledger.expect_failures()
        outcome_key = store_keys(session.run_prefix, self._key.digest).outcome
        try:
            with without_gradient():
                self._bytes_sent = session.transfer.send(
                    paired.transfer, paired.pair, tensors + paired.extras, self._key, outcome_key
                )
        except Abandoned as abandoned:
            session.agreement.refuse(self._key, str(abandoned))
            return paired.leaves.value, "failed", str(abandoned)
        except PeerGone as gone:
            raise self._end_of_run(gone) from gone
        finally:
            self._end_stage("exchange")
        return paired.leaves.value, "compared" if self._direction == "compare" else "sent", None
