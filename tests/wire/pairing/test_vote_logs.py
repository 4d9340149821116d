"""The vote logs: every receiver finds the same ballots in the same order, whichever log carries them."""

from __future__ import annotations

import multiprocessing
import os
import random
import threading
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from vote_log_parts import DIGEST, RECEIVERS, MessageRouter, Post, Roster, make_wait

from grafter.core.commit_protocol import GIVEN_UP, NO, YES, Ballot, Outcome, outcome_of
from grafter.core.messages.manifest import StoreKeys
from grafter.core.messages.wire import Seal, Sealed
from grafter.wire.pairing import host_votes, shared_ballots
from grafter.wire.pairing.host_votes import HostLogs, HostVotes
from grafter.wire.pairing.shared_ballots import SharedBallots
from grafter.wire.pairing.vote_log import StoreVotes, VoteLog
from grafter.wire.store_client import StoreClient
from grafter.wire.store_server import HostedStore, connect


@pytest.fixture
def store() -> Iterator[HostedStore]:
    hosted = HostedStore()
    yield hosted
    hosted.close()


def client_of(store: HostedStore, rank: int, secret: str | None = None) -> StoreClient:
    connection = connect(store.address, store.port, timeout=10, keep_trying=lambda: True)
    return StoreClient(connection, Seal(f"target/{rank}", secret), "graft")


@pytest.fixture(params=["host", "store"])
def logs(request: pytest.FixtureRequest) -> Iterator[list[VoteLog]]:
    """Of three receivers, of one point."""
    keys = StoreKeys("run", DIGEST)
    if request.param == "store":
        store = request.getfixturevalue("store")
        clients = [client_of(store, rank) for rank in RECEIVERS]
        writers = {f"target/{rank}": rank for rank in RECEIVERS}
        routers: list[Any] = [MessageRouter(Post(), rank, clients[rank]) for rank in RECEIVERS]
        yield [StoreVotes(clients[r], routers[r], keys, writers, make_wait) for r in RECEIVERS]
        return
    post, roster = Post(), Roster()
    routers = [MessageRouter(post, rank) for rank in RECEIVERS]
    hosts = [HostLogs(routers[r], roster, "target", r, "run") for r in RECEIVERS]  # type: ignore[arg-type]
    yield [HostVotes(hosts[r], routers[r], keys, DIGEST, RECEIVERS, r, make_wait) for r in RECEIVERS]
    for host in hosts:
        host.close()


def opened(logs: list[VoteLog]) -> list[VoteLog]:
    for log in logs:
        log.offer()
    assert [log.open() for log in logs] == [None] * len(logs)
    return logs


def test_what_one_appends_all_find_in_one_order(logs: list[VoteLog]) -> None:
    opened(logs)
    assert [list(log.read()) for log in logs] == [[]] * 3
    logs[2].append(YES, "")
    assert list(logs[0].read()) == [Ballot(2, YES)]
    logs[0].append(NO, "its reason")
    logs[1].append(GIVEN_UP, "another")
    expected = [Ballot(2, YES), Ballot(0, NO), Ballot(1, GIVEN_UP)]
    assert [list(log.read()) for log in logs] == [expected] * 3
    assert [list(log.read()) for log in logs] == [expected] * 3


def test_who_waits_is_woken_and_hears_the_reason_of_whoever_refused(logs: list[VoteLog]) -> None:
    opened(logs)
    reason = "target rank 1: the transform said \x1e, and \n, and ü"
    logs[1].append(NO, reason)
    outcome = outcome_of(logs[1].read(), RECEIVERS)
    assert outcome == Outcome(False, 1)
    logs[1].wake(outcome, reason)
    assert logs[0].await_news() is None
    for log in (logs[0], logs[2]):
        assert outcome_of(log.read(), RECEIVERS) == outcome
        log.wake(outcome, "")
        assert log.reason_of(outcome, is_leaving=log is logs[2]) == reason


def test_a_log_that_is_opened_again_is_the_same(logs: list[VoteLog]) -> None:
    """As after an exception that interrupted its opening."""
    opened(logs)
    logs[0].append(YES, "")
    assert [list(log.read()) for log in opened(logs)] == [[Ballot(0, YES)]] * 3


# On one host.


def opened_again(name: str) -> int:
    """As by another process."""
    fd = shared_ballots.find(os.getpid(), name)
    assert fd is not None
    return fd


