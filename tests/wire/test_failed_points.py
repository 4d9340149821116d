"""The list of failed points: every sender hears of every point, and the list stays bounded."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from jobs import Jobs, Rank, succeed
from torch.distributed import TCPStore

import grafter
from grafter.core.messages.manifest import store_keys
from grafter.core.messages.wire import Seal
from grafter.core.points import StepCounter
from grafter.wire import failed_points
from grafter.wire.failed_points import FailedPoints, SentPoints
from grafter.wire.store_client import StoreClient, connect, serve


@pytest.fixture
def server() -> TCPStore:
    return serve("127.0.0.1", 0)


@pytest.fixture(autouse=True)
def kept(monkeypatch: pytest.MonkeyPatch) -> Iterator[int]:
    monkeypatch.setattr(failed_points, "KEPT", 20)
    yield 20


class Member:
    """One rank: what it tells, and what it hears."""

    def __init__(self, server: TCPStore, writer: str, secret: str | None = "secret") -> None:
        raw = connect("127.0.0.1", server.port, timeout=30, keep_trying=lambda: True)
        self.client = StoreClient(raw, Seal(writer, secret), "g")
        self.heard: list[str] = []
        self.points = FailedPoints("run", lambda digest, reason: self.heard.append(digest))
        self.points.is_listening = writer.startswith("baseline")

    def tell(self, *digests: int) -> None:
        for digest in digests:
            self.points.add(str(digest), "the reason")
        self.points.tell(self.client)
        assert self.points.has_told_all

    def hear(self) -> list[str]:
        self.points.hear(self.client)
        return self.heard


def test_each_failure_is_heard_once_though_all_receivers_tell_it(server: TCPStore) -> None:
    first, second = Member(server, "target/0"), Member(server, "target/1")
    sender, other = Member(server, "baseline/0"), Member(server, "baseline/1")
    for number in range(7):
        (first if number % 2 else second).tell(number)
        (second if number % 2 else first).tell(number)
        sender.hear()
    expected = [str(number) for number in range(7)]
    assert sender.hear() == other.hear() == expected


@pytest.mark.parametrize("secret", ["secret", None])
def test_a_place_that_another_program_deletes_stalls_neither_side(
    server: TCPStore, secret: str | None, caplog: pytest.LogCaptureFixture
) -> None:
    """Also the last one, and whichever of both sides comes to the hole first."""
    first, second = Member(server, "target/0", secret), Member(server, "target/1", secret)
    sender = Member(server, "baseline/0", secret)
    first.tell(*range(5))
    server.delete_key("run/failure/2")
    server.delete_key("run/failure/4")
    assert sender.hear() == ["0", "1", "3"]
    assert len([line for line in caplog.messages if "cannot hear of some points" in line]) == 1
    second.tell(10)
    first.tell(11)
    assert {"10", "11"} <= set(sender.hear())


def test_a_rank_that_fills_a_deleted_place_tells_it_at_the_end_too(server: TCPStore) -> None:
    first, second, sender = Member(server, "target/0"), Member(server, "target/1"), Member(server, "baseline/0")
    first.tell(*range(4))
    sender.hear()
    for place in (0, 3):
        server.delete_key(f"run/failure/{place}")
        second.tell(20 + place)
        assert sender.hear()[-1] == str(20 + place)


def test_the_hint_to_the_end_may_be_deleted(server: TCPStore) -> None:
    first, sender = Member(server, "target/0"), Member(server, "baseline/0")
    first.tell(0, 1)
    server.delete_key("run/failure/last")
    first.tell(2)
    assert sender.hear() == ["0", "1", "2"]


def test_the_store_keeps_the_last_ones_alone(server: TCPStore, kept: int, caplog: pytest.LogCaptureFixture) -> None:
    first, sender, late = Member(server, "target/0"), Member(server, "baseline/0"), Member(server, "baseline/1")
    before = server.num_keys()
    for number in range(10 * kept):
        first.tell(number)
        if number % 5 == 0:
            sender.hear()
    assert server.num_keys() - before == kept + 1
    assert sender.hear() == [str(number) for number in range(10 * kept)]
    assert not caplog.messages
    assert late.hear() == [str(number) for number in range(9 * kept, 10 * kept)]
    assert late.points._missed == 9 * kept
    assert len(caplog.messages) == 1


def test_a_receiver_that_was_stopped_for_long_tells_its_own_at_the_end(server: TCPStore, kept: int) -> None:
    """All places that it knows have been deleted meanwhile."""
    first, second, sender = Member(server, "target/0"), Member(server, "target/1"), Member(server, "baseline/0")
    second.tell(1000)
    for number in range(5 * kept):
        first.tell(number)
        sender.hear()
    second.tell(1001)
    assert sender.hear()[-1] == "1001"
    assert server.num_keys() <= kept + 3


def test_a_receiver_that_is_stopped_within_its_look_tells_its_own_all_the_same(
    server: TCPStore, kept: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It puts its failure at a place that others have filled and deleted since it looked for the end."""
    first, second, sender = Member(server, "target/0"), Member(server, "target/1"), Member(server, "baseline/0")
    find_last = FailedPoints._find_last

    def look_then_stop(self: FailedPoints, client: StoreClient) -> int:
        last = find_last(self, client)
        monkeypatch.setattr(FailedPoints, "_find_last", find_last)
        for number in range(3 * kept):
            first.tell(number)
            sender.hear()
        return last

    monkeypatch.setattr(FailedPoints, "_find_last", look_then_stop)
    second.tell(1000)
    assert sender.hear()[-1] == "1000"


