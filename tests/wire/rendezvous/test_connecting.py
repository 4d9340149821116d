"""How the ranks of one host connect: each to each, in whatever order they come, and nobody else to any."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
import torch
from channel_parts import EndedError, in_a_child, roster_here
from jobs import Rank, succeed, two_jobs

import grafter
from grafter.core.messages.roster import Roster
from grafter.core.messages.wire import Seal
from grafter.core.process_identity import ProcessIdentity, own_identity
from grafter.errors import PointTimeoutError
from grafter.wire.exchange.transfer import choose_way
from grafter.wire.rendezvous.connecting import Listener, connect_ranks, open_listener, peers_of, signature_of
from grafter.wire.rendezvous.courier import Courier

SOON = 20.0


@pytest.fixture
def listeners() -> Iterator[list[Listener]]:
    """Those of three ranks."""
    opened = [open_listener() for _ in range(3)]
    assert None not in opened
    found = [one for one in opened if one is not None]
    yield found
    for listener in found:
        listener.close()


def seal_of(everyone: Roster, graft_rank: int) -> Seal:
    seal = Seal(signature_of(everyone, graft_rank), None)
    seal.run_id = "run"
    return seal


def go_on() -> None:
    """Nothing ends the run."""


def connect(
    listeners: Sequence[Listener],
    everyone: Roster,
    ranks: Sequence[int],
    *,
    timeout: float = SOON,
    check: Callable[[], None] = go_on,
) -> dict[int, Any]:
    """What each of these ranks gets, all at once: its connections, or what was raised."""
    results: dict[int, Any] = {}

    def run(rank: int) -> None:
        try:
            results[rank] = connect_ranks(listeners[rank], everyone, rank, seal_of(everyone, rank), timeout, check)
        except BaseException as error:
            results[rank] = error

    threads = [threading.Thread(target=run, args=(rank,), daemon=True) for rank in ranks]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
        assert not thread.is_alive()
    return results


def check_connected(connections: dict[int, dict[int, socket.socket]]) -> None:
    """Each pair by one socket, whose ends are theirs."""
    for rank, own in connections.items():
        assert isinstance(own, dict), own
        assert sorted(own) == [other for other in sorted(connections) if other != rank]
        for other, connection in own.items():
            connection.send(f"{rank} to {other}".encode())
    for rank, own in connections.items():
        for other, connection in own.items():
            assert connection.recv(100).decode() == f"{other} to {rank}"
            connection.close()


def three_ranks(listeners: Sequence[Listener]) -> Roster:
    return roster_here(1, 2, [listener.name for listener in listeners])


def test_each_rank_gets_one_connection_with_each_other(listeners: list[Listener]) -> None:
    check_connected(connect(listeners, three_ranks(listeners), [0, 1, 2]))


def test_nothing_listens_once_all_are_connected(listeners: list[Listener]) -> None:
    """Neither can anybody connect, nor is one of these sockets shown as listening."""
    connections = connect(listeners, three_ranks(listeners), [0, 1, 2])
    for listener in listeners:
        with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as late, pytest.raises(ConnectionRefusedError):
            late.connect(f"\0{listener.name}")
    names = {f"@{listener.name}" for listener in listeners}
    lines = [line.split() for line in Path("/proc/net/unix").read_text().splitlines()]
    flags = [int(line[3], 16) for line in lines if line[-1] in names]
    assert len(flags) == 3, "the accepted ones have the name of the socket that accepted them"
    assert not any(one & 0x10000 for one in flags)
    check_connected(connections)


@pytest.mark.parametrize(
    ("host", "uid", "socket_name"), [("other", 0, "x"), ("", 7, "x"), ("", 0, "")], ids=["host", "user", "no socket"]
)
def test_a_rank_of_another_host_or_user_is_no_peer(host: str, uid: int, socket_name: str) -> None:
    everyone = roster_here(1, 2)
    other = everyone.target[1]
    changes = {"host": host or other.process.host, "uid": other.process.uid + uid}
    changed = other.model_copy(update={"process": other.process.model_copy(update=changes), "socket_name": socket_name})
    mixed = Roster(everyone.baseline, (everyone.target[0], changed))
    assert peers_of(0, mixed) == [1]
    assert peers_of(2, mixed) == []


# Strangers, which are processes that the roster does not name.


def connected_to(name: str) -> socket.socket:
    stranger = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    stranger.connect(f"\0{name}")
    return stranger


def stay_silent(name: str, hello: bytes) -> None:
    held = [connected_to(name) for _ in range(5)]
    signal.pause()
    del held


def say_hello_as_a_rank(name: str, hello: bytes) -> None:
    held = [connected_to(name) for _ in range(5)]
    for stranger in held:
        stranger.send(hello)
    signal.pause()


def connect_without_end(name: str, hello: bytes) -> None:
    held = []
    while True:
        try:
            held.append(connected_to(name))
        except OSError:
            held.clear()


def fill_the_queue(name: str, hello: bytes) -> None:
    held = []
    try:
        while True:
            stranger = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
            stranger.setblocking(False)
            stranger.connect(f"\0{name}")
            held.append(stranger)
    except OSError:
        # The queue is full, or this process has no more descriptors.
        signal.pause()


STRANGERS = [stay_silent, say_hello_as_a_rank, connect_without_end, fill_the_queue]


def waiting_at(name: str) -> int:
    """How many sockets of others are known under this name, the listening one left out."""
    return sum(line.endswith(f"@{name}") for line in Path("/proc/net/unix").read_text().splitlines()) - 1


@pytest.mark.parametrize("act", STRANGERS, ids=lambda act: act.__name__.replace("_", " "))
def test_a_stranger_keeps_nobody_waiting(listeners: list[Listener], act: Callable[[str, bytes], None]) -> None:
    """Whether it is silent, floods, fills the queue, or says the very words of a rank that is still missing."""
    everyone = three_ranks(listeners)
    hello = seal_of(everyone, 1).seal("hello", "hello", "1").encode()
    with ExitStack() as strangers:
        for name in (listeners[0].name, listeners[1].name):
            strangers.enter_context(in_a_child(lambda name=name: act(name, hello)))  # type: ignore[misc]
            deadline = time.monotonic() + SOON
            while waiting_at(name) < 5 and time.monotonic() < deadline:
                time.sleep(0.01)
            assert waiting_at(name) >= 5
        check_connected(connect(listeners, everyone, [0, 1, 2]))


OTHER_USER = """
import os, signal, socket, sys
os.setgroups([]); os.setgid(65534); os.setuid(65534)
held = [socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) for _ in range(20)]
for one in held: one.connect("\\0" + sys.argv[1])
print("connected", flush=True)
for one in held:
    try: one.send(b"junk")
    except OSError: pass
    try: assert one.recv(1) == b""
    except ConnectionResetError: pass
