"""Votes through the store: whatever ends a call of the store early, a receiver reads the log, and does what it says."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import pytest
from vote_log_parts import DIGEST

from grafter.core.commit_protocol import YES, Outcome, outcome_of
from grafter.core.messages.manifest import StoreKeys
from grafter.core.messages.wire import Seal
from grafter.errors import PeerLostError, RunError
from grafter.wire.monitor.store_silence import StoreWait
from grafter.wire.monitor.waits import Wait, WatchedWait
from grafter.wire.pairing.critical_section import CriticalSection, Settled, Work
from grafter.wire.pairing.vote_log import StoreVotes
from grafter.wire.rendezvous.message_router import MessageRouter
from grafter.wire.store_client import StoreClient
from grafter.wire.store_server import HostedStore, connect
from tests.wire.pairing.test_critical_section import TwoLeaves, Votes

RECEIVERS = (0, 1)
KEYS = StoreKeys("run", DIGEST)


class WaitKeeper:
    """Looks after the waits of one receiver, as the monitor thread does, and notes what it is told."""

    underway = None
    store_is_silent = False

    def __init__(self) -> None:
        self.aborted: RunError | None = None
        self.current_wait: Wait | None = None
        self.waits: list[Wait] = []
        self.interrupts: list[BaseException] = []
        self.on_interrupt: Callable[[Wait], None] = lambda wait: None

    def check(self) -> None:
        if self.aborted is not None:
            raise self.aborted

    def begin(self, wait: Wait) -> None:
        self.check()
        self.current_wait = wait
        self.waits.append(wait)

    def end(self, wait: Wait) -> None:
        self.current_wait = None

    def waiting(self, wait: Wait) -> WatchedWait:
        return WatchedWait(self, wait)

    def interrupted(self, wait: Wait, error: BaseException) -> None:
        self.interrupts.append(error)
        self.on_interrupt(wait)


class Value(Work):
    def __init__(self) -> None:
        self.writes = 0

    def prepare(self) -> str | None:
        return None

    def write(self) -> None:
        self.writes += 1

    @property
    def progress(self) -> int:
        return self.writes


class SlowStore:
    """Answers what reads after `seconds`."""

    def __init__(self, raw: Any, seconds: float) -> None:
        self._raw, self._seconds = raw, seconds

    def __getattr__(self, name: str) -> Any:
        method = getattr(self._raw, name)

        def late(*arguments: Any) -> Any:
            time.sleep(self._seconds)
            return method(*arguments)

        return late if name in ("check", "get") else method


class Receiver:
    """One of two, with a client of its own."""

    def __init__(self, store: HostedStore, role_rank: int) -> None:
        raw = connect(store.address, store.port, timeout=30, keep_trying=lambda: True)
        self.client = StoreClient(raw, Seal(f"target/{role_rank}", None), "graft")
        self.keeper: Any = WaitKeeper()
        self.client.call_monitor = StoreWait(self.keeper, 60.0)
        member = SimpleNamespace(role="target", socket_name="")
        roster: Any = SimpleNamespace(all=[member] * 2, side=lambda role: [member] * 2)
        router = MessageRouter(self.client, self.keeper, roster, role_rank, None, 60.0)
        writers = {f"target/{rank}": rank for rank in RECEIVERS}
        self.log = StoreVotes(self.client, router, KEYS, writers, lambda: Wait("agreement", "'h'", 60.0))
        self.work = Value()
        self.section = CriticalSection(self.log, role_rank, RECEIVERS, self.work, f"target rank {role_rank}")

    def run(self) -> Settled:
        return self.section.run()


@pytest.fixture
def store() -> Iterator[HostedStore]:
    hosted = HostedStore()
    yield hosted
    hosted.close()


class Alarm(Exception):
    """What a signal's handler of the program raises."""


@contextmanager
def handling(number: int, handler: Callable[[], None]) -> Iterator[None]:
    before = signal.signal(number, lambda *_: handler())
    try:
        yield
    finally:
        signal.signal(number, before)


def raise_alarm() -> None:
    raise Alarm


def send_once(is_so: Callable[[], object], number: int, then: Callable[[], object] = lambda: None) -> threading.Thread:
    """Sends this process a signal once something is so."""

    def watch() -> None:
        while not is_so():
            time.sleep(0.01)
        os.kill(os.getpid(), number)
        then()

    thread = threading.Thread(target=watch)
    thread.start()
    return thread


def is_waiting_in_agreement(receiver: Receiver) -> Callable[[], bool]:
    return lambda: any(wait.stage == "agreement" for wait in receiver.keeper.waits)


@pytest.mark.parametrize("number", [signal.SIGALRM, signal.SIGTERM, signal.SIGINT])
def test_a_handler_that_raises_while_a_receiver_waits_makes_it_give_the_point_up_and_nobody_writes(
    store: HostedStore, number: int
) -> None:
    """The run goes on: no call of the store was left behind that would have to be ended."""
    mine, other = Receiver(store, 0), Receiver(store, 1)
    with handling(number, raise_alarm):
        sender = send_once(is_waiting_in_agreement(mine), number)
        settled = mine.run()
        sender.join()
    assert isinstance(settled.error, Alarm)
    assert settled.fault is None
    assert settled.refusal == "target rank 0 left with Alarm"
    assert not mine.keeper.interrupts
    assert other.run().refusal == settled.refusal
    assert (mine.work.writes, other.work.writes) == (0, 0)


