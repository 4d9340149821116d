"""Strangers of this machine at two jobs that start, run and end: they can neither block, nor slow, nor end a run."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
from contextlib import ExitStack
from pathlib import Path

import pytest
import torch
from jobs import Jobs, Rank, succeed

import grafter

SOON = 20.0
NOBODY = 65534
# What any user can do: find the names of abstract sockets, connect to them, and write.
STRANGER = """
import os, socket, sys
user, act = int(sys.argv[1]), sys.argv[2]
if user != os.getuid():
    os.setgroups([]); os.setgid(user); os.setuid(user)
reached, held = 0, []
for name in sys.argv[3:]:
    for kind in (socket.SOCK_SEQPACKET, socket.SOCK_DGRAM, socket.SOCK_STREAM):
        for _ in range(2000):
            one = socket.socket(socket.AF_UNIX, kind)
            one.setblocking(False)
            try:
                one.connect("\\0" + name[1:])
                reached += 1
                held.append(one)
                while act == "flood":
                    one.send(b"junk" * 100)
            except BlockingIOError:
                continue
            except OSError:
                break
print(reached, flush=True)
sys.stdin.read()
"""


def sockets_of(pid: int) -> list[str]:
    """The names of a process's abstract sockets."""
    inodes = set()
    for descriptor in os.listdir(f"/proc/{pid}/fd"):
        try:
            link = os.readlink(f"/proc/{pid}/fd/{descriptor}")
        except OSError:
            continue
        if link.startswith("socket:["):
            inodes.add(link[8:-1])
    rows = [line.split() for line in Path("/proc/net/unix").read_text().splitlines()[1:]]
    return sorted({row[7] for row in rows if len(row) > 7 and row[6] in inodes and row[7].startswith("@grafter-")})


def names_at(jobs: Jobs, role: str) -> list[str]:
    deadline = time.monotonic() + SOON
    while not (names := sockets_of(jobs.pid(role, 0))) and time.monotonic() < deadline:
        time.sleep(0.01)
    assert names
    return names