def test_ballots_of_many_threads_are_all_there_whole_and_in_one_order() -> None:
    writers, each = 8, 2000
    first = SharedBallots(shared_ballots.create("votes"), 0, range(writers), reclaims=False)
    logs = [first] + [
        SharedBallots(opened_again("votes"), rank, range(writers), reclaims=False) for rank in range(1, writers)
    ]
    digest = bytes(12)
    threads = [
        threading.Thread(target=lambda log=log: [log.append(digest, YES) for _ in range(each)])  # type: ignore[misc]
        for log in logs
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    found = [list(log.read(digest)) for log in logs]
    assert all(one == found[0] for one in found)
    assert sorted(found[0]) == sorted(Ballot(rank, YES) for rank in range(writers) for _ in range(each))
    for log in logs:
        log.close()


def test_a_log_outlives_the_rank_that_made_it() -> None:
    made = SharedBallots(shared_ballots.create("votes"), 0, (0, 1), reclaims=True)
    other = SharedBallots(opened_again("votes"), 1, (0, 1), reclaims=False)
    made.append(bytes(12), YES)
    made.close()
    other.append(bytes(12), GIVEN_UP)
    assert other.read(bytes(12)) == [Ballot(0, YES), Ballot(1, GIVEN_UP)]
    other.close()


def test_what_is_no_log_is_not_opened(tmp_path: Path) -> None:
    """Neither memory that could shrink nor a file of that name."""
    plain = os.memfd_create("votes-of-nobody", os.MFD_ALLOW_SEALING)
    with (tmp_path / "memfd:votes").open("w+b"):
        assert shared_ballots.find(os.getpid(), "votes-of-nobody") is None
        assert shared_ballots.find(os.getpid(), "votes") is None
    os.close(plain)


def test_a_process_that_cannot_be_looked_into_is_an_error_that_names_it() -> None:
    """The point is refused with that; nobody can have committed without this receiver's yes."""
    ended = multiprocessing.get_context("forkserver").Process(target=int)
    ended.start()
    ended.join()

    class Gone(Roster):
        class Member:
            class process:
                pid = ended.pid

    post = Post()
    router: Any = MessageRouter(post, 1)
    logs = HostLogs(router, Gone(), "target", 1, "run")  # type: ignore[arg-type]
    votes = HostVotes(logs, router, StoreKeys("run", DIGEST), DIGEST, (0, 1), 1, make_wait)
    post.boxes[1][logs._place((0, 1))] = Sealed("here", "0", "")
    problem = votes.open()
    assert problem is not None
    assert f"(pid {ended.pid}): No such file" in problem
    votes.excuse(problem)
    assert post.boxes[0][f"{StoreKeys('run', DIGEST).outcome}/give-up"] == Sealed("give-up", "1", problem)


def test_who_may_not_open_the_log_refuses_each_point_until_it_may(monkeypatch: pytest.MonkeyPatch) -> None:
    """Too many open files, say, or a process that is undumpable. It does not wait for a second message, which never
    comes."""
    post, run = Post(), f"denied{os.getpid()}"
    hosts = [HostLogs(MessageRouter(post, rank), Roster(), "target", rank, run) for rank in (0, 1)]  # type: ignore[arg-type]

    def deny(*_: Any) -> None:
        raise PermissionError(13, "Permission denied")

    for _ in range(3):
        hosts[0].offer((0, 1))
        assert hosts[0].open((0, 1), make_wait) is None
        with monkeypatch.context() as patch:
            patch.setattr(shared_ballots, "find", deny)
            problem = hosts[1].open((0, 1), make_wait)
        assert problem is not None
        assert "Permission denied" in problem
    assert hosts[1].open((0, 1), make_wait) is None
    assert not post.boxes[1]
    for host in hosts:
        host.close()


def test_a_log_that_could_not_be_made_is_made_for_the_next_point(monkeypatch: pytest.MonkeyPatch) -> None:
    post, run = Post(), f"late{os.getpid()}"
    hosts = [HostLogs(MessageRouter(post, rank), Roster(), "target", rank, run) for rank in (0, 1)]  # type: ignore[arg-type]

    def no_memory(*_: Any) -> None:
        raise OSError(24, "Too many open files")

    for _ in range(2):
        with monkeypatch.context() as patch:
            patch.setattr(shared_ballots, "create", no_memory)
            problems = [hosts[0].offer((0, 1)), hosts[1].open((0, 1), make_wait)]
        assert problems[0] == problems[1]
        assert "Too many open files" in str(problems[0])
    assert hosts[0].offer((0, 1)) is None
    assert [host.open((0, 1), make_wait) for host in hosts] == [None, None]
    assert not post.boxes[1]
    for host in hosts:
        host.close()


def three_in_memory(post: Post, run: str) -> tuple[list[HostLogs], list[HostVotes]]:
    routers: list[Any] = [MessageRouter(post, rank) for rank in RECEIVERS]
    hosts = [HostLogs(routers[rank], Roster(), "target", rank, run) for rank in RECEIVERS]  # type: ignore[arg-type]
    keys = StoreKeys(run, DIGEST)
    return hosts, [HostVotes(hosts[r], routers[r], keys, DIGEST, RECEIVERS, r, make_wait) for r in RECEIVERS]


@pytest.mark.parametrize("excuse_first", [False, True])
def test_who_excuses_itself_takes_nobody_the_reason_of_the_refusal(excuse_first: bool) -> None:
    """Receiver 0 refuses the point while receiver 2, which has no log, asks to give it up."""
    post = Post()
    hosts, votes = three_in_memory(post, f"excuse{os.getpid()}{excuse_first}")
    votes[0].offer()
    assert [one.open() for one in votes[:2]] == [None, None]
    votes[1].append(YES, "")
    if excuse_first:
        votes[2].excuse("no log")
    votes[0].append(NO, "its reason")
    outcome = outcome_of(votes[0].read(), RECEIVERS)
    assert outcome == Outcome(False, 0)
    votes[0].wake(outcome, "its reason")
    if not excuse_first:
        votes[2].excuse("no log")
    votes[1].await_news()
    votes[1].wake(outcome, "")
    assert votes[1].reason_of(outcome, is_leaving=False) == "its reason"
    assert not post.boxes[0]
    assert not post.boxes[1]
    for host in hosts:
        host.close()


def test_who_waits_hears_at_once_that_another_excuses_itself() -> None:
    post = Post()
    hosts, votes = three_in_memory(post, f"asked{os.getpid()}")
    votes[0].offer()
    votes[2].excuse("no log")
    assert votes[0].await_news() == "no log"
    hosts[0].close()


@pytest.mark.parametrize("is_leaving", [False, True])
def test_nobody_waits_long_for_a_reason_that_does_not_come(is_leaving: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever refused the point may be stopped, or killed, right behind its ballot. Nobody has written."""
    monkeypatch.setattr(host_votes, "_REASON_SECONDS", 0.05)
    monkeypatch.setattr(host_votes, "_LEAVING_SECONDS", 0.05)
    _, votes = three_in_memory(Post(), f"bound{os.getpid()}")
    reason = votes[1].reason_of(Outcome(False, 0), is_leaving=is_leaving)
    assert reason == "rank 0 of the receivers has given the point up"


def do_points(logs: list[SharedBallots], orders: list[list[bytes]], choices: random.Random) -> None:
    """Each rank does its points in its own order: it appends, and reads until all have voted. Who does the next step is
    chosen at random. Each read is compared with a list that forgets nothing."""
    at, appended = [0] * len(logs), [False] * len(logs)
    everything: dict[bytes, list[Ballot]] = defaultdict(list)
    while active := [rank for rank in range(len(logs)) if at[rank] < len(orders[rank])]:
        rank = choices.choice(active)
        point = orders[rank][at[rank]]
        if not appended[rank]:
            kind = choices.choices([YES, NO], [30, 1])[0]
            logs[rank].append(point, kind)
            everything[point].append(Ballot(rank, kind))
            appended[rank] = True
            continue
        found = list(logs[rank].read(point))
        assert found == everything[point]
        if outcome_of(found, range(len(logs))) is not None:
            logs[rank].forget(point)
            at[rank], appended[rank] = at[rank] + 1, False


@pytest.mark.parametrize("seed", range(6))
def test_memory_is_given_back_and_nothing_is_lost_that_somebody_reads(
    monkeypatch: pytest.MonkeyPatch, seed: int
) -> None:
    """Also where some ranks are a point ahead of others, which have not read yet what they will need."""
    monkeypatch.setattr(shared_ballots, "RECLAIMED_BYTES", 4096)
    choices, size = random.Random(seed), 3
    made = SharedBallots(shared_ballots.create("votes"), 0, range(size), reclaims=True)
    logs = [made] + [SharedBallots(opened_again("votes"), rank, range(size), reclaims=False) for rank in range(1, size)]
    points = [number.to_bytes(12, "little") for number in range(3000)]
    do_points(logs, [points] * size, choices)
    status = os.fstat(made.fd)
    assert status.st_size == len(points) * size * 16
    assert status.st_blocks * 512 <= 8 * 4096
    assert all(len(log._ballots) <= 2 for log in logs)
    for log in logs:
        log.close()


# In the store.


def test_what_a_stranger_appends_changes_nothing(store: HostedStore) -> None:
    """Unsigned, signed with another secret, or no message at all; neither before nor behind what counts."""
    keys, writers = StoreKeys("run", DIGEST), {"target/0": 0, "target/1": 1}
    clients = [client_of(store, rank, "secret") for rank in (0, 1)]
    logs = [StoreVotes(client, MessageRouter(Post(), 0, client), keys, writers, make_wait) for client in clients]  # type: ignore[arg-type]
    stranger = client_of(store, 1, "another secret")
    stranger.raw.append(keys.log, "rubbish")  # type: ignore[attr-defined]
    logs[0].append(YES, "")
    stranger.append(keys.log, "no", '""')
    client_of(store, 1).append(keys.log, "no", '""')
    stranger.raw.append(keys.log, "\x1e- yes")  # type: ignore[attr-defined]
    # What the stranger has asked for is done.
    assert stranger.raw.check([keys.log])
    logs[1].append(YES, "")
    assert [list(log.read()) for log in logs] == [[Ballot(0, YES), Ballot(1, YES)]] * 2
