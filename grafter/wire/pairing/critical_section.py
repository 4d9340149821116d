"""The critical section of a receiver: it carries out the commit protocol, whatever exceptions arrive meanwhile.

An exception may arrive anywhere: Ctrl-C, what a signal handler raises, the end of the run. It is held. This rank then
leaves the point by the protocol, which reads the log and writes if the point was committed; after that the caller
raises the exception. Python runs signal handlers at calls and at the end of loops, so another exception may arrive
while the first is being held: hence the levels."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field

from grafter.core.commit_protocol import (  # fmt: skip
    APPEND,
    AWAIT,
    EXCUSE,
    OPEN,
    PREPARE,
    READ,
    VOTE_YES,
    WAKE,
    WRITE,
    YES,
    Course,
    Outcome,
    Step,
    leave,
    take_part,
)
from grafter.errors import RunError
from grafter.wire.monitor.status_board import Stage
from grafter.wire.pairing.vote_log import VoteLog

# How often a step may fail with one error before that counts as its own error, and not as that of a signal handler.
_TRIES = 3
# How many exceptions may arrive during the few instructions that it takes to hold one.
_LEVELS = 3
_BEGIN, _END = Step("begin"), Step("end")


class Work(ABC):
    """What a receiver does with a point."""

    @abstractmethod
    def prepare(self) -> str | None:
        """Make the value complete, and check that it can be written. Returns why it cannot."""

    @abstractmethod
    def write(self) -> None:
        """Write the value. Called again after an exception; leaves that were written may be written again."""

    @property
    @abstractmethod
    def progress(self) -> int:
        """How many leaves are written."""

    # What this rank does now, for the board; the section says when it votes and when it waits for the others.
    stage: Stage


@dataclass
class Settled:
    """How a point ended on one receiver.

    refusal: None if the point was committed, and this receiver has written; else why no receiver has. held: exceptions
    that arrived, in their order; to be raised now. fault: what prevented this receiver from writing a committed point,
    or from reading the log. is_refused_here: whether this receiver refused the point.
    """

    refusal: str | None
    held: list[BaseException] = field(default_factory=list)
    fault: Exception | None = None
    is_refused_here: bool = False

    @property
    def error(self) -> BaseException | None:
        """What the caller has to raise. Another exception before the end of the run, which the next point raises,
        too."""
        if self.fault is not None and not isinstance(self.fault, RunError):
            return self.fault
        return next((e for e in self.held if not isinstance(e, RunError)), self.held[0] if self.held else self.fault)


class CriticalSection:
    """One point on one receiver; used once."""

    def __init__(self, log: VoteLog, role_rank: int, receivers: Sequence[int], work: Work, who: str) -> None:
        self._log, self._role_rank, self._receivers, self._work, self._who = log, role_rank, receivers, work, who
        self.held: list[BaseException] = []
        self._is_leaving = False
        self._reason = ""
        # The step that failed last, its error, and how often in a row.
        self._failing: tuple[object, ...] = ()
        self._failures = 0

    def run(self) -> Settled:
        """Take part in the point. Raises nothing; what arrives is held."""
        return self._held_back(_LEVELS)

    def _held_back(self, level: int) -> Settled:
        """Each level holds what arrives while the level inside of it holds something. A frame for each: between loops
        within one frame there are instructions that no `try` covers."""
        while True:
            try:
                return self._held_back(level - 1) if level else self._attempt()
            except BaseException as error:
                self.held.append(error)

    def leave(self, error: BaseException) -> Settled:
        """Give the point up, because an exception ended this rank's part before `run`."""
        self.held.append(error)
        self._is_leaving = True
        return self.run()

    def _attempt(self) -> Settled:
        is_leaving, self._is_leaving = self._is_leaving or bool(self.held), True
        course = self._leave() if is_leaving else take_part(self._role_rank, self._receivers)
        send, log, step = course.send, self._log, _BEGIN
        result: object = None
        while True:
            try:
                try:
                    step = send(result)
                except StopIteration as end:
                    step = _END
                    return self._settled(end.value, is_leaving)
                # By identity, in the order of a common point, and not in a function of its own: this is done eight
                # times at each point.
                if step is READ:
                    result = log.read()
                elif step is PREPARE:
                    result = self._prepare()
                elif step is OPEN:
                    result = log.open()
                elif step is VOTE_YES:
                    self._work.stage = "voting"
                    result = log.append(YES, "")
                elif step is WRITE:
                    result = self._work.write()
                else:
                    result = self._perform(step)
            except Exception as error:
                if not self._is_hopeless(step, error):
                    raise
                if step.name != WAKE:
                    return self._settled_by(step, error)
                # The others wait in vain for a message, until their timeout; then they read the log.
                result = None

    def _leave(self) -> Course:
        self._reason = self._reason or self._reason_to_leave()
        return leave(self._role_rank, self._receivers, self._reason)

    def _reason_to_leave(self) -> str:
        name = type(self.held[0]).__name__ if self.held else "an exception"
        return f"{self._who} left with {name}"

    def _prepare(self) -> str | None:
        self._log.offer()
        self._reason = self._work.prepare() or ""
        return self._reason or None

    def _perform(self, step: Step) -> object:
        """All other steps."""
        log = self._log
        if step is AWAIT:
            self._work.stage = "deciding"
            return log.await_news()
        if step.name is WAKE:
            assert step.outcome is not None
            return log.wake(step.outcome, self._reason)
        self._reason = step.reason
        if step.name is APPEND:
            self._work.stage = "voting"
            return log.append(step.kind, step.reason)
        assert step.name is EXCUSE
        return log.excuse(step.reason)

    def _settled(self, outcome: Outcome, is_leaving: bool) -> Settled:
        if outcome.is_committed:
            return Settled(None, self.held)
        if outcome.decided_by == self._role_rank:
            return Settled(self._reason, self.held, is_refused_here=True)
        return Settled(self._log.reason_of(outcome, is_leaving=is_leaving), self.held)

    def _is_hopeless(self, step: Step, error: Exception) -> bool:
        """Whether a step itself fails, so that repeating it is useless."""
        if step.name in (PREPARE.name, AWAIT.name):
            return False
        failing = (step.name, type(error), str(error), self._work.progress)
        self._failures = self._failures + 1 if failing == self._failing else 1
        self._failing = failing
        return self._failures >= _TRIES

    def _settled_by(self, step: Step, error: Exception) -> Settled:
        if step.name == WRITE.name:
            return Settled(None, self.held, error)
        return Settled(
            f"{self._who} cannot use the vote log ({type(error).__name__}: {error}). It has written nothing; it cannot "
            "know whether the other receivers have",
            self.held,
            error,
        )
