"""All receivers of a point write, or none does; and every rank, also each sender, has the outcome in its ledger."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from jobs import Jobs, Rank, succeed

import grafter

FAR = 1000.0
SOON = 250.0


def by_store(rank: Rank) -> None:
    """As between hosts: no mail. Called first in each rank."""
    from grafter.wire.rendezvous import courier

    if rank.arguments[0] == "store":
        courier._one_host = lambda members: False


CARRIERS = pytest.mark.parametrize("carrier", ["mail", "store"])


def raise_on(which: int) -> Callable[[Any], torch.Tensor]:
    def transform(graft_input: Any) -> torch.Tensor:
        if graft_input.role_rank == which:
            raise ArithmeticError("the user's transform")
        return graft_input.received_list[0]

    return transform


def graft_with_fault(rank: Rank) -> list[list[float]]:
    """Three points; in the middle one, receiver `which` has the fault. Then senders stay until they have heard."""
    by_store(rank)
    _, fault, which = rank.arguments
    values = []
    for number in range(3):
        faulty = number == 1 and not rank.is_baseline
        dtype = torch.int32 if faulty and fault == "dtype" and rank.role_rank == which else torch.float32
        value = torch.full((4,), 1 if rank.is_baseline else 2, dtype=dtype)
        transform = raise_on(which) if faulty and fault == "transform" else None
        if not rank.is_baseline and transform is None:
            transform = raise_on(-1)
        grafter.dump("h", value, number=number, transform=transform)
        values.append(value.tolist())
    if rank.is_baseline:
        wait_until_heard(rank)
    return values


def wait_until_heard(rank: Rank, seconds: float = 250) -> None:
    """Until this sender's ledger says that a point has failed."""
    path = grafter._process.grafter.lifecycle.session.ledger.path  # type: ignore[union-attr]
    deadline = time.monotonic() + seconds
    while '"outcome":"failed"' not in path.read_text() and time.monotonic() < deadline:
        time.sleep(0.05)


@CARRIERS
@pytest.mark.parametrize("fault", ["transform", "dtype"])
@pytest.mark.parametrize("which", [0, 1])
def test_one_receiver_that_cannot_write_keeps_all_from_writing(
    tmp_path: Path, carrier: str, fault: str, which: int
) -> None:
    """One reason on both receivers, failed also with the senders, and the next point grafts."""
    with Jobs(tmp_path, b2t_filter="True", timeout=FAR) as jobs:
        jobs.start("baseline", 2, graft_with_fault, carrier, fault, which)
        jobs.start("target", 2, graft_with_fault, carrier, fault, which)
        values = succeed(jobs.wait())
        ledgers = jobs.ledgers()
    assert values[2:] == [[[1] * 4, [2] * 4, [1] * 4]] * 2
    for rank in range(2):
        assert [r.outcome for r in ledgers["target", rank]] == ["grafted", "failed", "grafted"]
        assert [r.outcome for r in ledgers["baseline", rank]] == ["sent", "failed", "sent"]
    reasons = {records[1].reason for records in ledgers.values()}
    assert len(reasons) == 1
    assert f"target rank {which}: " in reasons.pop()


def kill_before_vote(rank: Rank) -> list[float]:
    by_store(rank)
    grafter.dump("first", torch.ones(1), transform=None if rank.is_baseline else raise_on(-1))
    value = torch.full((4,), 1.0 if rank.is_baseline else 2.0)

    def die(graft_input: Any) -> torch.Tensor:
        if graft_input.role_rank == rank.arguments[1]:
            os.kill(os.getpid(), signal.SIGKILL)
        return graft_input.received_list[0]

    try:
        grafter.dump("h", value, transform=None if rank.is_baseline else die)
        grafter.dump("after", value, transform=None if rank.is_baseline else raise_on(-1))
    except grafter.GrafterError as error:
        raise type(error)(f"{error} || {value.tolist()}") from None
    return value.tolist()


@CARRIERS
@pytest.mark.parametrize("which", [0, 1], ids=["the leader", "the other"])
def test_a_receiver_killed_before_its_vote_keeps_the_other_from_writing(
    tmp_path: Path, carrier: str, which: int
) -> None:
    with Jobs(tmp_path, b2t_filter="True", timeout=FAR) as jobs:
        jobs.start("baseline", 2, kill_before_vote, carrier, which)
        jobs.start("target", 2, kill_before_vote, carrier, which)
        results = jobs.wait()
    survivors = [*results[:2], results[3 - which]]
    assert [r.error_kind for r in survivors] == ["PeerLostError"] * 3, survivors
    assert all(f"target rank {which}" in r.error for r in survivors)
    assert survivors[2].error.endswith("[2.0, 2.0, 2.0, 2.0]")
    assert max(r.seconds for r in survivors) < SOON


