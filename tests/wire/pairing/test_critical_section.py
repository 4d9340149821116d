"""No exception keeps a receiver from carrying the outcome out, wherever it arrives; it is raised afterwards."""

from __future__ import annotations

import contextlib
import itertools
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from types import CodeType, FrameType
from typing import Any

import pytest
from vote_log_parts import DIGEST, MessageRouter, Post, Roster, make_wait

from grafter.core import commit_protocol
from grafter.core.commit_protocol import GIVEN_UP, NO, YES, Ballot, Outcome, outcome_of
from grafter.core.messages.manifest import StoreKeys
from grafter.core.messages.wire import Seal, Sealed
from grafter.errors import PeerLostError, RunError
from grafter.wire import bounded_calls, store_client
from grafter.wire.monitor.waits import Wait
from grafter.wire.pairing import critical_section, host_votes, shared_ballots, vote_log
from grafter.wire.pairing.critical_section import CriticalSection, Settled, Work
from grafter.wire.pairing.host_votes import HostLogs, HostVotes
from grafter.wire.pairing.vote_log import OwnVotes, StoreVotes, VoteLog
from grafter.wire.store_client import StoreClient
from grafter.wire.store_server import HostedStore, connect

RECEIVERS = (0, 1)


class Arrived(BaseException):
    """As Ctrl-C."""


class ArrivedAsError(Exception):
    """As what a signal handler of the program may raise."""


class Votes(VoteLog):
    """In memory, as receiver 0 sees it. The other receiver votes before it, while it waits, or not at all."""

    def __init__(self, before: Sequence[Ballot] = (), meanwhile: Sequence[Ballot] = ()) -> None:
        self.ballots, self._meanwhile = list(before), list(meanwhile)
        self.woken = 0

    def open(self) -> str | None:
        return None

    def append(self, kind: int, reason: str) -> None:
        self.ballots.append(Ballot(0, kind))

    def read(self) -> Sequence[Ballot]:
        return list(self.ballots)

    def await_news(self) -> str | None:
        if not self._meanwhile:
            raise RunError("the time is up")
        self.ballots += self._meanwhile
        self._meanwhile = []
        return None

    def wake(self, outcome: Outcome, reason: str) -> None:
        self.woken += 1

    def excuse(self, reason: str) -> None:
        raise AssertionError("the log is open")

    def reason_of(self, outcome: Outcome, *, is_leaving: bool) -> str:
        return "the other refused"


class TwoLeaves(Work):
    def __init__(self, refusal: str | None = None) -> None:
        self.refusal = refusal
        self.leaves = ["old", "old"]
        self.written: list[int] = []

    def prepare(self) -> str | None:
        return self.refusal

    def write(self) -> None:
        while len(self.written) < 2:
            index = len(self.written)
            self.leaves[index] = "new"
            self.written.append(index)

    @property
    def progress(self) -> int:
        return len(self.written)


def make_votes() -> dict[str, Callable[[], VoteLog]]:
    return {
        "the other has voted": lambda: Votes([Ballot(1, YES)]),
        "the other votes meanwhile": lambda: Votes([], [Ballot(1, YES)]),
        "the other refuses meanwhile": lambda: Votes([], [Ballot(1, NO)]),
        "the other never votes": lambda: Votes(),
        "alone": lambda: OwnVotes(0),
        "in shared memory": lambda: in_shared_memory(is_first=True),
        "in shared memory that another rank has made": lambda: in_shared_memory(is_first=False),
    }


def in_shared_memory(*, is_first: bool) -> HostVotes:
    """The log that really runs, as receiver 0 sees it. The other one has voted yes already where it is the lowest rank,
    which makes the log; else it does once receiver 0 waits."""
    post = Post()
    receivers = RECEIVERS if is_first else (1, 0)
    keys, digest, run_prefix = StoreKeys("run", DIGEST), DIGEST, f"run {next(_NUMBERS)}"
    router: Any = VotesMeanwhile(post, 0)
    logs: list[Any] = [HostLogs(router, Roster(), "target", 0, run_prefix), None]  # type: ignore[arg-type]
    other: Any = MessageRouter(post, 1)
    logs[1] = HostLogs(other, Roster(), "target", 1, run_prefix)  # type: ignore[arg-type]
    mine = HostVotes(logs[0], router, keys, digest, receivers, 0, make_wait)
    theirs = HostVotes(logs[1], other, keys, digest, receivers, 1, make_wait)
    if not is_first:
        theirs.offer()
        assert theirs.open() is None
        theirs.append(YES, "")
    router.other = theirs
    return mine


