"""The store's process is stopped: it is named at once, and the point fails at the timeout, with the board."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from jobs import Jobs, Rank

import grafter
from grafter.core.messages.wire import Seal
from grafter.errors import PeerLostError
from grafter.wire.store_client import StoreClient, connect, serve

FAR = 100.0
TIMEOUT = 6
# How late a busy machine may be. Before, it took the timeout and half of it again, at the least.
LATE = 3.0


def stop(pid: int) -> None:
    """Every thread of a process: the kernel stops them one after another."""
    os.kill(pid, signal.SIGSTOP)
    states: set[str] = set()
    deadline = time.monotonic() + 30
    while states != {"T"} and time.monotonic() < deadline:
        paths = Path(f"/proc/{pid}/task").glob("*/stat")
        states = {path.read_text().rpartition(")")[2].split()[0] for path in paths}
        time.sleep(0.01)
    assert states == {"T"}


def print_into(path: Path) -> None:
    """What this rank, and torch in it, print from here on."""
    fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(fd, 2)
    os.close(fd)


def meet_then_wait(rank: Rank) -> float:
    """The second point starts once the test has stopped the host. How long it took to fail."""
    through_the_store, directory = rank.arguments
    if through_the_store:
        from grafter.wire.rendezvous import courier

        courier._one_host = lambda members: False
    print_into(directory / f"{rank.role}.stderr")
    grafter.dump("first", torch.ones(1))
    if not rank.is_baseline:
        # The board is read once a second: its last reading must have the first point in it.
        housekeeping = grafter._process.grafter.lifecycle.session.housekeeping  # type: ignore[union-attr]
        while not any(line.last_points for line in housekeeping.last_seen("baseline")):
            time.sleep(0.05)
    rank.tell(f"{rank.role} met")
    if rank.is_baseline:
        # Not in an event: setting it would wait for this process for ever.
        time.sleep(100)
    rank.wait_for("stopped")
    started = time.monotonic()
    try:
        grafter.dump("second", torch.ones(1))
    except grafter.errors.PointTimeoutError:
        (directory / "seconds").write_text(str(time.monotonic() - started))
        raise
    return time.monotonic() - started


@pytest.mark.parametrize("through_the_store", [False, True], ids=["by mail", "through the store"])
def test_a_stopped_host_of_jobs_started_by_hand_fails_the_point_at_the_timeout(
    tmp_path: Path, through_the_store: bool
) -> None:
    """Baseline rank 0 hosts the store. Torch writes its stack nowhere."""
    signals = ("baseline met", "target met", "stopped")
    with Jobs(tmp_path, b2t_filter="True", timeout=TIMEOUT, hosted=False, signals=signals) as jobs:
        jobs.start("baseline", 1, meet_then_wait, through_the_store, tmp_path)
        jobs.start("target", 1, meet_then_wait, through_the_store, tmp_path)
        assert jobs.signals["baseline met"].wait(60)
        assert jobs.signals["target met"].wait(60)
        pid = jobs.pid("baseline", 0)
        stop(pid)
        jobs.signals["stopped"].set()
        target = jobs.wait_for_one("target", 0)
    assert target.error_kind == "PointTimeoutError"
    assert TIMEOUT <= float((tmp_path / "seconds").read_text()) < TIMEOUT + LATE
    assert "'second'" in target.error
    assert f"baseline rank 0 (pid {pid} on " in target.error
    assert "hosts it, is stopped" in target.error
    assert "[its process, pid" in target.error, "the board says it of the rank"
    assert "its last points: 'first' (step=0) sent" in target.error
    printed = (tmp_path / "target.stderr").read_text()
    assert "c10d" not in printed and "frame #" not in printed, printed
    warning = next(line for line in printed.splitlines() if "cannot answer" in line)
    assert "baseline rank 0" in warning and str(pid) in warning and "hosts the rendezvous store" in warning


HOST = """
import sys, time
from grafter.wire.store_client import HostedStore
store = HostedStore(secret=sys.argv[1] or None)
print(store.port, flush=True)
time.sleep(300)
"""


@contextlib.contextmanager
def hosting_process(secret: str = "") -> Iterator[subprocess.Popen[str]]:
    """A process that hosts the store, as `grafter run` does."""
    process = subprocess.Popen([sys.executable, "-c", HOST, secret], stdout=subprocess.PIPE, text=True)
    try:
        yield process
    finally:
        process.kill()
        process.wait()
        assert process.stdout is not None
        process.stdout.close()


def meet_twice(rank: Rank) -> str:
    print_into(rank.arguments[0] / f"{rank.role}.stderr")
    grafter.dump("first", torch.ones(1))
    rank.tell(f"{rank.role} met")
    if rank.is_baseline:
        rank.wait_for("go on")
    grafter.dump("second", torch.ones(1))
    return "done"


@pytest.mark.parametrize("is_continued", [True, False], ids=["continued", "left stopped"])
def test_a_stopped_launcher_is_named_and_may_be_continued(tmp_path: Path, is_continued: bool) -> None:
    """`grafter run` hosts the store and is no rank: its process is named all the same."""
    signals = ("baseline met", "target met", "go on")
    with hosting_process() as host:
        assert host.stdout is not None
        settings: dict[str, Any] = {"store_host": "launcher", "master_port": int(host.stdout.readline())}
        timeout = FAR if is_continued else TIMEOUT
        with Jobs(tmp_path, b2t_filter="True", hosted=False, signals=signals, timeout=timeout) as jobs:
            jobs.start("baseline", 1, meet_twice, tmp_path, **settings)
            jobs.start("target", 1, meet_twice, tmp_path, **settings)
            assert jobs.signals["baseline met"].wait(60)
            assert jobs.signals["target met"].wait(60)
            stop(host.pid)
            printed = ""
            deadline = time.monotonic() + 60
            while "cannot answer" not in printed and time.monotonic() < deadline:
                printed = (tmp_path / "target.stderr").read_text()
                time.sleep(0.1)
            assert f"grafter run (pid {host.pid} on " in printed, printed
            if is_continued:
                os.kill(host.pid, signal.SIGCONT)
                jobs.signals["go on"].set()
                assert [result.value for result in jobs.wait()] == ["done", "done"]
                return
            target = jobs.wait_for_one("target", 0)
    assert target.error_kind == "PointTimeoutError"
    assert f"grafter run (pid {host.pid} on " in target.error
    assert "baseline rank 0" in target.error.split("read it last")[1], "the board"


def test_a_call_of_a_silent_store_ends_and_the_next_one_at_once() -> None:
    """No call blocks for longer than the client allows; the answer may still come, and then it serves again."""
    with hosting_process() as host:
        assert host.stdout is not None
        raw = connect("127.0.0.1", int(host.stdout.readline()), timeout=30, keep_trying=lambda: True)
        client = StoreClient(raw, Seal("baseline/0", None), "g")
        client.set_timeout(1)
        client.set("k", "kind", "payload")
        assert client.exists("k")
        stop(host.pid)
        with pytest.raises(PeerLostError, match="has not answered for 1 s"):
            client.peek("k")
        started = time.monotonic()
        for call in (lambda: client.peek("k"), lambda: client.get("k"), lambda: client.set("k", "kind", "other")):
            with pytest.raises(PeerLostError, match="has not answered"):
                call()
        assert time.monotonic() - started < 0.5
        os.kill(host.pid, signal.SIGCONT)
        deadline = time.monotonic() + 60
        while client.silent_seconds and time.monotonic() < deadline:
            time.sleep(0.01)
        found = client.peek("k")
        assert found is not None and found.payload == "payload"


class Handler(Exception):
    """What a signal's handler of the program raises."""


