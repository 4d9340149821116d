"""With a secret, a stranger at the store cannot end, block or change a run: what it writes is ignored and counted."""

from __future__ import annotations

import json
import os
import threading
import time
from pathlib import Path

import pytest
import torch
from jobs import Jobs, Rank, succeed
from torch.distributed import TCPStore

import grafter
from grafter.core.messages.wire import Seal
from grafter.errors import ProtocolError, RunError
from grafter.wire.store_client import StoreClient
from grafter.wire.store_server import connect, serve

SECRET = "between us"
FAR = 100.0
SOON = 30.0


@pytest.fixture
def server() -> TCPStore:
    return serve("127.0.0.1", 0)


def client_of(
    server: TCPStore, writer: str = "baseline/0", secret: str | None = SECRET, run: str = "r1"
) -> StoreClient:
    seal = Seal(writer, secret)
    seal.run_id = run
    return StoreClient(connect("127.0.0.1", server.port, timeout=30, keep_trying=lambda: True), seal, "g")


def forged(key: str, how: str) -> bytes:
    """A value that this run has not written."""
    unsigned, other_run, other_secret = Seal("target/0", None), Seal("target/0", SECRET), Seal("target/0", "another")
    unsigned.run_id = other_secret.run_id = "r1"
    other_run.run_id = "r0"
    values = {
        "garbage": b"\xff\xfe\x00 garbage",
        "empty": b"",
        "unsigned": unsigned.seal(key, "manifest", "{}").encode(),
        "abort": unsigned.seal(key, "abort", "PairingError\nforged").encode(),
        "another run": other_run.seal(key, "manifest", "{}").encode(),
        "another secret": other_secret.seal(key, "manifest", "{}").encode(),
        "a copy": other_run.seal(f"{key}/2", "manifest", "{}").encode(),
    }
    return values[how]


HOW = ["garbage", "empty", "unsigned", "abort", "another run", "another secret", "a copy"]


def plant(server: TCPStore, key: str, value: str | bytes) -> None:
    """Put a value. The store answers no `set`, and orders the calls of one connection alone: ask for it, too."""
    server.set(key, value)
    server.get(key)


@pytest.mark.parametrize("how", HOW)
def test_what_this_run_did_not_write_counts_as_absent_in_every_call(server: TCPStore, how: str) -> None:
    mine = client_of(server)
    for key in ("peeked", "put", "exchanged", "found", "woken"):
        plant(server, key, forged(key, how))
    assert mine.peek("peeked") is None
    assert not mine.exists("peeked") and not mine.all_exist(["peeked"])
    assert mine.peek_all(["peeked", "absent"]) == [None, None]
    assert mine.put_if_absent("put", "kind", "mine") is None
    assert client_of(server, "target/0").get("put").payload == "mine"
    before = mine.put_if_absent("state", "open", "")
    assert before is None
    was = mine.peek("state")
    assert was is not None
    assert mine.exchange("exchanged", was, "claimed", "") == was, "as if it had been deleted"
    assert mine.find_other("found", was) is None
    mine.wake("woken", RunError("over"))
    with pytest.raises(RunError, match="over"):
        mine.get("woken")
    assert mine.seal.ignored.count


@pytest.mark.parametrize("how", HOW)
def test_without_a_secret_such_a_value_is_an_error(server: TCPStore, how: str) -> None:
    """Nothing can be told apart there; `unsigned` is what the others write, too."""
    mine = client_of(server, secret=None)
    plant(server, "k", forged("k", how))
    if how == "unsigned":
        assert mine.peek("k") is not None
    elif how == "abort":
        with pytest.raises(RunError, match="forged"):
            mine.get("k")
    else:
        with pytest.raises(ProtocolError):
            mine.peek("k")


def test_a_waiter_is_not_kept_by_what_a_stranger_has_put_under_its_key(server: TCPStore) -> None:
    mine, theirs = client_of(server), client_of(server, "target/0")
    plant(server, "awaited", b"garbage")
    came: list[str] = []
    waiter = threading.Thread(target=lambda: came.append(mine.get("awaited").payload))
    waiter.start()
    while not mine.seal.ignored.count:
        time.sleep(0.01)
    theirs.set("awaited", "kind", "genuine")
    waiter.join(30)
    assert came == ["genuine"]


def test_a_waiter_gives_up_at_its_deadline_and_says_what_was_ignored(server: TCPStore) -> None:
    mine = client_of(server)
    mine.set_timeout(1)
    plant(server, "awaited", b"garbage")
    with pytest.raises(ProtocolError, match=r"ignored 1 value .* under 'awaited'"):
        mine.get("awaited")


def test_what_is_ignored_is_counted_once_for_each_value_and_logged_once(
    server: TCPStore, caplog: pytest.LogCaptureFixture
) -> None:
    mine = client_of(server)
    for value in (b"one", b"one", b"two"):
        plant(server, "k", value)
        for _ in range(3):
            assert mine.peek("k") is None
    assert mine.seal.ignored.count == 2
    assert len([line for line in caplog.messages if "did not write" in line]) == 1
    assert "2 values" in mine.seal.ignored.note


# In runs.


