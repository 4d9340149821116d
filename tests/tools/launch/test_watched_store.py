"""The launcher's view of a run: who waits for what, in one line."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator

import pytest

from grafter.core.messages.roster import ANNOUNCEMENTS, Announcement
from grafter.core.messages.wire import Seal
from grafter.core.process_identity import ProcessIdentity
from grafter.core.roles import RoleName
from grafter.errors import RunError
from grafter.tools.launch.supervision import WatchedStore, summarize_lines
from grafter.wire.monitor.status_board import BoardLine, BoardWriter
from grafter.wire.store_client import StoreClient, connect

PROCESS = ProcessIdentity(host="h", hostname="h", uid=0, pid=1, start_time=1)


@pytest.fixture
def store() -> Iterator[WatchedStore]:
    watched = WatchedStore()
    yield watched
    watched.close()


def client_of(store: WatchedStore) -> StoreClient:
    raw = connect(store.address, store.port, timeout=10, keep_trying=lambda: True)
    return StoreClient(raw, Seal("target/0", None), "graft")


def announcement(role: RoleName, role_rank: int, world_size: int) -> Announcement:
    return Announcement(
        protocol_version=1,
        grafter_version="0",
        role=role,
        role_rank=role_rank,
        role_world_size=world_size,
        process=PROCESS,
        restart_count=0,
        shared_settings={},
        expected_world_sizes={},
    )


def test_it_tells_who_has_not_joined_and_then_who_waits(store: WatchedStore) -> None:
    """From the first rank to the first wait, the line names who is missing; None once nobody waits."""
    client = client_of(store)
    job_prefix = client.job_prefix
    assert "waiting for the baseline job to join" in str(store.waiting_summary())
    client.put_if_absent(f"{job_prefix}/run", "run", "1234 name")
    client.seal.run_id = "1234"
    client.put_if_absent(f"{job_prefix}/hello/baseline/0", "hello", announcement("baseline", 0, 3).model_dump_json())
    summary = str(store.waiting_summary())
    assert summary.startswith("waiting for baseline ranks 1, 2 to join and waiting for the target job to join, since ")
    for role in ("baseline", "target"):
        roster = ANNOUNCEMENTS.dump_json([announcement(role, 0, 1)]).decode()  # type: ignore[arg-type]
        client.put_if_absent(f"{job_prefix}/roster/{role}", "roster", roster)
    assert store.waiting_summary() is None
    BoardWriter("target", 0).waiting(
        client, digest="d", point="'layer' (layer_id=3, step=0)", participants=(0,), awaits=(), call_site="a.py:1",
        since=time.time() - 12.2,
    )  # fmt: skip
    client.exists(job_prefix)  # the line was sent without waiting; this answer comes after it
    assert store.waiting_summary() == "target rank 0 waits for 'layer' (layer_id=3, step=0) since 12 s"
    assert store.waiting_summary() == "target rank 0 waits for 'layer' (layer_id=3, step=0) since 12 s"


def test_a_run_that_ended_before_it_was_opened_has_nobody_who_waits(store: WatchedStore) -> None:
    """What a rank waited for then holds the run's end, which is no run."""
    client = client_of(store)
    client.wake(f"{client.job_prefix}/run", RunError("the baseline job exited with code 0"))
    assert store.waiting_summary() is None


def test_looking_wakes_nobody(store: WatchedStore) -> None:
    """A rank that waits for a key still waits after the launcher has looked for it, and gets the value."""
    waiter, other = client_of(store), client_of(store)
    got: list[str] = []
    key = f"{waiter.job_prefix}/run"
    thread = threading.Thread(target=lambda: got.append(waiter.get_all([key])[0].payload))
    thread.start()
    deadline = time.monotonic() + 1.0
    while time.monotonic() < deadline:
        store.waiting_summary()
    other.put_if_absent(key, "run", "1234 name")
    thread.join(250)
    assert got == ["1234 name"]


def test_the_longest_wait_is_told_with_the_number_of_others() -> None:
    """Of several waits the longest is told; ranks that run or have left are no waits."""

    def line(rank: int, state: str, since: float) -> BoardLine:
        return BoardLine(role="target", role_rank=rank, sequence=1, state=state, since=since, point="'x'")  # type: ignore[arg-type]

    lines = [line(0, "running", 1.0), line(1, "waiting", 5.0), line(2, "waiting", 3.0), line(3, "left", 0.0)]
    assert summarize_lines(lines, now=10.0) == "target rank 2 waits for 'x' since 7 s (1 more rank waits)"
    assert summarize_lines(lines[:2], now=10.0) == "target rank 1 waits for 'x' since 5 s"
    assert summarize_lines(lines[:1], now=10.0) is None
