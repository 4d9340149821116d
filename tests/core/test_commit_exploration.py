"""All receivers write or none does, in every order of the steps of the protocol that runs, within the bounds below.

The bounds count, for all receivers of a run together: exceptions that arrive, receivers that are killed, logs that
cannot be opened, and reads and appends that raise an error though the log lives. Each wait may also end because its
time is up, and any step may take for ever, without a bound.
"""

from __future__ import annotations

import itertools
from collections.abc import Collection

import pytest
from commit_parts import Bounds, Explorer, Violation, shortened

from grafter.core.commit_protocol import (  # fmt: skip
    APPEND,
    AWAIT,
    GIVEN_UP,
    NO,
    OPEN,
    PREPARE,
    READ,
    WAKE,
    WRITE,
    YES,
    Ballot,
    Course,
    Outcome,
    Step,
    outcome_of,
)

HOST, STORE = False, True


@pytest.mark.parametrize(
    ("size", "in_store", "bounds", "states"),
    [
        (1, HOST, Bounds(interrupts=3, kills=1, lost_logs=1), 150),
        (2, HOST, Bounds(interrupts=2, kills=1, lost_logs=1), 6_000),
        (2, STORE, Bounds(interrupts=2, kills=1), 3_000),
        (3, HOST, Bounds(interrupts=1, kills=1), 24_000),
        (3, HOST, Bounds(lost_logs=2), 1_000),
        (3, STORE, Bounds(interrupts=1, kills=1), 17_000),
        (4, HOST, Bounds(kills=1), 20_000),
        (4, HOST, Bounds(lost_logs=1), 5_000),
        (4, STORE, Bounds(), 5_000),
        (2, HOST, Bounds(interrupts=1, kills=1, failures=2), 3_000),
        (2, STORE, Bounds(interrupts=1, kills=1, failures=2), 3_000),
        (3, STORE, Bounds(failures=2), 3_000),
    ],
)
def test_all_write_or_none_does_in_every_order_of_steps(size: int, in_store: bool, bounds: Bounds, states: int) -> None:
    """Also: nobody waits for nothing, all report one outcome, and all write where all vote yes and nothing happens."""
    found = Explorer(size, in_store, bounds).explore()
    print(f"{size} receivers, {'store' if in_store else 'host'}, {bounds}: {found.states} states, ends {found.ends}")
    assert found.states >= states
    assert found.ends["written"] and found.ends["refused"]


def test_states_that_differ_in_the_receivers_names_only_have_the_same_ends() -> None:
    """What makes the exploration small leaves nothing out."""
    for in_store in (HOST, STORE):
        whole = Explorer(2, in_store, Bounds(1, 1), renames=False).explore()
        small = Explorer(2, in_store, Bounds(1, 1)).explore()
        assert whole.states > small.states
        assert set(whole.ends) == set(small.ends)


def test_a_shortened_log_decides_the_same_now_and_later() -> None:
    """All logs of up to four ballots of three receivers, and all that one or two ballots more make of them."""
    ballots = [Ballot(rank, kind) for rank in range(3) for kind in (YES, NO, GIVEN_UP)]
    for length in range(5):
        for log in itertools.product(ballots, repeat=length):
            short = shortened(log, range(3))
            for more in [(), *((one,) for one in ballots)]:
                assert outcome_of(log + more, range(3)) == outcome_of(short + more, range(3)), (log, more)


# The explorer finds what is wrong: mutants of the protocol.


def believe_the_letter(role_rank: int, receivers: Collection[int]) -> Course:
    """Takes a letter for the outcome, instead of reading the log."""
    refusal = yield PREPARE
    yield OPEN
    yield Step(APPEND, YES) if refusal is None else Step(APPEND, NO, refusal)
    outcome = outcome_of((yield READ), receivers)
    if outcome is None:
        yield AWAIT
        outcome = Outcome(True, -1)
    yield Step(WAKE, outcome=outcome)
    if outcome.is_committed:
        yield WRITE
    return outcome


def write_after_own_vote(role_rank: int, receivers: Collection[int]) -> Course:
    """Writes once it has voted yes."""
    refusal = yield PREPARE
    yield OPEN
    yield Step(APPEND, YES) if refusal is None else Step(APPEND, NO, refusal)
    if refusal is None:
        yield WRITE
    while (outcome := outcome_of((yield READ), receivers)) is None:
        yield AWAIT
    yield Step(WAKE, outcome=outcome)
    return outcome


