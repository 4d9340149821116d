"""One meeting of both sides at one point: pairing, plan, exchange, transform, agreement, write-back, ledger."""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Literal

import torch

from grafter.config.options import PointOptions
from grafter.core.layout.declared import DeclaredLayout
from grafter.core.leaves import Leaves
from grafter.core.measures.flat_chunks import checksum_of_values
from grafter.core.measures.stats import ZERO_DIFFERENCE, compare
from grafter.core.messages.manifest import Header, Pair, store_keys
from grafter.core.messages.states import NotMet
from grafter.core.plan.decision import TransferDecision, decide
from grafter.core.plan.row_pairing import RowPairing
from grafter.core.plan.transfer_plan import TransferPlan, make_plan
from grafter.core.points import PointKey
from grafter.core.processes import Abandoned, PeerGone, is_from_signal_handler
from grafter.core.records import LEDGER_SCHEMA_VERSION, CopyRecord, Difference, LedgerLeaf, LedgerLine, PointOutcome
from grafter.core.roles import Direction, receiver_role
from grafter.core.tensor_access import without_gradient
from grafter.core.writing.write_back import WriteMode, Written
from grafter.errors import PeerLostError, PointFailed, RunError, TransformError, WriteRefused
from grafter.runtime.session import Session
from grafter.wire.exchange.incoming import IncomingLeaf, Reception
from grafter.wire.monitor.stages import Stage
from grafter.wire.pairing.critical_section import Settled, Work

logger = logging.getLogger("grafter")

Stats = Literal["full", "light", "off"]
Sides = tuple[tuple[int, ...], tuple[int, ...]]


@dataclass(frozen=True)
class _Course:
    """What both manifests lead to on this rank: worked out once, since they come again in every step.

    sides: the baseline's participants, and the target's. receivers: role ranks, in order. is_posted: the senders have
    posted it and gone on.
    """

    decision: TransferDecision
    plan: TransferPlan | None
    sides: Sides
    receivers: tuple[int, ...]
    is_posted: bool


