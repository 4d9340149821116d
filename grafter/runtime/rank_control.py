"""A rank's part in changes of the run: it answers each proposal, is held until it is decided, and takes over in step.

housekeeping thread   `poll`: once a second, and four times a second while something is undecided
program's thread      `end_step`: counts the step up, after the decision where one is due
compiler              `trace`: what is traced now must fit what comes into force later
"""

from __future__ import annotations

import contextlib
import logging
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from grafter.config.control.change import (
    Answer,
    Decision,
    Proposal,
    State,
    answer_place,
    proposal_place,
    question_place,
    state_place,
)
from grafter.config.control.in_force import InForce, TracedPoints, Verdict
from grafter.config.control.recorders import recorder_states, why_none
from grafter.config.direction_filters import DirectionFilters
from grafter.core.messages.roster import Roster
from grafter.core.messages.wire import read_message
from grafter.core.processes import is_from_signal_handler
from grafter.errors import GrafterError, ProtocolError, RunError, UsageError
from grafter.runtime.point_rules import SettingsChange
from grafter.runtime.rank_context import RankContext
from grafter.store.run_files import HistoryLine, append_history
from grafter.wire.control.decision import put_decision, read_decision, try_to_decide
from grafter.wire.monitor.housekeeping import Housekeeping
from grafter.wire.monitor.waits import Wait
from grafter.wire.store_client import StoreClient

logger = logging.getLogger("grafter")

_LOOK_SECONDS = 0.25


@dataclass(frozen=True)
class _InHand:
    """The proposal that is undecided. accepted: as it would be, whatever the step; None where it is refused."""

    number: int
    proposal: Proposal
    answer: Answer
    accepted: InForce | None
    filters: DirectionFilters | None
    since: float