def test_an_exception_of_a_signal_handler_ends_a_wait_and_the_client_serves_again() -> None:
    """The call in hand is given a second to end: the housekeeping wakes it. Then what the handler raised is raised."""
    store = serve("127.0.0.1", 0)
    raw = connect("127.0.0.1", store.port, timeout=30, keep_trying=lambda: True)
    client, other = (
        StoreClient(raw, Seal("baseline/0", None), "g"),
        StoreClient(store, Seal("x", None), "g", is_server=True),
    )

    def handle(*_: object) -> None:
        other.set("awaited", "kind", "came")
        raise Handler

    before = signal.signal(signal.SIGUSR1, handle)
    try:
        threading.Timer(0.5, lambda: os.kill(os.getpid(), signal.SIGUSR1)).start()
        with pytest.raises(Handler):
            client.get("awaited")
    finally:
        signal.signal(signal.SIGUSR1, before)
    while client.silent_seconds:
        # The value is there, and ends the call that the handler interrupted.
        time.sleep(0.01)
    assert client.get("awaited").payload == "came"


@pytest.mark.parametrize("size", [8 << 20, 1 << 16], ids=["one long value", "many short ones"])
def test_values_that_a_stopped_store_does_not_take_keep_no_rank_for_longer_than_its_client_allows(size: int) -> None:
    """The connection's buffers take some megabytes; a write beyond them would block for ever."""
    with hosting_process() as host:
        assert host.stdout is not None
        raw = connect("127.0.0.1", int(host.stdout.readline()), timeout=30, keep_trying=lambda: True)
        client = StoreClient(raw, Seal("baseline/0", None), "g")
        client.set_timeout(1)
        assert not client.exists("k")
        stop(host.pid)
        failed: list[Exception] = []

        def write() -> None:
            try:
                for number in range((16 << 20) // size):
                    client.set(f"k/{number}", "kind", "x" * size)
            except PeerLostError as error:
                failed.append(error)

        writer = threading.Thread(target=write, daemon=True)
        writer.start()
        writer.join(30)
        assert not writer.is_alive()
        assert len(failed) == 1