def decide_without_reading_behind_the_letter(role_rank: int, receivers: Collection[int]) -> Course:
    """Reads once, before it votes: another receiver may have given up in between."""
    refusal = yield PREPARE
    yield OPEN
    ballots = yield READ
    mine = Ballot(role_rank, YES if refusal is None else NO)
    yield Step(APPEND, mine.kind, refusal or "")
    outcome = outcome_of((*ballots, mine), receivers)
    while outcome is None:
        yield AWAIT
        outcome = outcome_of((yield READ), receivers)
    yield Step(WAKE, outcome=outcome)
    if outcome.is_committed:
        yield WRITE
    return outcome


def wake_nobody(role_rank: int, receivers: Collection[int]) -> Course:
    refusal = yield PREPARE
    yield OPEN
    yield Step(APPEND, YES) if refusal is None else Step(APPEND, NO, refusal)
    while (outcome := outcome_of((yield READ), receivers)) is None:
        yield AWAIT
    if outcome.is_committed:
        yield WRITE
    return outcome


def leave_without_a_word(role_rank: int, receivers: Collection[int], reason: str) -> Course:
    """Reads, and appends nothing: a later yes of another may still commit the point."""
    yield OPEN
    outcome = outcome_of((yield READ), receivers) or Outcome(False, role_rank)
    yield Step(WAKE, outcome=outcome)
    if outcome.is_committed:
        yield WRITE
    return outcome


def leave_without_reading(role_rank: int, receivers: Collection[int], reason: str) -> Course:
    """Gives up, and does not look whether the point was committed before."""
    yield OPEN
    yield Step(APPEND, GIVEN_UP, reason)
    yield Step(WAKE, outcome=Outcome(False, role_rank))
    return Outcome(False, role_rank)


def leave_without_the_write(role_rank: int, receivers: Collection[int], reason: str) -> Course:
    """Obeys a refusal, and leaves a committed point to the others."""
    yield OPEN
    outcome = outcome_of((yield READ), receivers)
    if outcome is None:
        yield Step(APPEND, GIVEN_UP, reason)
        outcome = outcome_of((yield READ), receivers)
        assert outcome is not None
    yield Step(WAKE, outcome=outcome)
    return outcome


def leave_at_once(role_rank: int, receivers: Collection[int], reason: str) -> Course:
    """Holds no exception back."""
    yield from ()
    return Outcome(False, role_rank)


SOME, SPLIT = "some have written", "another outcome than what it did"
WAITS = "wait for nothing"


@pytest.mark.parametrize("in_store", [HOST, STORE])
@pytest.mark.parametrize(
    ("mutant", "says"),
    [
        ({"take_part": believe_the_letter}, SOME),
        ({"take_part": write_after_own_vote}, SOME),
        ({"take_part": decide_without_reading_behind_the_letter}, SOME),
        ({"take_part": wake_nobody}, WAITS),
        ({"leave": leave_without_a_word}, SOME),
        ({"leave": leave_without_reading}, SOME),
        ({"leave": leave_without_the_write}, f"{SOME}|{SPLIT}"),
        ({"leave": leave_at_once}, f"{SOME}|{SPLIT}"),
        ({"forgets": True, "renames": False}, SOME),
        ({"leave_failed": leave_at_once}, f"{SOME}|{SPLIT}"),
    ],
    ids=[
        "letter",
        "own vote",
        "reads once",
        "wakes nobody",
        "no word",
        "no look",
        "no write",
        "not held",
        "forgets",
        "gives up the log",
    ],
)
def test_the_explorer_finds_what_is_wrong_with_a_mutant(in_store: bool, mutant: dict[str, object], says: str) -> None:
    with pytest.raises(Violation, match=says):
        for size in (2, 3):
            judges_waits = says == WAITS
            Explorer(size, in_store, Bounds(interrupts=1, failures=1), judges_waits=judges_waits, **mutant).explore()  # type: ignore[arg-type]


def test_one_ballot_behind_the_outcome_changes_nothing() -> None:
    """A receiver that gives up too late has given up nothing."""
    log = [Ballot(0, YES), Ballot(1, YES)]
    assert outcome_of(log, (0, 1)) == Outcome(True, 1)
    assert outcome_of([*log, Ballot(0, GIVEN_UP)], (0, 1)) == Outcome(True, 1)
    assert outcome_of([log[0], Ballot(1, GIVEN_UP), Ballot(1, YES)], (0, 1)) == Outcome(False, 1)
    assert outcome_of([Ballot(7, NO), *log], (0, 1)) == Outcome(True, 1)