print("dropped", flush=True)
"""


@pytest.mark.skipif(os.getuid() != 0, reason="only root can start a process of another user")
def test_a_stranger_of_another_user_is_dropped(listeners: list[Listener]) -> None:
    everyone = three_ranks(listeners)
    with subprocess.Popen(
        [sys.executable, "-c", OTHER_USER, listeners[0].name], stdout=subprocess.PIPE, text=True
    ) as stranger:
        assert stranger.stdout is not None
        assert stranger.stdout.readline() == "connected\n"
        check_connected(connect(listeners, everyone, [0, 1, 2]))
        assert stranger.stdout.readline() == "dropped\n"


def test_a_name_that_a_stranger_has_taken_gets_no_hello(listeners: list[Listener]) -> None:
    """A rank of the roster ended, and somebody listens under its name: the others see who listens there."""
    everyone = three_ranks(listeners)
    taken = f"{listeners[0].name}-taken"
    reading, writing = os.pipe()

    def listen() -> None:
        with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as impostor:
            impostor.bind(f"\0{taken}")
            impostor.listen()
            os.write(writing, b"1")
            for _ in range(3):
                heard, _ = impostor.accept()
                os.write(writing, heard.recv(100) or b"0")

    first = everyone.baseline[0].model_copy(update={"socket_name": taken})
    with in_a_child(listen):
        assert os.read(reading, 1) == b"1"
        results = connect(listeners, Roster((first,), everyone.target), [1], timeout=0.5)
        assert set(os.read(reading, 3)) == {ord("0")}
    assert isinstance(results[1], PointTimeoutError)
    os.close(reading)
    os.close(writing)


# Ranks that do not come.


def test_a_rank_that_does_not_connect_is_named_after_the_timeout(listeners: list[Listener]) -> None:
    results = connect(listeners, three_ranks(listeners), [0, 2], timeout=0.5)
    assert isinstance(results[0], PointTimeoutError)
    assert "a connection with target rank 0 (pid " in str(results[0])
    assert "target rank 1" not in str(results[0])


def test_a_rank_that_does_not_listen_is_named_after_the_timeout(listeners: list[Listener]) -> None:
    listeners[0].close()
    results = connect(listeners, three_ranks(listeners), [1, 2], timeout=0.5)
    for rank in (1, 2):
        assert isinstance(results[rank], PointTimeoutError)
        assert "a connection with baseline rank 0 (pid " in str(results[rank])


def test_a_stopped_rank_is_said_to_be_stopped(listeners: list[Listener]) -> None:
    everyone = three_ranks(listeners)
    with in_a_child(signal.pause) as pid:
        os.kill(pid, signal.SIGSTOP)
        os.waitid(os.P_PID, pid, os.WSTOPPED)
        results = connect(listeners, of_another_process(everyone, pid), [0, 1], timeout=0.5)
    assert f"target rank 1 (pid {pid}, which is stopped)" in str(results[0])


def of_another_process(everyone: Roster, pid: int) -> Roster:
    """Where target rank 1 is the process with this pid."""
    from grafter.core.processes import process_state

    own = own_identity()
    other = ProcessIdentity(**{**own.model_dump(), "pid": pid, "start_time": process_state(pid)[1]})
    return Roster(everyone.baseline, (everyone.target[0], everyone.target[1].model_copy(update={"process": other})))


def test_a_rank_that_has_died_gets_no_connection_and_keeps_nobody_waiting(listeners: list[Listener]) -> None:
    """Whoever needs it at a point finds its channel closed."""
    everyone = three_ranks(listeners)
    with in_a_child(signal.pause) as pid:
        without = of_another_process(everyone, pid)
    results = connect(listeners, without, [0, 1])
    assert [sorted(results[rank]) for rank in (0, 1)] == [[1], [0]]


def test_a_run_that_ends_meanwhile_ends_this(listeners: list[Listener]) -> None:
    def end() -> None:
        raise EndedError

    results = connect(listeners, three_ranks(listeners), [0], check=end)
    assert isinstance(results[0], EndedError)
    with pytest.raises(OSError, match="Bad file descriptor"):
        listeners[0].socket.getsockname()


def in_other_user_namespace(everyone: Roster, graft_rank: int) -> Roster:
    """Where this rank has a pid and a network namespace in common with the others, and no user namespace."""
    members = list(everyone.all)
    process = members[graft_rank].process.model_copy(update={"user_namespace": "user:[1]"})
    members[graft_rank] = members[graft_rank].model_copy(update={"process": process})
    count = len(everyone.baseline)
    return Roster(tuple(members[:count]), tuple(members[count:]))


def test_ranks_of_different_user_namespaces_have_no_channel_and_no_memory_in_common(listeners: list[Listener]) -> None:
    """Each sees the other as another user on its socket, and may not look into its process: store and gloo instead."""
    everyone = in_other_user_namespace(three_ranks(listeners), 1)
    results = connect(listeners, everyone, [0, 1, 2])
    assert [sorted(results[rank]) for rank in (0, 1, 2)] == [[2], [], [0]]
    assert [everyone.share_memory(0, other) for other in (0, 1, 2)] == [True, False, True]
    ways = [choose_way("auto", everyone.all[0], everyone.all[other], "cpu", False) for other in (1, 2)]
    assert ways == ["gloo", "shared memory"]
    couriers = [Courier(None, None, one, 0, object(), 1.0) for one in (everyone, three_ranks(listeners))]  # type: ignore[arg-type]
    assert [courier.mail_across for courier in couriers] == [False, True]


def test_a_process_knows_its_user_namespace_and_reads_what_older_ones_wrote() -> None:
    own = own_identity()
    assert own.user_namespace == os.readlink("/proc/self/ns/user")
    older = own.model_dump(exclude={"user_namespace"})
    assert ProcessIdentity.model_validate(older).user_namespace == ""


def graft_from_another_namespace(rank: Rank) -> list[float]:
    from grafter.wire.rendezvous import join

    there = join.own_identity()
    join.own_identity = lambda: there.model_copy(update={"user_namespace": f"of {rank.role} {rank.role_rank}"})
    value = torch.full((2,), float(rank.is_baseline))
    for number in range(2):
        grafter.dump(f"h{number}", value)
    assert grafter._process.grafter is not None
    session = grafter._process.grafter.lifecycle.session
    assert session is not None
    assert not session.agreement._courier.mail_inside or rank.is_baseline
    return value.tolist()


def test_containers_with_user_namespaces_of_their_own_graft_through_the_store_and_gloo(tmp_path: Path) -> None:
    with two_jobs(
        tmp_path, graft_from_another_namespace, graft_from_another_namespace, ranks=(1, 2), b2t_filter="True"
    ) as jobs:
        assert succeed(jobs.wait()) == [[1.0, 1.0]] * 3
        outcomes = [[record.outcome for record in records] for records in jobs.ledgers().values()]
        assert sorted(outcomes) == [["grafted"] * 2, ["grafted"] * 2, ["sent"] * 2]