def stranger(user: int, act: str, names: list[str]) -> tuple[subprocess.Popen[str], int]:
    """The stranger, which stays until its input is closed; how often it reached one of these sockets."""
    process = subprocess.Popen(
        [sys.executable, "-c", STRANGER, str(user), act, *names],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert process.stdout is not None
    return process, int(process.stdout.readline())


def compute_then_graft(rank: Rank) -> list[float]:
    """Two points, between which the strangers have their time."""
    value = torch.full((3,), 1.0 if rank.is_baseline else 2.0)
    grafter.dump("before", value)
    rank.tell(f"{rank.role} computes")
    rank.wait_for("go on")
    grafter.dump("after", value)
    return value.tolist()


def graft_at_once(rank: Rank) -> list[float]:
    value = torch.full((3,), 1.0 if rank.is_baseline else 2.0)
    grafter.dump("h", value)
    return value.tolist()


def users() -> list[object]:
    """Root can be any user; any other is a stranger of its own, which the kernel treats alike but for the uid."""
    other = pytest.param(
        NOBODY, id="of another user", marks=pytest.mark.skipif(os.getuid() != 0, reason="only root can be another user")
    )
    return [other, pytest.param(os.getuid(), id="of the same user")]


@pytest.mark.parametrize("user", users())
def test_a_stranger_cannot_reach_ranks_that_have_joined(tmp_path: Path, user: int) -> None:
    """It writes to every socket of theirs that it finds; a few datagrams used to hang both jobs for ever."""
    with Jobs(
        tmp_path, b2t_filter="True", timeout=SOON, signals=("baseline computes", "target computes", "go on")
    ) as jobs:
        jobs.start("baseline", 1, compute_then_graft)
        jobs.start("target", 1, compute_then_graft)
        assert jobs.signals["baseline computes"].wait(60)
        assert jobs.signals["target computes"].wait(60)
        names = sockets_of(jobs.pid("baseline", 0)) + sockets_of(jobs.pid("target", 0))
        assert names, "a channel is known under the name of the socket that accepted it"
        process, reached = stranger(user, "flood", names)
        with process:
            jobs.signals["go on"].set()
            results = jobs.wait()
    assert reached == 0
    assert succeed(results) == [[1.0] * 3] * 2


@pytest.mark.parametrize("user", users())
@pytest.mark.parametrize("act", ["silent", "flood"])
def test_a_stranger_that_connects_during_the_join_is_dropped(tmp_path: Path, user: int, act: str) -> None:
    """It fills the queue of the rank that waits for the other job, and stays."""
    with Jobs(tmp_path, b2t_filter="True", timeout=SOON) as jobs, ExitStack() as strangers:
        jobs.start("baseline", 1, graft_at_once)
        process, reached = stranger(user, act, names_at(jobs, "baseline"))
        strangers.enter_context(process)
        jobs.start("target", 1, graft_at_once)
        started = time.monotonic()
        results = jobs.wait()
        seconds = time.monotonic() - started
    assert reached > 0
    assert succeed(results) == [[1.0] * 3] * 2
    assert seconds < SOON


def die_during_the_join(rank: Rank) -> list[float]:
    """Target rank 1 dies once the roster is known, before it has connected to anybody."""
    if rank.role == "target" and rank.role_rank == 1:
        from grafter.runtime import lifecycle

        lifecycle.connect_ranks = lambda *_: os._exit(1)  # type: ignore[assignment]
    return graft_at_once(rank)


def test_a_rank_that_dies_before_it_has_connected_is_named_at_the_first_point(tmp_path: Path) -> None:
    with Jobs(tmp_path, b2t_filter="True", timeout=100) as jobs:
        jobs.start("baseline", 2, die_during_the_join)
        jobs.start("target", 2, die_during_the_join)
        results = jobs.wait()
    survivors = results[:3]
    assert [result.error_kind for result in survivors] == ["PeerLostError"] * 3, results
    assert all("target rank 1" in result.error for result in survivors)
    assert max(result.seconds for result in survivors) < SOON


def stop_during_the_join(rank: Rank) -> list[float]:
    if rank.role == "target":
        from grafter.runtime import lifecycle

        real = lifecycle.connect_ranks

        def connect_late(*arguments: object) -> object:
            rank.tell("joined")
            rank.wait_for("go on", 90)
            return real(*arguments)  # type: ignore[arg-type]

        lifecycle.connect_ranks = connect_late  # type: ignore[assignment]
    return graft_at_once(rank)


def test_a_rank_that_does_not_connect_in_time_is_named(tmp_path: Path) -> None:
    with Jobs(tmp_path, b2t_filter="True", timeout=2, signals=("joined", "go on")) as jobs:
        jobs.start("baseline", 1, stop_during_the_join)
        jobs.start("target", 1, stop_during_the_join)
        assert jobs.signals["joined"].wait(60)
        baseline = jobs.wait_for_one("baseline", 0)
        jobs.signals["go on"].set()
        (target,) = jobs.wait()
    assert baseline.error_kind == "PointTimeoutError"
    assert "waited 2 s for a connection with target rank 0 (pid " in baseline.error
    assert target.error_kind is not None


def without_sockets(rank: Rank) -> list[float]:
    """As where the machine allows no Unix sockets."""
    from grafter.wire.rendezvous import connecting

    def refuse(name: str) -> socket.socket:
        raise PermissionError(1, "Operation not permitted")

    if rank.arguments[0] in (rank.role, "both"):
        connecting._listen = refuse
    return graft_at_once(rank)


@pytest.mark.parametrize("where", ["baseline", "both"])
def test_ranks_without_sockets_graft_through_the_store(tmp_path: Path, where: str) -> None:
    with Jobs(tmp_path, b2t_filter="True", timeout=SOON) as jobs:
        jobs.start("baseline", 2, without_sockets, where)
        jobs.start("target", 2, without_sockets, where)
        assert succeed(jobs.wait()) == [[1.0] * 3] * 4
