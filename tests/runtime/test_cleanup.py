"""What a run leaves behind: its ledgers. No process, port, socket, memory, file or store key, also after SIGKILL."""

from __future__ import annotations

import os
import signal
import socket
import threading
import time
from pathlib import Path

import pytest
import torch
from jobs import Jobs, Rank, succeed

import grafter

FAR = 1000.0


def store_keys() -> int:
    return int(grafter._process.grafter.lifecycle.session.client.raw.num_keys())  # type: ignore[union-attr]


def settled_store_keys(bound: int) -> int:
    """The store's keys once the housekeeping threads have tidied, at most 20 s later."""
    deadline = time.monotonic() + 250
    while (count := store_keys()) > bound and time.monotonic() < deadline:
        time.sleep(0.05)
    return count


MOST_KEYS = 60


def graft_often(rank: Rank) -> int:
    carrier, points, width = rank.arguments
    if carrier == "store":
        from grafter.wire.rendezvous import courier

        courier._one_host = lambda members: False
    value = torch.ones(2)
    for number in range(points):
        # Wide: a header that is too long for a letter.
        point = value if not width else {f"leaf {i} {'x' * 60}": value for i in range(width)}
        grafter.dump("h", point, number=number)
    return settled_store_keys(MOST_KEYS)


@pytest.mark.parametrize("carrier", ["mail", "store"])
@pytest.mark.parametrize("ranks", [1, 2])
def test_the_number_of_store_keys_does_not_grow_with_points(tmp_path: Path, carrier: str, ranks: int) -> None:
    with Jobs(tmp_path, b2t_filter="True", timeout=FAR, stats="off") as jobs:
        jobs.start("baseline", ranks, graft_often, carrier, 1000, 0)
        jobs.start("target", ranks, graft_often, carrier, 1000, 0)
        assert max(succeed(jobs.wait())) <= MOST_KEYS


def test_headers_too_long_for_a_letter_leave_no_store_keys_either(tmp_path: Path) -> None:
    with Jobs(tmp_path, b2t_filter="True", timeout=FAR, stats="off") as jobs:
        jobs.start("baseline", 2, graft_often, "mail", 60, 700)
        jobs.start("target", 2, graft_often, "mail", 60, 700)
        assert max(succeed(jobs.wait())) <= MOST_KEYS


def sockets_of(*marks: str) -> list[str]:
    """Abstract sockets of this machine whose name has one of the marks."""
    lines = Path("/proc/net/unix").read_text().splitlines()
    return [line for line in lines if any(mark in line for mark in marks)]


def is_listening(line: str) -> bool:
    """Of a line of /proc/net/unix."""
    return bool(int(line.split()[3], 16) & 0x10000)


def own_leftovers() -> list[str]:
    """Of this process: memory, sockets and threads of grafter's that are still there."""
    found = [thread.name for thread in threading.enumerate() if thread.name.startswith("grafter")]
    for name in os.listdir("/proc/self/fd"):
        try:
            link = os.readlink(f"/proc/self/fd/{name}")
        except OSError:
            continue
        if "memfd:grafter" in link:
            found.append(link)
    maps = Path("/proc/self/maps").read_text()
    return found + [line for line in maps.splitlines() if "memfd:grafter" in line]


def graft_and_close(rank: Rank) -> list[str]:
    directory, victim = rank.arguments
    value = torch.ones(1 << 16)
    grafter.dump("h", value, number=0)
    roster = grafter._process.grafter.lifecycle.session.roster  # type: ignore[union-attr]
    marks = [member.socket_name for member in roster.all]
    marks.append(grafter._process.grafter.lifecycle.session.client.seal.run_id)  # type: ignore[union-attr]
    if rank.is_baseline and rank.role_rank == 0:
        (directory / "marks").write_text("\n".join(marks))
    del roster
    rank.tell(f"{rank.role} {rank.role_rank}")
    if rank.role == victim and rank.role_rank == 0:
        # Not in an event: setting it would wait for this process for ever.
        time.sleep(100)
    rank.wait_for("go on")
    grafter.dump("h", value, number=1)
    grafter.close()
    deadline = time.monotonic() + 250
    while (left := own_leftovers()) and time.monotonic() < deadline:
        time.sleep(0.02)
    return left


SIGNALS = ("go on", "baseline 0", "baseline 1", "target 0", "target 1")


def check_nothing_is_left(jobs: Jobs, directory: Path) -> None:
    marks = (directory / "marks").read_text().split("\n")
    (directory / "marks").unlink()
    assert len(marks) == 5
    assert sockets_of(*marks) == []
    for job in jobs.jobs.values():
        assert not any(process.is_alive() for process in job.processes)
    with socket.socket() as question:
        assert question.connect_ex(("127.0.0.1", jobs.port)) != 0
    assert {path.name for path in directory.iterdir()} == {"run"}
    files = {path.name for path in directory.rglob("*") if path.is_file()}
    ledgers = {f"rank{r}.{kind}" for r in (0, 1) for kind in ("ledger.jsonl", "summary.json")}
    assert files <= ledgers | {"run.json"}


@pytest.mark.parametrize("backend", ["auto", "gloo"])
def test_a_run_that_ends_in_good_order_leaves_its_ledgers_alone(tmp_path: Path, backend: str) -> None:
    with Jobs(tmp_path, b2t_filter="True", timeout=FAR, hosted=False, backend=backend, signals=SIGNALS) as jobs:
        jobs.start("baseline", 2, graft_and_close, tmp_path, None)
        jobs.start("target", 2, graft_and_close, tmp_path, None)
        assert all(jobs.signals[name].wait(250) for name in SIGNALS[1:])
        found = sockets_of(*(tmp_path / "marks").read_text().split("\n"))
        assert len(found) == 6, "the test sees what it looks for: a channel for each pair of the four ranks"
        assert not any(is_listening(line) for line in found)
        jobs.signals["go on"].set()
        assert succeed(jobs.wait()) == [[]] * 4
        check_nothing_is_left(jobs, tmp_path)


@pytest.mark.parametrize("victim", ["baseline", "target"])
@pytest.mark.parametrize("backend", ["auto", "gloo"])
def test_a_killed_process_leaves_nothing_either(tmp_path: Path, backend: str, victim: str) -> None:
    with Jobs(tmp_path, b2t_filter="True", timeout=FAR, hosted=False, backend=backend, signals=SIGNALS) as jobs:
        jobs.start("baseline", 2, graft_and_close, tmp_path, victim)
        jobs.start("target", 2, graft_and_close, tmp_path, victim)
        assert all(jobs.signals[name].wait(250) for name in SIGNALS[1:])
        jobs.kill(victim, 0, signal.SIGKILL)
        jobs.signals["go on"].set()
        results = jobs.wait()
        assert [r.error_kind for r in results].count("PeerLostError") == 3, results
        check_nothing_is_left(jobs, tmp_path)