@pytest.mark.parametrize("number", [signal.SIGALRM, signal.SIGTERM, signal.SIGINT])
def test_a_handler_that_raises_nothing_changes_nothing(store: HostedStore, number: int) -> None:
    mine, other = Receiver(store, 0), Receiver(store, 1)
    flags: list[int] = []
    settled: list[Settled] = []
    with handling(number, lambda: flags.append(1)):
        sender = send_once(is_waiting_in_agreement(mine), number, lambda: settled.append(other.run()))
        settled.append(mine.run())
        sender.join()
    assert flags == [1]
    assert [(one.refusal, one.error) for one in settled] == [(None, None)] * 2
    assert (mine.work.writes, other.work.writes) == (1, 1)
    assert not mine.keeper.interrupts


def test_a_receiver_whose_run_is_aborted_reads_the_log_of_a_slow_store_and_writes_what_was_committed(
    store: HostedStore,
) -> None:
    """The answer takes longer than the look at what ended the run."""
    mine, other = Receiver(store, 0), Receiver(store, 1)
    over = PeerLostError("baseline rank 0 was interrupted")

    def vote_then_abort() -> str | None:
        assert other.run().refusal is None
        mine.client.raw = SlowStore(mine.client.raw, 0.6)  # type: ignore[assignment]
        mine.keeper.aborted = over
        raise over

    mine.log.await_news = vote_then_abort  # type: ignore[method-assign]
    settled = mine.run()
    assert settled.refusal is None
    assert settled.error is over
    assert (mine.work.writes, other.work.writes) == (1, 1)


def test_the_log_waits_for_an_earlier_call_that_still_blocks(store: HostedStore) -> None:
    """A handler raises in a wait for another rank's value; that comes later than this rank stops waiting for it."""
    mine, other = Receiver(store, 0), Receiver(store, 1)
    with handling(signal.SIGALRM, raise_alarm):
        wait = Wait("pairing", "'h'", 60.0, awaits=("never",))
        sender = send_once(lambda: mine.client.silent_seconds > 0, signal.SIGALRM)
        with pytest.raises(Alarm), mine.keeper.waiting(wait):
            mine.client.get("never")
        sender.join()
    assert mine.client.silent_seconds
    threading.Timer(0.5, lambda: other.client.set("never", "kind", "")).start()
    mine.log.append(YES, "")
    assert [ballot.role_rank for ballot in mine.log.read()] == [0]


def test_a_handler_that_raises_in_a_wait_for_a_value_ends_that_wait_and_another_does_not(store: HostedStore) -> None:
    mine, other = Receiver(store, 0), Receiver(store, 1)
    flags: list[int] = []
    mine.keeper.on_interrupt = lambda wait: other.client.wake(wait.awaits[0], RunError("over"))
    wait = Wait("pairing", "'h'", 60.0, awaits=("first",))
    with handling(signal.SIGTERM, lambda: flags.append(1)):
        sender = send_once(
            lambda: mine.keeper.current_wait is wait, signal.SIGTERM, lambda: other.client.set("first", "kind", "came")
        )
        with mine.keeper.waiting(wait):
            assert mine.client.get("first").payload == "came"
        sender.join()
    assert flags == [1]
    assert not mine.keeper.interrupts
    wait = Wait("pairing", "'h'", 60.0, awaits=("second",))
    with handling(signal.SIGTERM, raise_alarm):
        sender = send_once(lambda: mine.keeper.current_wait is wait, signal.SIGTERM)
        with pytest.raises(Alarm), mine.keeper.waiting(wait):
            mine.client.get("second")
        sender.join()
    assert [type(error) for error in mine.keeper.interrupts] == [Alarm]
    assert not mine.client.silent_seconds, "the call was ended"


def test_an_answer_that_comes_stands_though_the_run_has_ended_meanwhile(store: HostedStore) -> None:
    mine = Receiver(store, 0)
    mine.client.raw = SlowStore(mine.client.raw, 0.6)  # type: ignore[assignment]
    mine.client.set("k", "kind", "payload")
    mine.keeper.aborted = PeerLostError("over")
    found = mine.client.peek("k")
    assert found is not None and found.payload == "payload"


def test_a_log_call_that_fails_once_with_an_error_of_the_run_is_made_again() -> None:
    """`append` and `read` say that the store is lost by failing again and again."""
    for name in ("append", "read"):
        log, work = Votes(meanwhile=()), TwoLeaves()
        method, failures = getattr(log, name), [PeerLostError("has not answered")]

        def fail_once(*arguments: Any, method: Any = method, failures: list[PeerLostError] = failures) -> Any:
            if failures:
                raise failures.pop()
            return method(*arguments)

        setattr(log, name, fail_once)
        settled = CriticalSection(log, 0, RECEIVERS, work, "target rank 0").run()
        assert settled.fault is None
        assert work.leaves == ["old", "old"]
        assert settled.refusal == "target rank 0 left with PeerLostError"
        assert log.ballots[-1].kind != YES, "the others find that it has left"
        assert isinstance(settled.error, PeerLostError)
        assert outcome_of(log.read(), RECEIVERS) == Outcome(False, 0)
