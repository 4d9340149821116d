"""The commit protocol: each receiver's part in one point, as pure generators. No I/O happens here.

Every receiver appends its vote to the vote log of the point, which is durable and totally ordered. The log alone
decides, read in order (`outcome_of`):

    YES of every receiver, before any other vote      committed by the last of them: all write
    NO or GIVEN_UP before the last missing YES        refused by that receiver, finally: no rank writes

So a receiver that has not voted keeps the point from being committed, and one that has voted YES may only leave after
it has read the outcome. Whoever has to leave appends GIVEN_UP, reads the log, and carries out what it finds. There is
no leader. Messages wake receivers up; they decide nothing.

A generator yields steps and is sent their results. Its driver (`critical_section`) begins with `take_part`. When an
exception arrives at any step, the driver drops that generator and begins `leave`, as often as it takes.
"""

from __future__ import annotations

from collections.abc import Collection, Generator, Iterable
from functools import lru_cache
from typing import Any, NamedTuple

YES, NO, GIVEN_UP = 1, 2, 3


class Ballot(NamedTuple):
    """One record of a vote log. role_rank: the receiver. kind: YES, NO or GIVEN_UP."""

    role_rank: int
    kind: int


class Outcome(NamedTuple):
    """What a log says. decided_by: the role rank of the receiver whose record decided."""

    is_committed: bool
    decided_by: int


class Step(NamedTuple):
    """What a receiver does next. kind and reason: of an APPEND or EXCUSE. outcome: of a WAKE."""

    name: str
    kind: int = 0
    reason: str = ""
    outcome: Outcome | None = None


# The result of each step is None where nothing else is said.
#
# PREPARE   exchange, transform and checks: None if the value is complete and may be written, else why not
# OPEN      open the log: None, or why that is impossible
# APPEND    append a ballot
# READ      all ballots of the point, in order
# AWAIT     wait until something was appended: None, or why another receiver, which has no log, asks to give up
# WAKE      wake the receivers that wait
# EXCUSE    ask the other receivers to give up, since this one cannot open the log
# WRITE     write the value; repeating it changes nothing
PREPARE, OPEN, READ, AWAIT, WRITE = (Step(name) for name in ("prepare", "open", "read", "await", "write"))
APPEND, WAKE, EXCUSE = "append", "wake", "excuse"
VOTE_YES = Step(APPEND, YES)

Course = Generator[Step, Any, Outcome]


@lru_cache(maxsize=1024)
def wake_step(outcome: Outcome) -> Step:
    """The same ones come again at every point."""
    return Step(WAKE, outcome=outcome)


def outcome_of(ballots: Iterable[Ballot], receivers: Collection[int]) -> Outcome | None:
    """What a log decides; None while it decides nothing."""
    missing = set(receivers)
    for role_rank, kind in ballots:
        if role_rank not in receivers:
            continue
        if kind != YES:
            return Outcome(False, role_rank)
        missing.discard(role_rank)
        if not missing:
            return Outcome(True, role_rank)
    return None


def take_part(role_rank: int, receivers: Collection[int]) -> Course:
    """One receiver's part, from the exchange to the end of its write."""
    refusal = yield PREPARE
    if (problem := (yield OPEN)) is not None:
        return (yield from _excuse_self(role_rank, problem))
    yield VOTE_YES if refusal is None else Step(APPEND, NO, refusal)
    if len(receivers) == 1:
        # Its own vote decides: nothing to read, and no rank to wake.
        if refusal is None:
            yield WRITE
        return Outcome(refusal is None, role_rank)
    while (outcome := outcome_of((yield READ), receivers)) is None:
        asked = yield AWAIT
        if asked is not None:
            yield Step(APPEND, GIVEN_UP, asked)
    # As `_carry_out`, which costs a common point a third more.
    yield wake_step(outcome)
    if outcome.is_committed:
        yield WRITE
    return outcome


def leave(role_rank: int, receivers: Collection[int], reason: str) -> Course:
    """The part of a receiver that has to leave. It waits for no other receiver, and may be repeated at any time."""
    if (problem := (yield OPEN)) is not None:
        return (yield from _excuse_self(role_rank, problem))
    outcome = outcome_of((yield READ), receivers)
    if outcome is None:
        yield Step(APPEND, GIVEN_UP, reason)
        outcome = outcome_of((yield READ), receivers)
        # Its own ballot stands there now.
        assert outcome is not None
    return (yield from _carry_out(outcome))


def _carry_out(outcome: Outcome) -> Course:
    yield wake_step(outcome)
    if outcome.is_committed:
        yield WRITE
    return outcome


def _excuse_self(role_rank: int, problem: str) -> Course:
    """Without the log this receiver has never voted, so no receiver can commit, now or later."""
    yield Step(EXCUSE, GIVEN_UP, problem)
    return Outcome(False, role_rank)