class Meeting:
    """One point on one participant, from its header to its line in the ledger."""

    def __init__(
        self,
        session: Session,
        key: PointKey,
        direction: Direction,
        header: Header,
        options: PointOptions,
        tags: dict[str, Any],
    ) -> None:
        self._session, self._key, self._direction = session, key, direction
        self._header, self._options, self._tags = header, options, tags
        self._seconds: dict[str, float] = {}
        self._stage_since = time.perf_counter()
        self._leaf_records: list[LedgerLeaf] = []
        self._bytes_sent = self._bytes_received = 0
        self._sequence = 0
        self._is_receiver = session.place.role == receiver_role(direction)
        self.writes = direction != "compare"
        self._is_settled = False
        # For the board, while it lasts.
        self.stage: Stage = "pairing"
        self.point, self.call_site = key, header.call_site
        # Where rows are addressed by token: how they paired.
        self.rows: RowPairing | None = None
        # Of values without tensors, which are compared by their headers.
        self._plain_difference: Difference | None = None
        # Why a leaf has no figures.
        self._no_figures: str | None = None

    def hold(
        self, leaves: Leaves | None, extras: list[torch.Tensor], stats: Stats, sequence: int
    ) -> tuple[Any, PointOutcome]:
        """(what `dump` returns, outcome). Raises what ended the run, or PointFailed where the options say so."""
        self._sequence = sequence
        housekeeping = self._session.housekeeping
        housekeeping.underway = self
        try:
            pair = self._session.pairing.meet(self._key, self._header, one_sided=self._options.one_sided == "skip")
            if isinstance(pair, NotMet):
                self.end_stage("pairing")
                return leaves.value if leaves is not None else None, self._pass_by(pair)
            try:
                course = self._course(pair)
                self.end_stage("pairing")
                return self._hold(pair, course, leaves, extras, stats)
            except BaseException as error:
                self._leave(pair, error)
                if pair.is_posted(self._direction):
                    why = f"{self._header.who} left with {type(error).__name__}"
                    self._session.pairing.claims.settle(self._key.digest, "failed", why)
                raise
        finally:
            housekeeping.underway = None

    def _leave(self, pair: Pair, error: BaseException) -> None:
        """An exception ended this rank's part. Where that was before anything could hold it, no receiver must wait."""
        course: _Course | None = pair.memo.get(self._direction)
        if course is None or not self._is_receiver or self._is_settled:
            return
        if self._header.role_rank in course.receivers:
            self._session.agreement.leave(self._key, course.receivers, error)

    def _pass_by(self, not_met: NotMet) -> PointOutcome:
        """The two sides have not met, since one of them does not wait: the value goes on as it is."""
        session, header = self._session, self._header
        sides: Sides = (header.participants, ())
        if header.role == "target":
            sides = ((), header.participants)
        session.finished(sides, session.pairing.keys_to_delete(self._key, header))
        only_in = header.role if not_met.outcome == "skipped" else None
        session.record({**self._line(sides, not_met.outcome, not_met.reason), "only_in": only_in})
        return not_met.outcome

    def _hold(
        self, pair: Pair, course: _Course, leaves: Leaves | None, extras: list[torch.Tensor], stats: Stats
    ) -> tuple[Any, PointOutcome]:
        decision = course.decision
        plan = course.plan.of_point(self._key.digest) if course.plan is not None else None
        value = leaves.value if leaves is not None else None
        self.rows = decision.rows
        outcome: PointOutcome
        reason = decision.reason
        if decision.outcome is not None or leaves is None or plan is None:
            outcome = decision.outcome or "skipped"
            self._plain_difference = ZERO_DIFFERENCE if outcome == "compared" else None
        elif not self._is_receiver:
            outcome, reason = self._send(pair, course, plan, self._outgoing(decision, leaves) + extras)
        else:
            reception = _Receiving(self, pair, course, plan, leaves, stats)
            outcome, reason = self._receive(course, reception)
            if outcome == "grafted":
                value = leaves.rebuilt([w.value for w in reception.written])
        self._finish(course, outcome, reason)
        if outcome == "failed" and self._is_receiver and self._options.on_transform_error == "raise":
            raise PointFailed(f"the point {self._key} failed on every receiver, and nothing was written: {reason}")
        return value, outcome

    # The steps.

    def _course(self, pair: Pair) -> _Course:
        known: _Course | None = pair.memo.get(self._direction)
        if known is None:
            known = pair.memo[self._direction] = self._work_out(pair)
        return known

    def _work_out(self, pair: Pair) -> _Course:
        roster, direction = self._session.roster, self._direction
        plan, decision = None, decide(direction, pair)
        if decision.outcome is None:
            try:
                me = roster.graft_rank(self._header.role, self._header.role_rank)
                plan = make_plan(self._key.digest, direction, pair, decision, roster, me)
            except ValueError as error:
                if is_from_signal_handler(error):
                    raise
                decision = TransferDecision({}, "failed", str(error))
        return _Course(
            decision,
            plan,
            sides=(pair.baseline.headers[0].participants, pair.target.headers[0].participants),
            receivers=tuple(sorted(decision.sources)),
            is_posted=pair.is_posted(direction),
        )

    def _outgoing(self, decision: TransferDecision, leaves: Leaves) -> list[torch.Tensor]:
        rows = decision.rows_of(self._header)
        if rows is None:
            return leaves.tensors
        return [own.of(tensor) for own, tensor in zip(rows, leaves.tensors, strict=True)]

    def _send(
        self, pair: Pair, course: _Course, plan: TransferPlan, tensors: Sequence[torch.Tensor]
    ) -> tuple[PointOutcome, str | None]:
        session = self._session
        self.stage = "sending"
        session.expect_failures()
        outcome_key = store_keys(session.client.run_prefix, self._key.digest).outcome
        try:
            with without_gradient():
                self._bytes_sent = session.transfer.send(plan, pair, tensors, self._key, outcome_key)
        except Abandoned as abandoned:
            session.agreement.refuse(self._key, str(abandoned))
            return "failed", str(abandoned)
        except PeerGone as gone:
            raise self._end_of_run(gone) from gone
        finally:
            self.end_stage("exchange")
        return ("compared" if self._direction == "compare" else "sent"), None

    def _receive(self, course: _Course, receiving: _Receiving) -> tuple[PointOutcome, str | None]:
        settled = self._session.agreement.settle(self._key, course.receivers, receiving)
        self._is_settled = True
        if settled.refusal is not None:
            self.end_stage("agreement")
            outcome: PointOutcome = "failed"
        else:
            outcome = "compared" if self._direction == "compare" else "grafted"
        arrived = self._error_of(settled, receiving)
        if arrived is not None:
            with contextlib.suppress(RunError):
                self._finish(course, outcome, settled.refusal)
            raise arrived
        self._note_saturated(receiving)
        if outcome == "compared":
            return outcome, self._why_unmeasured(receiving.stats)
        return outcome, settled.refusal

    def _error_of(self, settled: Settled, receiving: _Receiving) -> BaseException | None:
        error = settled.error
        if settled.refusal is not None or settled.fault is None:
            return error
        done, paths = receiving.progress, [record.path for record in self._leaf_records]
        failed = PointFailed(
            f"all receivers of the point {self._key} had agreed to write, and {self._header.who} could not: "
            f"{type(settled.fault).__name__}: {settled.fault}. It has written the leaves {paths[:done]}, and not, or "
            f"not wholly, {paths[done:]}. The other receivers have written. Restart both jobs before you rely on these "
            "values."
        )
        failed.__cause__ = settled.fault
        return failed

    def _note_saturated(self, receiving: _Receiving) -> None:
        for index, (one, done) in enumerate(zip(receiving.incoming, receiving.written, strict=False)):
            count = one.saturated if one.saturated is not None else done.saturated
            if count is not None:
                self._leaf_records[index] = self._leaf_records[index].model_copy(update={"saturated": count})

    def prepare(
        self, receiving: _Receiving, pair: Pair, course: _Course, plan: TransferPlan, leaves: Leaves, stats: Stats
    ) -> str | None:
        """The value, complete, checked and measured; else why there is none."""
        receiving.incoming, refusal = self._take_in(pair, course, plan, leaves)
        self.stage = "measuring"
        self._measure(course.decision, leaves, receiving.incoming, stats)
        self.end_stage("statistics")
        if refusal is None and self.writes and self._options.write == "return":
            # Touches no memory of the program. So what could fail here fails before the vote.
            try:
                self.write(receiving, leaves)
            except Exception as error:
                if is_from_signal_handler(error):
                    raise
                return self._explain(error)
        return refusal

    def write(self, receiving: _Receiving, leaves: Leaves) -> None:
        """Goes on with the first leaf that is not known to be written."""
        mode, written = WriteMode(self._options.write, self._options.gradient), receiving.written
        while len(written) < len(receiving.incoming):
            index = len(written)
            written.append(receiving.incoming[index].write(leaves.originals[index], mode))

    def _take_in(
        self, pair: Pair, course: _Course, plan: TransferPlan, leaves: Leaves
    ) -> tuple[list[IncomingLeaf], str | None]:
        """What comes in for each leaf, complete and checked; or why there is nothing."""
        decision = course.decision
        self.stage = "receiving"
        try:
            with without_gradient():
                if course.is_posted:
                    values, self._bytes_received = self._session.puller.pull(plan, pair, decision, self._direction)
                else:
                    values, self._bytes_received = self._session.transfer.receive(plan, pair, self._key)
        except Abandoned as abandoned:
            return [], str(abandoned)
        except PeerGone as gone:
            raise self._end_of_run(gone) from gone
        finally:
            self.end_stage("exchange")
        self.stage = "transforming"
        try:
            place, roster, transform = self._session.place, self._session.roster, self._options.transform
            reception = Reception(
                self._key, self._tags, self._direction, place, roster, pair, decision, self._header, transform
            )
            with without_gradient():
                incoming = reception.incoming(values, leaves)
            self._check(leaves, incoming)
            if transform is not None:
                for one in incoming:
                    one.keep_apart(leaves.originals)
        except Exception as error:
            if is_from_signal_handler(error):
                raise
            logger.debug("grafter: %s failed at %s:", self._key, self._header.who, exc_info=error)
            return [], self._explain(error)
        finally:
            self.end_stage("transform")
        return incoming, None

    def _check(self, leaves: Leaves, incoming: Sequence[IncomingLeaf]) -> None:
        mode = WriteMode(self._options.write, self._options.gradient)
        for original, one in zip(leaves.originals, incoming, strict=True):
            if one.target.shape != one.value.shape and (self._direction == "compare" or one.is_padded):
                raise WriteRefused(
                    f"a value of shape {list(one.value.shape)} cannot be compared with one of shape "
                    f"{list(one.target.shape)}; a transform can turn one into the other."
                )
            if self._direction != "compare":
                one.check(original, mode)

    def _explain(self, error: Exception) -> str:
        """Why this receiver cannot write, for the ledgers of all of them."""
        who = self._header.who
        if isinstance(error, (WriteRefused, TransformError)):
            return f"{who}: {error}"
        where = ""
        frame = error.__traceback__
        while frame is not None and frame.tb_next is not None:
            frame = frame.tb_next
        if frame is not None:
            where = f" at {frame.tb_frame.f_code.co_filename}:{frame.tb_lineno}"
        transform = self._options.transform
        name = f"the transform {transform.path}" if transform is not None else "reading what came"
        return f"{who}: {name} failed with {type(error).__name__}: {error}{where}"

    def _measure(
        self, decision: TransferDecision, leaves: Leaves, incoming: Sequence[IncomingLeaf], stats: Stats
    ) -> None:
        records = []
        for index, (spec, target) in enumerate(zip(leaves.specs, leaves.tensors, strict=True)):
            record = _record_of(spec.path, spec.shape, spec.dtype, target.device, self._layout_of(index))
            figures: dict[str, Any] = {}
            if stats != "off" and incoming:
                try:
                    before, arrived, difference = compare(incoming[index].target, incoming[index].value, stats)
                    placed = incoming[index].placed(difference)
                    figures = {
                        "before": before, "incoming": arrived, "difference": placed,
                        "token": self._token_of(index, difference),
                    }  # fmt: skip
                except Exception as error:
                    if is_from_signal_handler(error):
                        raise
                    # Out of memory, say: it costs the figures, not the point.
                    self._no_figures = f"no figures of {spec.path or 'the tensor'}: {type(error).__name__}: {error}"
                    logger.warning("grafter: no statistics of %s: %s: %s", self._key, type(error).__name__, error)
            if incoming and incoming[index].replicas is not None:
                figures["replicas"] = incoming[index].replicas
            if incoming and (copy := self._copy(decision, index, incoming[index].target)) is not None:
                figures["copy_of"] = copy
            records.append(record.model_copy(update=figures) if figures else record)
        self._leaf_records = records

    def _why_unmeasured(self, stats: Stats) -> str | None:
        """Why a comparison has no figures; None where each leaf has some."""
        missing = next((record.path for record in self._leaf_records if record.difference is None), None)
        if missing is None:
            return None
        if stats == "off":
            return "GRAFTER_STATS=off: no figures were taken"
        return self._no_figures or f"no figures of {missing or 'the tensor'} were taken"

    def _copy(self, decision: TransferDecision, leaf: int, target: torch.Tensor) -> CopyRecord | None:
        """This rank's copy, where other receivers have copies that are to be compared with it, by all ledgers."""
        reshardings = decision.reshardings
        ranks = reshardings[leaf].copies_with(self._header.role_rank) if reshardings is not None else ()
        if not ranks:
            return None
        try:
            return CopyRecord(ranks=list(ranks), checksum=checksum_of_values(target))
        except Exception as error:
            if is_from_signal_handler(error):
                raise
            # As with statistics: it costs the figure, not the point.
            logger.warning("grafter: no checksum of %s: %s: %s", self._key, type(error).__name__, error)
            return CopyRecord(ranks=list(ranks), reason=f"{type(error).__name__}: {error}")

    def _token_of(self, leaf: int, found: Difference | None) -> str | None:
        """The token in which a difference of the rows that have a partner is largest."""
        if self.rows is None or found is None or not found.max_abs_index:
            return None
        return self.rows.name(self._header, leaf, found.max_abs_index[0])

    def _layout_of(self, leaf: int) -> DeclaredLayout | None:
        return self._header.layouts[leaf] if self._header.layouts else None

    def _end_of_run(self, gone: PeerGone) -> RunError:
        roster = self._session.roster
        process = roster.all[gone.graft_rank].process
        error = PeerLostError(
            f"{roster.who(gone.graft_rank)} (pid {process.pid} on {process.hostname}) is gone in the middle of "
            "the point "
            f"{self._key}: {gone}. Nothing of this point was written where it was not complete. Look at the end of its "
            f"output first."
        )
        return self._session.housekeeping.abort(error, self._session.client)

    def end_stage(self, stage: str) -> None:
        """All time since the end of the stage before is this one's."""
        now = time.perf_counter()
        self._seconds[stage] = self._seconds.get(stage, 0.0) + now - self._stage_since
        self._stage_since = now

    # The end.

    def _finish(self, course: _Course, outcome: PointOutcome, reason: str | None) -> None:
        session, receivers = self._session, course.receivers
        self.stage = "finishing"
        sent = not self._is_receiver and outcome in ("sent", "compared")
        # First, since the store, which the rest may need, can be lost.
        session.record(self._line(course.sides, outcome, reason), self._key if sent else None)
        if outcome == "failed":
            self._log_failure(receivers if self._is_receiver else (), reason or "")
        deletable = session.pairing.keys_to_delete(self._key, self._header)
        if self._is_receiver and receivers:
            deletable += session.agreement.keys_to_delete(self._key, receivers, has_failed=outcome == "failed")
            if outcome == "failed" and not course.is_posted:
                session.tell_failure(self._key, reason or "")
        if course.is_posted:
            state = "taken" if outcome in ("grafted", "compared") else outcome
            session.pairing.claims.settle(self._key.digest, state, reason)
        session.finished(course.sides, deletable)

    def _log_failure(self, receivers: Sequence[int], reason: str) -> None:
        """By one rank of each job. receivers: of this side, where there are any."""
        if self._session.place.role_rank == min(receivers or self._header.participants):
            self._session.failures.add(self._key.name, self._key, reason)

    def _line(self, sides: Sides, outcome: PointOutcome, reason: str | None) -> LedgerLine:
        key, place = self._key, self._session.place
        worst = max(self._leaf_records, key=_badness, default=None)
        return {
            "schema_version": LEDGER_SCHEMA_VERSION,
            "sequence": self._sequence,
            "time": time.time(),
            "name": key.name,
            "tags": {tag: value for tag, value in self._tags.items() if tag not in ("name", "step", "phase")},
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
            "leaves": self._leaf_records,
            "tokens": self.rows.counts(self._header) if self.rows is not None else None,
            "only_in": None,
        }