def meet_often(rank: Rank) -> tuple[list[float], list[str]]:
    """Every value that this rank held after each point, and where it ignored what a stranger had written."""
    through_the_store, points = rank.arguments
    if through_the_store:
        from grafter.wire.rendezvous import message_router

        message_router._one_host = lambda members: False
    values = []
    for number in range(points):
        value = torch.full((3,), float(number) if rank.is_baseline else -1.0)
        grafter.dump("h", value, number=number)
        values.append(float(value[0]))
        if number == 0:
            session = grafter._process.grafter.lifecycle.session  # type: ignore[union-attr]
            path = Path(os.environ["GRAFTER_DIR"]) / f"{rank.role}.prefix"
            path.with_suffix(".tmp").write_text(session.client.run_prefix)
            path.with_suffix(".tmp").rename(path)
            rank.tell(f"{rank.role} met")
            rank.wait_for("go on")
            # The monitor threads look once a second.
            deadline = time.monotonic() + 60
            while session.client.seal.ignored.count < 2 and time.monotonic() < deadline:
                time.sleep(0.02)
    return values, session.client.seal.ignored.keys


def keys_to_come(run_prefix: str, points: int) -> list[str]:
    """Where ranks of this run read: of points to come, of the outcome, of failures, changes, aborts and the board."""
    from grafter.core.messages.manifest import store_keys
    from grafter.core.points import StepCounter

    counter = StepCounter()
    job_prefix = run_prefix.split("/v")[0]
    keys = [
        f"{job_prefix}/abort",
        f"{job_prefix}/exit/baseline",
        f"{job_prefix}/exit/target",
        f"{run_prefix}/control/0",
        f"{run_prefix}/failure/0",
        f"{run_prefix}/failure/1",
        f"{run_prefix}/failure/last",
        f"{run_prefix}/control/question",
        f"{run_prefix}/board/baseline/0",
        f"{run_prefix}/board/target/0",
    ]
    keys += [f"{run_prefix}/idle/baseline/0", f"{run_prefix}/beat/0", f"{run_prefix}/beat/1"]
    for number in range(1, points):
        names = store_keys(run_prefix, counter.next_key({"name": "h", "number": number}, None).digest)
        keys += [names.first, names.second, names.outcome, names.pair("target"), names.state]
    return keys


@pytest.mark.parametrize("through_the_store", [False, True], ids=["by mail", "through the store"])
def test_a_stranger_that_writes_everywhere_during_a_run_changes_nothing(
    tmp_path: Path, through_the_store: bool
) -> None:
    """Garbage, and well-formed messages that are unsigned: an abort, a failure, a manifest."""
    points, ranks = 4, 2
    signals = ("baseline met", "target met", "go on")
    with Jobs(tmp_path, b2t_filter="True", timeout=FAR, hosted=False, secret=SECRET, signals=signals) as jobs:
        jobs.start("baseline", 1, meet_often, through_the_store, points)
        jobs.start("target", 1, meet_often, through_the_store, points)
        assert jobs.signals["baseline met"].wait(60)
        assert jobs.signals["target met"].wait(60)
        run_prefix = (tmp_path / "target.prefix").read_text()
        store = connect("127.0.0.1", jobs.port, timeout=30, keep_trying=lambda: True)
        seal = Seal("baseline/0", None)
        seal.run_id = run_prefix.rsplit("/", 1)[1]
        for number, key in enumerate(keys_to_come(run_prefix, points)):
            kind, payload = ("abort", "PairingError\nforged") if number % 2 else ("manifest", json.dumps(["x", "y"]))
            store.set(key, seal.seal(key, kind, payload) if number % 3 else "garbage")
        jobs.signals["go on"].set()
        results = jobs.wait()
        values = succeed(results)
    assert [kept for kept, _ in values] == [[float(n) for n in range(points)]] * ranks
    assert all(len(ignored) >= 2 for _, ignored in values), values
    if through_the_store:
        assert any("/p/" in key for _, ignored in values for key in ignored), "the points' own keys"
    assert max(result.seconds for result in results) < SOON


def graft_one(rank: Rank) -> float:
    value = torch.full((3,), 1.0 if rank.is_baseline else 2.0)
    grafter.dump("h", value)
    return float(value[0])


def test_a_stranger_that_was_there_before_the_run_changes_nothing(tmp_path: Path) -> None:
    """Everything that a join reads holds garbage, or a message that nobody of the run has signed."""
    with Jobs(tmp_path, b2t_filter="True", timeout=FAR, secret=SECRET) as jobs:
        store = connect("127.0.0.1", jobs.port, timeout=30, keep_trying=lambda: True)
        stranger = Seal("baseline/0", None)
        roles = ("baseline", "target")
        places = ["abort", "run", "host"]
        places += [f"{what}/{role}" for what in ("roster", "hail", "exit") for role in roles]
        places += [f"hello/{role}/{rank}" for role in roles for rank in (0, 1)]
        for number, place in enumerate(places):
            key = f"grafter/graft/{place}"
            kind, payload = ("hail", '["1234", "5678"]') if place.startswith("hail") else ("abort", "JoinError\nforged")
            store.set(key, stranger.seal(key, kind, payload) if number % 2 or kind == "hail" else "garbage")
        jobs.start("target", 2, graft_one)
        jobs.start("baseline", 2, graft_one)
        assert succeed(jobs.wait()) == [1.0] * 4