class RankControl:
    """One rank's part in changes of the run. Before the jobs have joined there is no change."""

    def __init__(self, context: RankContext) -> None:
        self._config, self._place, self._steps = context.config, context.place, context.steps
        self._saves = context.saves_points
        self._traced = TracedPoints(context.rules.judge)
        # Guards all below. Held for no round trip and no wait but that of `end_step` for the decision.
        self._lock = threading.RLock()
        self._changed = threading.Condition(self._lock)
        self._in_force = self._last_decided = InForce.at_start(self._config)
        self._to_come: list[SettingsChange] = []
        self._number, self._changes = 0, 0
        self._in_hand: _InHand | None = None
        self._is_held = False
        # Of the housekeeping thread alone.
        self._question, self._states_told = "", 0
        # From joining on.
        self._keeper: Housekeeping | None = None
        self._roster: Roster | None = None
        self._graft_rank = 0
        self._directory: Path | None = None

    def joined(self, keeper: Housekeeping, roster: Roster, graft_rank: int, role_directory: Path) -> None:
        """From here on changes may come."""
        self._roster, self._graft_rank, self._directory = roster, graft_rank, role_directory
        self._keeper = keeper

    # On the program's thread.

    def end_step(self) -> Sequence[SettingsChange]:
        """Count the step up; what is to be in force from here on, in its order, where that changes here.

        Each is handed out again at the next step unless `has_taken_over` is called for it: an interrupt in between
        loses nothing. Waits while a change that this rank has accepted is undecided: no longer than the change allows,
        or than the run lasts.
        """
        # Not by way of the condition, which is in Python, and would take half of the time.
        with self._lock:
            if self._is_held:
                self._wait_for_decision()
            self._steps.next_step()
            if not self._to_come:
                return ()
            return [one for one in self._to_come if one.step <= self._steps.step]

    def has_taken_over(self, one: SettingsChange) -> None:
        """Points of this rank follow the change from here on. Its recorders follow it now, and it is logged."""
        try:
            with self._lock:
                try:
                    self._apply_recorders(one)
                finally:
                    self._in_force = one.in_force
                    self._changes = self._changes if one.number is None else one.number + 1
                    self._to_come.remove(one)
        finally:
            self._tell(one)

    def _apply_recorders(self, one: SettingsChange) -> None:
        if one.proposal is None or one.proposal.change.action != "record":
            return
        try:
            one.proposal.change.recorders.apply()
        except Exception as error:
            if is_from_signal_handler(error):
                raise
            # A recorder's fault must not come out of the program's `step`.
            logger.warning("grafter: %s: a recorder did not change: %r", self._place.who, error)

    def _wait_for_decision(self) -> None:
        keeper, in_hand = self._keeper, self._in_hand
        assert keeper is not None and in_hand is not None
        what = f"the decision on change {in_hand.number} of the run ({in_hand.proposal.change}), at the end of step "
        patience = in_hand.proposal.seconds + self._config.timeout
        wait = Wait("control", f"{what}{self._steps.step}", patience)
        # Where the run is over, the next matched point says so.
        with contextlib.suppress(RunError), keeper.waiting(wait):
            while self._is_held and keeper.aborted is None:
                self._changed.wait(_LOOK_SECONDS)

    def _tell(self, one: SettingsChange) -> None:
        level = logging.INFO if self._place.role_rank == 0 else logging.DEBUG
        why = "the steps to dump are over" if one.proposal is None else f"change {one.number}"
        logger.log(level, "grafter: %s: from step %d on (%s): %s", self._place.who, one.step, why, one.in_force.text)
        if self._place.role_rank != 0 or self._directory is None:
            return
        by, asked = (one.proposal.by, str(one.proposal.change)) if one.proposal is not None else (None, None)
        line = HistoryLine(
            time=time.time(), number=one.number, step=one.step, asked=asked, by=by, in_force=one.in_force
        )
        try:
            append_history(self._directory, line)
        except OSError as error:
            if is_from_signal_handler(error):
                raise
            logger.error("grafter: change %s cannot be written beside the ledger: %s", one.number, error)

    def leave(self) -> None:
        """The run is over for this rank, and its housekeeping: nothing comes any more, and nothing is held."""
        with self._changed:
            self._is_held = False
            never = [one for one in self._to_come if one.proposal is not None]
        for one in never:
            logger.warning(
                "grafter: %s ended in step %d, so change %s (%s), agreed for step %d, was never in force there",
                self._place.who, self._steps.step, one.number, one.proposal and one.proposal.change, one.step,
            )  # fmt: skip

    # On the compiler's.

    def trace(self, filters: DirectionFilters, name: str, arguments: dict[str, Any]) -> Verdict:
        """How a point in code that is being compiled is taken. filters: those in force."""
        with self._changed:
            return self._traced.trace(self.filters_ahead(filters), name, arguments)

    def filters_ahead(self, filters: DirectionFilters) -> list[DirectionFilters]:
        """Those in force, those that were decided for later, and those that may be."""
        in_hand = self._in_hand
        ahead = [filters, *(one.filters for one in self._to_come)]
        return ahead if in_hand is None or in_hand.filters is None else [*ahead, in_hand.filters]

    # On the housekeeping thread.

    def poll(self, client: StoreClient) -> None:
        """Answer what is asked, and learn what is decided. Two round trips where there is nothing.

        Raises RunError where the store is lost, or holds what the protocol does not allow.
        """
        keeper = self._keeper
        assert keeper is not None
        if keeper.aborted is not None:
            keeper.on_tick = None
            return
        self._answer_question(client)
        while self._in_hand is not None or self._take_up(client):
            if not self._learn(client):
                keeper.on_tick = self.poll
                return
        keeper.on_tick = None

    def _answer_question(self, client: StoreClient) -> None:
        question = client.peek(question_place(client.run_prefix))
        if question is None or question.payload == self._question:
            return
        self._question = question.payload
        self._states_told += 1
        assert self._keeper is not None
        points = tuple(self._keeper.board.last_points)
        last_point = f"{points[-1][0]} {points[-1][1]}"[:1000] if points else ""
        with self._changed:
            state = State(
                count=self._states_told, step=self._steps.step, changes=self._changes, in_force=self._in_force,
                to_come=tuple(one.step for one in self._to_come if one.number is not None), last_point=last_point,
                recorders=recorder_states(),
            )  # fmt: skip
        client.set(state_place(client.run_prefix, self._graft_rank), "state", state.model_dump_json())

    def _take_up(self, client: StoreClient) -> bool:
        """The next proposal, answered. False where there is none."""
        proposal = self._read_next(client)
        if proposal is None:
            return False
        number = self._number
        with self._changed:
            in_hand = self._in_hand = self._judge(number, proposal)
            self._is_held = in_hand.accepted is not None
        answer = in_hand.answer.model_dump_json()
        client.put_if_absent(answer_place(client.run_prefix, number, self._graft_rank), "answer", answer)
        return True

    def _read_next(self, client: StoreClient) -> Proposal | None:
        """The next one that is a proposal."""
        while True:
            try:
                sealed = client.peek(proposal_place(client.run_prefix, self._number))
                if sealed is None:
                    return None
                return read_message(Proposal.model_validate_json, sealed.payload, "a change of the run")
            except ProtocolError as error:
                # Whoever wrote it may not: that ends the change, and not the run.
                logger.warning("grafter: %s refuses change %d of the run: %s", self._place.who, self._number, error)
                put_decision(client, self._number, Decision(refused=str(error)[:1000]))
                self._number += 1

    def _judge(self, number: int, proposal: Proposal) -> _InHand:
        now, step = time.monotonic(), self._steps.step
        try:
            if proposal.seconds >= self._config.timeout:
                raise UsageError(
                    f"ranks may be held for {proposal.seconds:g} s, and a point that waits for one of them fails after "
                    f"{self._config.timeout:g} s (GRAFTER_TIMEOUT); give a shorter --hold"
                )
            # As it would be in the next step: where the step stands in a filter, its number changes nothing.
            accepted = self._last_decided.after(proposal.change, step + 1)
            accepted.check(self._config)
            if not self._saves and accepted.window != self._last_decided.window:
                raise UsageError(
                    f"{self._place.who} is played from a recording, whose windows are in its points already; record it "
                    "again with other ones, or change anything else"
                )
            filters = accepted.filters(self._config, saves=self._saves, in_any_step=True)
            why_not = None if accepted.is_off else self._traced.why_not(filters)
        except GrafterError as error:
            why_not = str(error)
        except Exception as error:
            # A fault of our own is an answer, too: whoever gives none keeps all others waiting.
            logger.exception("grafter: %s cannot judge change %d of the run", self._place.who, number)
            why_not = f"{type(error).__name__}: {error}"
        if why_not is not None:
            return _InHand(number, proposal, Answer.refusal(why_not), None, None, now)
        idle = why_none() if proposal.change.action == "record" else None
        return _InHand(number, proposal, Answer(step=step, idle=idle), accepted, filters, now)

    def _learn(self, client: StoreClient) -> bool:
        """Whether the proposal in hand is decided, and then what that means here."""
        in_hand, roster = self._in_hand, self._roster
        assert in_hand is not None and roster is not None
        decision = read_decision(client, in_hand.number)
        if decision is None:
            seconds = in_hand.proposal.seconds
            is_late = time.monotonic() - in_hand.since > seconds
            if self._graft_rank != 0 and not is_late:
                return False
            decision = try_to_decide(client, roster, in_hand.number, is_late=is_late, seconds=seconds)
            if decision is None:
                return False
        if decision.step is not None and in_hand.accepted is None:
            raise ProtocolError(
                f"change {in_hand.number} of the run was put into force from step {decision.step} on, and "
                f"{self._place.who} had refused it. Both jobs need the same grafter, and no other program may write "
                "there."
            )
        coming = self._taking_over(in_hand, decision.step) if decision.step is not None else []
        with self._changed:
            self._in_hand, self._is_held = None, False
            self._number += 1
            if coming:
                # If steps to dump continue, they are part of what comes.
                self._to_come = [one for one in self._to_come if one.number is not None] + coming
                self._last_decided = coming[0].in_force
            self._changed.notify_all()
        if self._graft_rank == 0:
            client_keys = [answer_place(client.run_prefix, in_hand.number, rank) for rank in range(len(roster.all))]
            assert self._keeper is not None
            self._keeper.delete_later(client_keys)
            if decision.refused is not None:
                logger.info("grafter: change %d of the run is refused: %s", in_hand.number, decision.refused)
        return True

    def _taking_over(self, in_hand: _InHand, step: int) -> list[SettingsChange]:
        """What comes from `step` on, and what once the steps to dump are over."""
        in_force = self._last_decided.after(in_hand.proposal.change, step)
        coming = [self._made_ready(step, in_force, in_hand.number, in_hand.proposal)]
        if in_force.dumped_steps is not None:
            coming.append(self._made_ready(in_force.dumped_steps.end, in_force.at_end_of_dump(), None, None))
        return coming

    def _made_ready(
        self, step: int, in_force: InForce, number: int | None, proposal: Proposal | None
    ) -> SettingsChange:
        config = in_force.configured(self._config)
        filters = in_force.filters(self._config, saves=self._saves)
        return SettingsChange(step, in_force, config, filters, number, proposal)