class _Receiving(Work):
    """What one receiver does with a point, once both sides have met."""

    def __init__(
        self, meeting: Meeting, pair: Pair, course: _Course, plan: TransferPlan, leaves: Leaves, stats: Stats
    ) -> None:
        self._meeting, self._pair, self._course, self._plan = meeting, pair, course, plan
        self._leaves, self.stats = leaves, stats
        self.incoming: list[IncomingLeaf] = []
        self.written: list[Written] = []

    def prepare(self) -> str | None:
        return self._meeting.prepare(self, self._pair, self._course, self._plan, self._leaves, self.stats)

    def write(self) -> None:
        self._meeting.stage = "writing"
        self._meeting.end_stage("agreement")
        if self._meeting.writes:
            self._meeting.write(self, self._leaves)
            self._meeting.end_stage("write")

    @property
    def progress(self) -> int:
        return len(self.written)

    def at(self, stage: Stage) -> None:
        self._meeting.stage = stage


@lru_cache(maxsize=4096)
def _record_of(
    path: str, shape: tuple[int, ...], dtype: str, device: torch.device, layout: DeclaredLayout | None
) -> LedgerLeaf:
    """A leaf without figures. The same ones come again at every step."""
    where = str(layout) if layout is not None else None
    return LedgerLeaf(path=path, shape=list(shape), dtype=dtype, device=str(device), layout=where)


def _badness(record: LedgerLeaf) -> tuple[int, float, float]:
    """Orders leaves by how far they differ; unequal infinities and NaN come first."""
    difference = record.difference
    if difference is None:
        return (0, 0.0, 0.0)
    mismatched = difference.mismatched_fraction or 0.0
    # Values that are no numbers, and differ, have no rel.
    rel = difference.rel if difference.rel is not None else 2.0 if mismatched else 0.0
    return (difference.nan + difference.inf, rel, mismatched)
