"""When a silent store ends the run: never while its process may be continued in time, else by the timeouts."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest

from grafter.core.process_identity import ProcessIdentity, own_identity
from grafter.core.processes import process_state
from grafter.errors import PeerLostError, PointTimeoutError
from grafter.wire.monitor.store_host import StoreHost
from grafter.wire.monitor.store_link import StoreLink
from grafter.wire.monitor.waits import Wait

THE_BOARD = "baseline rank 0 is running and at no point"


@pytest.fixture
def process() -> Iterator[subprocess.Popen[bytes]]:
    started = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(300)"])
    yield started
    started.kill()
    started.wait()


def identity_of(pid: int, **changes: Any) -> ProcessIdentity:
    return own_identity().model_copy(update={"pid": pid, "start_time": process_state(pid)[1], **changes})


def link_to(host: StoreHost, warned: list[int] | None = None) -> tuple[StoreLink, Any]:
    client: Any = SimpleNamespace(silent_seconds=0.0, patience=None)
    members: Any = SimpleNamespace(host=host, describe_last_board=lambda remarks=None: THE_BOARD, stopped=dict)
    return StoreLink(client, members, "target rank 0", lambda: (warned if warned is not None else []).append(1)), client


def wait_of(seconds: float, timeout: float = 20.0) -> Wait:
    return Wait("pairing", "'h' (step=0)", timeout, since=time.monotonic() - seconds)


def test_a_stopped_host_on_this_machine_is_not_waited_for_by_the_housekeeping_and_ends_the_run_at_the_timeout(
    process: subprocess.Popen[bytes],
) -> None:
    warned: list[int] = []
    link, client = link_to(StoreHost("grafter run", identity_of(process.pid)), warned)
    link.look(1.0)
    os.kill(process.pid, signal.SIGSTOP)
    while process_state(process.pid)[0] != "T":
        time.sleep(0.01)
    with pytest.raises(PeerLostError):
        link.look(0.25)
    assert len(warned) == 2
    client.silent_seconds = 100.0
    assert link.lose(PeerLostError("does not answer")) is None
    assert link.look_again(None) is None, "no point waits"
    assert link.look_again(wait_of(19)) is None, "it may be continued"
    error = link.look_again(wait_of(21))
    assert isinstance(error, PointTimeoutError)
    assert "waited 20 s for 'h' (step=0) (pairing)" in str(error)
    assert f"grafter run (pid {process.pid} on " in str(error) and "is stopped" in str(error)
    assert THE_BOARD in str(error)
    client.silent_seconds = 0.0
    assert link.look_again(wait_of(19)) is None and not link.is_down


def test_a_host_elsewhere_is_lost_after_a_minute_of_silence_or_at_the_timeout() -> None:
    elsewhere = StoreHost("baseline rank 0", own_identity().model_copy(update={"host": "another", "hostname": "node1"}))
    for host in (elsewhere, StoreHost("baseline rank 0")):
        link, client = link_to(host)
        link.look(4.0)
        with pytest.raises(PeerLostError):
            link.look(5.5)
        client.silent_seconds = 59.0
        assert link.lose(PeerLostError("does not answer")) is None
        assert link.look_again(wait_of(59, 300)) is None
        assert isinstance(link.look_again(wait_of(21)), PointTimeoutError)
        client.silent_seconds = 61.0
        error = link.look_again(wait_of(61, 300))
        assert isinstance(error, PeerLostError)
        assert "has not answered for 61 s" in str(error) and THE_BOARD in str(error)


def test_a_host_that_has_ended_is_lost_at_once(process: subprocess.Popen[bytes]) -> None:
    link, client = link_to(StoreHost("grafter run", identity_of(process.pid)))
    process.kill()
    process.wait()
    client.silent_seconds = 1.0
    assert link.lose(PeerLostError("does not answer")) is None
    error = link.look_again(wait_of(1))
    assert isinstance(error, PeerLostError) and "has ended" in str(error)
    # A broken connection is no silence.
    client.silent_seconds = 0.0
    assert isinstance(link.lose(PeerLostError("lost")), PeerLostError)