def test_one_look_reads_a_bounded_part_and_the_last_one_all(server: TCPStore, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(failed_points, "_PLACES_PER_LOOK", 4)
    first, sender = Member(server, "target/0"), Member(server, "baseline/0")
    first.tell(*range(16))
    assert len(sender.hear()) == 6
    sender.points.leave(sender.client, 10.0)
    assert len(sender.heard) == 16


def test_a_place_that_is_filled_between_two_looks_is_heard(server: TCPStore, monkeypatch: pytest.MonkeyPatch) -> None:
    """The look at the place finds nothing, then a receiver fills it, then the look at the end finds it filled."""
    receiver, sender = Member(server, "target/0"), Member(server, "baseline/0")
    find_last, told = sender.points._find_last, iter(range(2))

    def tell_first(client: StoreClient) -> int:
        for number in told:
            receiver.tell(number)
        return find_last(client)

    monkeypatch.setattr(sender.points, "_find_last", tell_first)
    assert sender.hear() == ["0", "1"]


def test_a_failure_that_is_heard_before_the_point_is_recorded_is_not_lost() -> None:
    """Whichever comes first, the line is marked as failed once."""
    sent: SentPoints[str] = SentPoints()
    assert sent.add("sent first", "line") is None
    assert sent.take_failed("sent first", "why") == "line"
    assert sent.take_failed("heard first", "why") is None
    assert sent.add("heard first", "line") == "why"
    assert sent.take_failed("heard first", "why") == "line"
    assert sent.take_failed("heard first", "why") is None


def test_what_a_sender_remembers_is_bounded(kept: int) -> None:
    sent: SentPoints[int] = SentPoints()
    for number in range(3 * kept):
        sent.take_failed(f"failed {number}", "why")
        sent.add(f"sent {number}", number)
    assert len(sent._sent) == len(sent._failed) == kept


def test_a_reason_is_bounded(server: TCPStore) -> None:
    first = Member(server, "target/0")
    first.points.add("d", "x" * 100_000)
    first.points.tell(first.client)
    assert len(server.get("run/failure/0")) < 3000


# In a run.


def refuse(graft_input: Any) -> torch.Tensor:
    raise ValueError("the transform's own fault")


def fail_often(rank: Rank) -> tuple[int, int]:
    """How many reasons of refused points were in the store once, and how many are there in the end."""
    points, through_the_store = rank.arguments
    if through_the_store:
        from grafter.wire.rendezvous import courier

        courier._one_host = lambda members: False
    counter, names, seen = StepCounter(), [], 0
    for number in range(points):
        grafter.dump("h", torch.ones(2), number=number, transform=None if rank.is_baseline else refuse)
        client = grafter._process.grafter.lifecycle.session.client  # type: ignore[union-attr]
        digest = counter.next_key({"name": "h", "number": number}, None).digest
        names.append(store_keys(client.run_prefix, digest).outcome)
        if not rank.is_baseline:
            # Its own last point's reason, which nobody deletes before its next point.
            seen += client.peek(names[-1]) is not None
    deadline = time.monotonic() + 60
    while (left := sum(client.exists(name) for name in names)) > 1 and time.monotonic() < deadline:
        time.sleep(0.02)
    return seen, left


@pytest.mark.parametrize("through_the_store", [False, True], ids=["by mail", "through the store"])
@pytest.mark.parametrize("receivers", [1, 2])
def test_the_reason_of_a_failed_point_leaves_the_store_once_all_are_past_it(
    tmp_path: Path, receivers: int, through_the_store: bool
) -> None:
    points = 12
    with Jobs(tmp_path, b2t_filter="True", timeout=60) as jobs:
        jobs.start("baseline", 1, fail_often, points, through_the_store)
        jobs.start("target", receivers, fail_often, points, through_the_store)
        values = succeed(jobs.wait())
    assert sum(seen for seen, _ in values) >= points
    assert all(left <= 1 for _, left in values), values
