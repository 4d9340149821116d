"""One point on one receiver: receive, transform, check, measure and write, as the commit protocol asks for it."""

from __future__ import annotations

import contextlib
import logging
from functools import lru_cache
from typing import Any

from grafter.config.options import PointOptions
from grafter.core.messages.manifest import Header, Pair
from grafter.core.plan.assembly import Values
from grafter.core.plan.point_plan import PointPlan
from grafter.core.processes import Abandoned, PeerGone, is_from_signal_handler
from grafter.core.records import PointOutcome
from grafter.core.tensor_access import without_gradient
from grafter.core.writing.write_back import WriteMode, Written
from grafter.errors import PointFailed, RunError, TransformError, WriteRefused
from grafter.runtime.leaf_figures import LeafFigures, Stats
from grafter.runtime.point_exchange import PairedPoint, PointExchange
from grafter.runtime.point_preparation import Point
from grafter.runtime.session import Session
from grafter.wire.exchange.incoming import IncomingLeaf, Reception
from grafter.wire.pairing.critical_section import Settled, Work

logger = logging.getLogger("grafter")


class ReceivedPoint(PointExchange, Work):
    """One point on one receiver. Nothing is written before all receivers have voted for it."""

    is_receiver = True
    # From when both sides have met until the point is over.
    _paired: PairedPoint | None = None

    def __init__(self, session: Session, point: Point, header: Header, sequence: int, stats: Stats) -> None:
        """stats: how much is measured of each leaf."""
        super().__init__(session, point, header, sequence)
        self._stats = stats
        self._writes = point.direction != "compare"
        # Whether the receivers' votes have decided the point.
        self._is_settled = False
        # What has arrived for each leaf, and what is written.
        self._incoming: list[IncomingLeaf] = []
        self._written: list[Written] = []

    def _transfer(self, paired: PairedPoint) -> tuple[Any, PointOutcome, str | None]:
        self._paired = paired
        self._figures = LeafFigures(self._key, self._header, paired.plan.decision, self._stats)
        try:
            return self._agree(paired, self._figures)
        finally:
            # The monitor thread may hold this object for a little longer, and the values' memory is needed again.
            self._paired, self._incoming, self._written = None, [], []

    def _agree(self, paired: PairedPoint, figures: LeafFigures) -> tuple[Any, PointOutcome, str | None]:
        """Vote with the other receivers, and write if all agree."""
        plan, leaves = paired.plan, paired.leaves
        settled = self._session.agreement.settle(self._key, plan.receivers, self)
        self._is_settled = True
        outcome: PointOutcome
        if settled.refusal is not None:
            self._end_stage("agreement")
            outcome = "failed"
        else:
            outcome = "grafted" if self._writes else "compared"
        arrived = self._error_of(settled, figures) if settled.held or settled.fault is not None else None
        if arrived is not None:
            with contextlib.suppress(RunError):
                self._finish(plan, outcome, settled.refusal)
            raise arrived
        figures.note_saturated(self._incoming, self._written)
        if outcome == "compared":
            return leaves.value, outcome, figures.why_unmeasured()
        value = leaves.rebuilt([done.value for done in self._written]) if outcome == "grafted" else leaves.value
        return value, outcome, settled.refusal

    def _leave(self, pair: Pair, error: BaseException) -> None:
        """If it was before anything could hold the exception, no receiver must wait for this one."""
        plan: PointPlan | None = pair.memo.get(self._direction)
        if plan is not None and not self._is_settled and self._header.role_rank in plan.receivers:
            self._session.agreement.leave(self._key, plan.receivers, error)

    def _error_of(self, settled: Settled, figures: LeafFigures) -> BaseException | None:
        """What the program's call raises; None if nothing."""
        error = settled.error
        if settled.refusal is not None or settled.fault is None:
            return error
        done, paths = self.progress, [record.path for record in figures.records]
        failed = PointFailed(
            f"all receivers of the point {self._key} had agreed to write, and {self._header.who} could not: "
            f"{type(settled.fault).__name__}: {settled.fault}. It has written the leaves {paths[:done]}, and not, or "
            f"not wholly, {paths[done:]}. The other receivers have written. Restart both jobs before you rely on these "
            "values."
        )
        failed.__cause__ = settled.fault
        return failed

    # What the critical section asks for.

    def prepare(self) -> str | None:
        """The value, complete, checked and measured; else why there is none."""
        paired, figures = self._paired, self._figures
        assert paired is not None and figures is not None
        refusal = self._take_in(paired)
        self.stage = "measuring"
        figures.measure(paired.leaves, self._incoming)
        self._end_stage("statistics")
        if refusal is None and self._writes and self._options.write == "return":
            # Touches no memory of the program, so what could fail here fails before the vote.
            try:
                self._write_all(paired)
            except Exception as error:
                if is_from_signal_handler(error):
                    raise
                return self._explain(error)
        return refusal

    def write(self) -> None:
        """Write what is not written yet. Called again after an exception."""
        self.stage = "writing"
        self._end_stage("agreement")
        if self._writes:
            assert self._paired is not None
            self._write_all(self._paired)
            self._end_stage("write")

    @property
    def progress(self) -> int:
        """How many leaves are written."""
        return len(self._written)

    # The steps.

    def _write_all(self, paired: PairedPoint) -> None:
        """Continues with the first leaf that is not known to be written."""
        mode, written, incoming = _write_mode(self._options), self._written, self._incoming
        originals = paired.leaves.originals
        while (index := len(written)) < len(incoming):
            written.append(incoming[index].write(originals[index], mode))

    def _take_in(self, paired: PairedPoint) -> str | None:
        """Receive the value, transform it, and check it; why there is none."""
        self.stage = "receiving"
        try:
            with without_gradient():
                values = self._receive(paired)
        except Abandoned as abandoned:
            return str(abandoned)
        except PeerGone as gone:
            raise self._end_of_run(gone) from gone
        finally:
            self._end_stage("exchange")
        self.stage = "transforming"
        try:
            with without_gradient():
                incoming = self._transform(paired, values)
            self._check(paired, incoming)
            self._incoming = incoming
        except Exception as error:
            if is_from_signal_handler(error):
                raise
            logger.debug("grafter: %s failed at %s:", self._key, self._header.who, exc_info=error)
            return self._explain(error)
        finally:
            self._end_stage("transform")
        return None

    def _receive(self, paired: PairedPoint) -> Values:
        session, plan = self._session, paired.plan
        if plan.is_posted:
            values, self._bytes_received = session.puller.pull(
                paired.transfer, paired.pair, plan.decision, self._direction
            )
        else:
            values, self._bytes_received = session.transfer.receive(paired.transfer, paired.pair, self._key)
        return values

    def _transform(self, paired: PairedPoint, values: Values) -> list[IncomingLeaf]:
        session = self._session
        reception = Reception(
            self._key, self._tags, self._direction, session.place, session.roster, paired.pair, paired.plan.decision,
            self._header, self._options.transform,
        )  # fmt: skip
        return reception.incoming(values, paired.leaves)

    def _check(self, paired: PairedPoint, incoming: list[IncomingLeaf]) -> None:
        """Raises WriteRefused where a leaf cannot be compared, or may not be written."""
        mode, originals = _write_mode(self._options), paired.leaves.originals
        for original, one in zip(originals, incoming, strict=True):
            if one.target.shape != one.value.shape and (one.is_padded or not self._writes):
                raise WriteRefused(
                    f"a value of shape {list(one.value.shape)} cannot be compared with one of shape "
                    f"{list(one.target.shape)}; a transform can turn one into the other."
                )
            if self._writes:
                one.check(original, mode)
        if self._options.transform is not None:
            for one in incoming:
                one.keep_apart(originals)

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


# There are few, and making one takes as long as three calls.
_known_mode = lru_cache(maxsize=16)(WriteMode)


def _write_mode(options: PointOptions) -> WriteMode:
    return _known_mode(options.write, options.gradient)