class VotesMeanwhile(MessageRouter):
    """Whoever waits for a message gives the other receiver time to vote."""

    other: HostVotes

    def receive(self, make_wait: Callable[[], Wait], keys: Sequence[str], *, by_channel: bool) -> list[Sealed]:
        self._vote(keys)
        return super().receive(make_wait, keys, by_channel=by_channel)

    def receive_first(self, make_wait: Callable[[], Wait], keys: Sequence[str]) -> tuple[str, Sealed]:
        self._vote(keys)
        return super().receive_first(make_wait, keys)

    def _vote(self, keys: Sequence[str]) -> None:
        if keys[0] not in self._post.boxes[self._rank]:
            assert self.other.open() is None
            self.other.append(YES, "")
            outcome = outcome_of(self.other.read(), RECEIVERS)
            assert outcome is not None
            self.other.wake(outcome, "")


_NUMBERS = itertools.count()


def through_the_store(clients: tuple[StoreClient, StoreClient], *, votes_before: bool) -> StoreVotes:
    """The log that really runs, as receiver 0 sees it. The other one has voted yes already, or does while it waits."""
    keys, writers = StoreKeys(f"run {next(_NUMBERS)}", DIGEST), {"target/0": 0, "target/1": 1}
    theirs = StoreVotes(clients[1], None, keys, writers, make_wait)  # type: ignore[arg-type]
    if votes_before:
        theirs.append(YES, "")
    router: Any = VotesInStore(clients[0], theirs)
    return StoreVotes(clients[0], router, keys, writers, make_wait)


class VotesInStore:
    """Whoever waits gives the other receiver time to vote."""

    def __init__(self, client: StoreClient, other: StoreVotes) -> None:
        self._client, self.other = client, other

    def await_stored(self, make_wait: Callable[[], Wait], key: str) -> None:
        if self._client.peek(key) is None:
            self.other.append(YES, "")
            outcome = outcome_of(self.other.read(), RECEIVERS)
            assert outcome is not None
            self.other.wake(outcome, "")


@pytest.fixture(scope="module")
def clients() -> Iterator[tuple[StoreClient, StoreClient]]:
    """Of two receivers."""
    store = HostedStore()
    first, second = (
        StoreClient(
            connect(store.address, store.port, timeout=30, keep_trying=lambda: True),
            Seal(f"target/{rank}", "secret"),
            "g",
        )
        for rank in RECEIVERS
    )
    yield first, second
    first.close()
    second.close()
    store.close()


def close_logs() -> None:
    """Also those that an exception has kept from being noted."""
    for entry in os.listdir("/proc/self/fd"):
        with contextlib.suppress(OSError):
            if os.readlink(f"/proc/self/fd/{entry}").startswith("/memfd:grafter-votes"):
                os.close(int(entry))


IN_MEMORY = [name for name in make_votes() if "shared" not in name]

# The code in which exceptions arrive.
_FILES = {
    critical_section.__file__, commit_protocol.__file__, host_votes.__file__, shared_ballots.__file__, __file__,
    vote_log.__file__, store_client.__file__, bounded_calls.__file__,
}  # fmt: skip


class Injector:
    """Raises an exception before the n-th instruction that is run in the code above; and perhaps a second one, so many
    instructions behind the place where the first was held."""

    def __init__(self, first: int, second: int | None = None, kind: type[BaseException] = Arrived) -> None:
        self._left, self._second, self._kind = first, second, kind
        self.raised: list[BaseException] = []

    def trace(self, frame: FrameType, event: str, _: Any) -> Any:
        if not self._is_ours(frame.f_code):
            return None
        frame.f_trace_opcodes, frame.f_trace_lines = True, False
        if event == "opcode":
            self._left -= 1
            if self._left < 0:
                self.raised.append(self._kind(f"number {len(self.raised)}"))
                raise self.raised[-1]
        return self.trace

    def _is_ours(self, code: CodeType) -> bool:
        return code.co_filename in _FILES and "Injector" not in code.co_qualname and "Held" not in code.co_qualname

    def run(self, section: CriticalSection) -> Settled:
        section.held = Held(self)  # type: ignore[assignment]
        sys.settrace(self.trace)
        try:
            return section.run()
        finally:
            sys.settrace(None)

    def rearm(self, frame: FrameType | None) -> None:
        """Python stops tracing where a trace function raises."""
        if self._second is None or len(self.raised) != 1:
            return
        self._left = self._second
        sys.settrace(self.trace)
        while frame is not None:
            if self._is_ours(frame.f_code):
                frame.f_trace, frame.f_trace_opcodes, frame.f_trace_lines = self.trace, True, False
            frame = frame.f_back