def raise_everywhere(rank: Rank) -> str:
    by_store(rank)
    value = torch.ones(2)
    try:
        grafter.dump("h", value, transform=None if rank.is_baseline else raise_on(1))
    except grafter.GrafterError as error:
        return f"{type(error).__name__} {error}"
    return "nothing"


@CARRIERS
def test_on_transform_error_raise_raises_on_every_receiver_and_on_no_sender(tmp_path: Path, carrier: str) -> None:
    with Jobs(tmp_path, b2t_filter="True", timeout=FAR, on_transform_error="raise") as jobs:
        jobs.start("baseline", 1, raise_everywhere, carrier)
        jobs.start("target", 2, raise_everywhere, carrier)
        baseline, *targets = succeed(jobs.wait())
    assert baseline == "nothing"
    assert len(set(targets)) == 1
    assert targets[0].startswith("PointFailed")
    assert "ArithmeticError: the user's transform" in targets[0]


# The store's way, which several hosts use, for the basics.


def ask_for_other_points(rank: Rank) -> None:
    by_store(rank)
    grafter.dump("a", torch.ones(1))
    grafter.dump("x" if rank.is_baseline else "y", torch.ones(1))


def test_without_mail_jobs_that_ask_for_different_points_are_told_at_once(tmp_path: Path) -> None:
    with Jobs(tmp_path, compare_filter="True", timeout=FAR) as jobs:
        jobs.start("baseline", 2, ask_for_other_points, "store")
        jobs.start("target", 2, ask_for_other_points, "store")
        results = jobs.wait()
    assert {r.error_kind for r in results} == {"PairingError"}
    assert len({r.error for r in results}) == 1
    assert "baseline rank 0 waits for 'x' (step=0)" in results[0].error
    assert "target rank 0 waits for 'y' (step=0)" in results[0].error
    assert max(r.seconds for r in results) < SOON


def die_while_others_wait(rank: Rank) -> None:
    by_store(rank)
    grafter.dump("a", torch.ones(1))
    if rank.is_baseline and rank.role_rank == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    grafter.dump("b", torch.ones(1))


def test_without_mail_a_killed_rank_is_named_to_all(tmp_path: Path) -> None:
    with Jobs(tmp_path, compare_filter="True", timeout=FAR) as jobs:
        jobs.start("baseline", 2, die_while_others_wait, "store")
        jobs.start("target", 2, die_while_others_wait, "store")
        results = jobs.wait()
    survivors = [results[0], *results[2:]]
    assert {r.error_kind for r in survivors} == {"PeerLostError"}
    assert all("baseline rank 1 is gone" in r.error for r in survivors)
    assert max(r.seconds for r in survivors) < SOON


def lose_statistics(rank: Rank) -> list[float]:
    """One receiver runs out of memory while it measures: that costs its figures, not the point."""
    from grafter.runtime import leaf_figures

    def out_of_memory(*_: Any) -> Any:
        raise MemoryError("no room for a chunk")

    if not rank.is_baseline and rank.role_rank == 1:
        leaf_figures.compare = out_of_memory  # type: ignore[assignment]
    value = torch.full((2,), 1.0 if rank.is_baseline else 2.0)
    return grafter.dump("h", value).tolist()


def test_statistics_that_fail_keep_no_receiver_from_writing(tmp_path: Path) -> None:
    with Jobs(tmp_path, b2t_filter="True", timeout=FAR) as jobs:
        jobs.start("baseline", 1, lose_statistics)
        jobs.start("target", 3, lose_statistics)
        values = succeed(jobs.wait())
    assert values == [[1.0, 1.0]] * 4


def leave_in_transform(rank: Rank) -> list[float]:
    """The receivers' leader is interrupted in its transform; the others must not wait for it."""

    def transform(graft_input: Any) -> torch.Tensor:
        if graft_input.role_rank == 0:
            raise KeyboardInterrupt
        return graft_input.received_list[0]

    value = torch.full((2,), 1.0 if rank.is_baseline else 2.0)
    try:
        grafter.dump("h", value, transform=None if rank.is_baseline else transform)
    except KeyboardInterrupt:
        return ["interrupted"]  # type: ignore[list-item]
    return value.tolist()


@pytest.mark.parametrize("receivers", [2, 3])
def test_a_leader_interrupted_before_its_vote_leaves_nobody_waiting_and_nothing_written(
    tmp_path: Path, receivers: int
) -> None:
    start = time.monotonic()
    with Jobs(tmp_path, b2t_filter="True", timeout=FAR) as jobs:
        jobs.start("baseline", 1, leave_in_transform)
        jobs.start("target", receivers, leave_in_transform)
        values = succeed(jobs.wait())
    assert time.monotonic() - start < SOON
    assert values == [[1.0, 1.0], ["interrupted"], *[[2.0, 2.0]] * (receivers - 1)]