class Held(list[BaseException]):
    """The exceptions that a section holds."""

    def __init__(self, injector: Injector) -> None:
        super().__init__()
        self._injector = injector

    def append(self, error: BaseException) -> None:
        super().append(error)
        self._injector.rearm(sys._getframe(1))


def judge(make: Callable[[], VoteLog], injector: Injector, refusal: str | None = None) -> bool:
    """Run a section; whether anything was injected. Whatever was, it carries out what the log says.

    In a thread of its own: where a trace function raises in the middle of a handler, Python goes on taking that
    handler's exception for one that is being handled, and whatever a later test raised would have it as its context.
    """
    with ThreadPoolExecutor(1) as thread:
        return thread.submit(judge_here, make, injector, refusal).result()


def judge_here(make: Callable[[], VoteLog], injector: Injector, refusal: str | None) -> bool:
    log, work = make(), TwoLeaves(refusal)
    receivers = (0,) if isinstance(log, OwnVotes) else getattr(log, "_receivers", RECEIVERS)
    section = CriticalSection(log, 0, receivers, work, "target rank 0")
    try:
        settled = injector.run(section)
    except (Arrived, ArrivedAsError) as error:
        # Before the section began, or once all was done: as the meeting does then.
        assert log.open() is None
        outcome = outcome_of(log.read(), receivers)
        assert Ballot(0, YES) not in log.read() or outcome is not None
        assert (work.leaves == ["new", "new"]) == (outcome is not None and outcome.is_committed)
        settled = CriticalSection(log, 0, receivers, work, "target rank 0").leave(error)
    outcome = outcome_of(log.read(), receivers)
    assert outcome is not None, "it has left a point that may still be committed"
    assert work.leaves == (["new", "new"] if outcome.is_committed else ["old", "old"])
    assert (settled.refusal is None) == outcome.is_committed
    assert settled.fault is None
    if injector.raised:
        assert settled.error is not None
        chain = {id(error) for held in (*section.held, *settled.held) for error in contexts(held)}
        assert {id(error) for error in injector.raised} <= chain
        assert isinstance(settled.error, (Arrived, ArrivedAsError))
    if isinstance(log, HostVotes):
        other = log._router.other  # type: ignore[attr-defined]
        assert other.open() is None
        # A record that was being read when the exception arrived may have been taken twice.
        assert list(dict.fromkeys(other.read())) == list(dict.fromkeys(log.read())), "two logs"
        close_logs()
    if isinstance(log, StoreVotes):
        assert log._router.other.read() == log.read(), "two logs"  # type: ignore[attr-defined]
    return bool(injector.raised)


def contexts(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__context__


@pytest.mark.parametrize("votes", [name for name in make_votes() if "shared" in name])
def test_an_exception_in_the_log_that_really_runs_is_held_too(votes: str) -> None:
    """At every third instruction of the first point of a set of receivers, when the log is made and opened, too."""
    make, count = make_votes()[votes], 0
    while judge(make, Injector(count)):
        count += 3
    assert count > 1000


@pytest.mark.parametrize("votes_before", [True, False])
def test_an_exception_in_a_vote_through_the_store_is_held_too(
    clients: tuple[StoreClient, StoreClient], votes_before: bool
) -> None:
    """At every third instruction, in the client and in the call that it makes, too."""
    count = 0
    while judge(lambda: through_the_store(clients, votes_before=votes_before), Injector(count)):
        count += 3
    assert count > 1000


@pytest.mark.parametrize("kind", [Arrived, ArrivedAsError])
@pytest.mark.parametrize("refusal", [None, "its own reason"])
@pytest.mark.parametrize("votes", IN_MEMORY)
def test_an_exception_at_any_instruction_is_held_until_the_outcome_is_carried_out(
    votes: str, refusal: str | None, kind: type[BaseException]
) -> None:
    make, count = make_votes()[votes], 0
    while judge(make, Injector(count, kind=kind), refusal):
        count += 1
    # Each instruction of the section, the protocol, the log and the write.
    assert count > 150


@pytest.mark.parametrize("votes", IN_MEMORY)
def test_a_second_exception_while_the_first_is_held_is_held_too(votes: str) -> None:
    """The first at every ninth instruction; the second at each of the next four, and then at every forty-first."""
    make, first = make_votes()[votes], 0
    while judge(make, Injector(first)):
        second = 0
        while True:
            injector = Injector(first, second)
            judge(make, injector)
            if len(injector.raised) < 2:
                break
            second += 1 if second < 4 else 41
        first += 9


def test_exceptions_that_arrive_while_others_are_being_held_are_held_too() -> None:
    """Up to three, each in the handler of the one before, before it has been noted."""

    class Unlucky(list[BaseException]):
        left = 3

        def append(self, error: BaseException) -> None:
            self.left -= 1
            if self.left >= 0:
                raise Arrived("in the handler")
            super().append(error)

    work, log = TwoLeaves(), Votes([Ballot(1, YES)])
    section = CriticalSection(log, 0, RECEIVERS, work, "target rank 0")
    section.held = Unlucky()
    work.write = lambda: (_ for _ in ()).throw(Arrived("first")) if not section.held else TwoLeaves.write(work)  # type: ignore[method-assign, assignment, return-value]
    settled = section.run()
    assert work.leaves == ["new", "new"]
    assert len(list(contexts(settled.error))) >= 4


# What is raised, and what is not repeated for ever.


def test_what_the_program_has_to_see_is_raised_before_the_end_of_the_run() -> None:
    over, interrupt = PeerLostError("gone"), KeyboardInterrupt()
    assert Settled(None, [over, interrupt]).error is interrupt
    assert Settled("refused", [over]).error is over
    assert Settled(None).error is None


def test_a_write_that_fails_by_itself_is_tried_three_times_and_then_told() -> None:
    class OutOfMemory(TwoLeaves):
        tries = 0

        def write(self) -> None:
            self.tries += 1
            self.leaves[0], self.written = "new", [0]
            raise MemoryError("no room for leaf 1")

    work = OutOfMemory()
    settled = CriticalSection(Votes([Ballot(1, YES)]), 0, RECEIVERS, work, "target rank 0").run()
    assert isinstance(settled.fault, MemoryError)
    assert settled.error is settled.fault
    assert settled.refusal is None
    assert work.tries == 3
    assert work.progress == 1


def test_a_write_that_signals_interrupt_again_and_again_is_finished_as_long_as_it_gets_on() -> None:
    """The same error each second, say, of an alarm that the program has set."""

    class Alarmed(TwoLeaves):
        def write(self) -> None:
            if len(self.written) < 50:
                self.written.append(0)
                raise TimeoutError("the alarm")
            self.leaves = ["new", "new"]

    work = Alarmed()
    settled = CriticalSection(OwnVotes(0), 0, (0,), work, "target rank 0").run()
    assert work.leaves == ["new", "new"]
    assert settled.refusal is None
    assert isinstance(settled.error, TimeoutError)


def test_where_the_log_is_lost_this_rank_has_written_nothing_and_says_that_others_may_have() -> None:
    class Lost(Votes):
        def read(self) -> Sequence[Ballot]:
            raise PeerLostError("the store is gone")

    work = TwoLeaves()
    settled = CriticalSection(Lost(), 0, RECEIVERS, work, "target rank 0").run()
    assert work.leaves == ["old", "old"]
    assert isinstance(settled.error, PeerLostError)
    assert settled.refusal is not None
    assert "cannot know whether the other receivers have" in settled.refusal


def test_messages_that_cannot_be_sent_keep_nobody_from_writing() -> None:
    class Mute(Votes):
        def wake(self, outcome: Outcome, reason: str) -> None:
            self.woken += 1
            raise OSError("no message")

    work, log = TwoLeaves(), Mute([Ballot(1, YES)])
    settled = CriticalSection(log, 0, RECEIVERS, work, "target rank 0").run()
    assert work.leaves == ["new", "new"]
    assert settled.fault is None
    assert log.woken == 3


def test_a_receiver_that_leaves_before_it_has_begun_gives_the_point_up() -> None:
    log, work = Votes([Ballot(1, YES)]), TwoLeaves()
    settled = CriticalSection(log, 0, RECEIVERS, work, "target rank 0").leave(KeyboardInterrupt())
    assert log.ballots == [Ballot(1, YES), Ballot(0, GIVEN_UP)]
    assert settled.refusal == "target rank 0 left with KeyboardInterrupt"
    assert settled.is_refused_here
    assert work.leaves == ["old", "old"]
