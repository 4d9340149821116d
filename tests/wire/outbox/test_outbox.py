"""Points that never wait for the other job: posted and taken, missed, and where one side waits."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pytest
import torch
from jobs import Jobs, Rank, succeed, two_jobs
from outbox_parts import join, outcomes, point_keys, until_nothing_is_pending

import grafter
from grafter.analysis.run.run_summary import describe_counts, read_run_summary
from grafter.core.points import PointKey
from grafter.wire.rendezvous import courier

B2T = "name != 'start'"


# Posted and taken, missed.


def post_then_take(rank: Rank) -> list[float]:
    join()
    value = torch.arange(4.0) if rank.is_baseline else torch.zeros(4)
    if not rank.is_baseline:
        rank.wait_for("posted")
    value = grafter.dump("h", value, extras={"scale": torch.tensor(2.0)} if rank.is_baseline else None)
    if rank.is_baseline:
        value.zero_()
        rank.tell("posted")
        assert until_nothing_is_pending() == 0
    return value.tolist()


def test_what_was_posted_is_taken_as_it_was_when_dump_returned(tmp_path: Path) -> None:
    """The sender goes on and changes its tensor; the receiver gets the values of before, and both ledgers say so."""
    with two_jobs(tmp_path, post_then_take, post_then_take, b2t_filter=B2T, wait="job", signals=("posted",)) as jobs:
        assert succeed(jobs.wait()) == [[0.0] * 4, [0.0, 1.0, 2.0, 3.0]]
        assert outcomes(jobs, "baseline") == {"h": "sent"}
        assert outcomes(jobs, "target") == {"h": "grafted"}
        (sent,), (grafted,) = jobs.ledgers().values()
        assert sent.bytes_sent == 20 and grafted.bytes_received == 20 and "snapshot" in sent.seconds
        assert sent.participants == {"baseline": [0], "target": []}


def come_first_to_what_is_posted_later(rank: Rank) -> list[float]:
    join()
    value = torch.ones(2) if rank.is_baseline else torch.zeros(2)
    if rank.is_baseline:
        rank.wait_for("missed")
    value = grafter.dump("h", value)
    if not rank.is_baseline:
        rank.tell("missed")
    assert grafter.pending().entries == 0
    return value.tolist()


def test_what_nobody_has_posted_is_missed_and_the_run_goes_on(tmp_path: Path) -> None:
    """The receiver keeps its value; the sender that comes later finds that, and holds nothing for it. Such a run has
    grafted nothing, and says so."""
    both = come_first_to_what_is_posted_later
    with two_jobs(tmp_path, both, both, b2t_filter=B2T, wait="job", signals=("missed",)) as jobs:
        assert succeed(jobs.wait()) == [[1.0, 1.0], [0.0, 0.0]]
        assert outcomes(jobs, "baseline") == outcomes(jobs, "target") == {"h": "missed"}
    summary = read_run_summary(tmp_path / "run")
    assert describe_counts(summary) == "1 missed"
    assert any("all 1 points were missed" in problem for problem in summary.problems)
    assert any("1 point was missed" in note for note in summary.notes)


# One side that waits.


def train_and_serve(rank: Rank) -> list[float]:
    join()
    seen = []
    for number in range(5):
        # The server comes first to the even ones, and the trainer, which then waits there, to the odd ones.
        if rank.is_baseline and number % 2 == 0:
            rank.wait_for(f"there {number}")
        elif not rank.is_baseline and number % 2:
            wait_for_a_leader_at_the_meeting_place(number)
        value = grafter.dump("h", torch.full((3,), 0.0 if rank.is_baseline else number + 1.0), number=number)
        rank.tell(f"there {number}")
        seen.append(value[0].item())
    assert rank.is_baseline or until_nothing_is_pending() == 0
    return seen


def wait_for_a_leader_at_the_meeting_place(number: int) -> None:
    session = grafter._calls._active().session
    digest = PointKey("h", (("number", number),), 0, "forward", 0).digest
    deadline = time.monotonic() + 250
    while not (session.pairing.is_asked_by_mail(digest) or session.pairing.is_asked_in_store(digest)):
        assert time.monotonic() < deadline
        time.sleep(0.005)


@pytest.mark.parametrize("mail", [True, False])
def test_a_trainer_that_waits_takes_from_a_server_that_does_not(tmp_path: Path, mail: bool) -> None:
    """Whether it comes first and waits, or finds the point posted; by mail inside of a host, and without."""
    with Jobs(tmp_path, t2b_filter=B2T, signals=tuple(f"there {n}" for n in range(5))) as jobs:
        jobs.start("baseline", 1, train_and_serve if mail else without_mail, wait="both")
        jobs.start("target", 1, train_and_serve if mail else without_mail, wait="job")
        trainer, server = succeed(jobs.wait())
        assert trainer == server == [1.0, 2.0, 3.0, 4.0, 5.0]
        assert {record.outcome for record in jobs.ledgers()["baseline", 0]} == {"grafted"}
        assert {record.outcome for record in jobs.ledgers()["target", 0]} == {"sent"}


def without_mail(rank: Rank) -> list[float]:
    """As if the two jobs were on hosts of their own."""
    courier._one_host = lambda members: False
    return train_and_serve(rank)


def send_waiting(rank: Rank) -> list[float]:
    join()
    seen = []
    for number in range(6):
        # The receiver comes first to the even ones, and the sender to the odd ones.
        if rank.is_baseline and number % 2 == 0:
            rank.wait_for(f"there {number}")
        elif not rank.is_baseline and number % 2:
            wait_for_a_leader_at_the_meeting_place(number)
        value = grafter.dump("h", torch.full((2,), float(number) + 1 if rank.is_baseline else 0.0), number=number)
        seen.append(value[0].item())
        rank.tell(f"there {number}")
    return seen


def test_a_sender_that_waits_meets_a_receiver_that_does_not_only_if_it_came_first(tmp_path: Path) -> None:
    """A sender that comes second finds that the receivers have gone on, and does not wait for ever."""
    with Jobs(tmp_path, b2t_filter=B2T, signals=tuple(f"there {n}" for n in range(6))) as jobs:
        jobs.start("baseline", 1, send_waiting, wait="both")
        jobs.start("target", 1, send_waiting, wait="job")
        _, received = succeed(jobs.wait())
        assert received == [0.0, 2.0, 0.0, 4.0, 0.0, 6.0]
        assert [r.outcome for r in jobs.ledgers()["baseline", 0]] == ["missed", "sent"] * 3
        assert [r.outcome for r in jobs.ledgers()["target", 0]] == ["missed", "grafted"] * 3


# Many, and too many.


def post_many(rank: Rank) -> Any:
    join()
    numbers = range(24)
    if rank.is_baseline:
        grafter.dump("h", torch.zeros(1), number=-1)
        before = point_keys()
        for number in numbers:
            grafter.dump("h", torch.full((number + 1, 3), float(number)), number=number)
        assert grafter.pending().entries > 20
        rank.tell("posted")
        assert until_nothing_is_pending() == 0
        rank.wait_for("taken")
        return sorted(point_keys(before) - before)
    rank.wait_for("posted")
    grafter.dump("h", torch.zeros(1), number=-1)
    got = {n: grafter.dump("h", torch.zeros(n + 1, 3), number=n)[-1, -1].item() for n in reversed(numbers)}
    rank.tell("taken")
    return [got[number] for number in numbers]


def test_many_are_in_flight_and_are_taken_in_any_order(tmp_path: Path) -> None:
    """Each is found by its key; afterwards the outbox is empty, and the store holds no key more than before."""
    with two_jobs(tmp_path, post_many, post_many, b2t_filter=B2T, wait="job", signals=("posted", "taken")) as jobs:
        more_keys, got = succeed(jobs.wait())
        assert got == [float(number) for number in range(24)]
        assert more_keys == []


KIB = 256  # float32 values


def post_beyond_the_limit(rank: Rank) -> Any:
    join()
    if not rank.is_baseline:
        rank.wait_for("posted")
        return [grafter.dump("h", torch.zeros(512 * KIB), number=number)[0].item() for number in range(5)]
    for number in range(4):
        grafter.dump("h", torch.full((512 * KIB,), number + 1.0), number=number)
    pending = grafter.pending()
    grafter.dump("h", torch.ones(4 * 512 * KIB), number=4)
    rank.tell("posted")
    assert until_nothing_is_pending() == 0
    return pending.entries, pending.bytes, pending.open


def test_an_outbox_holds_no_more_than_its_limit(tmp_path: Path) -> None:
    """The oldest open entry is displaced by a new one, and one that can never fit is posted nowhere; both are told."""
    both = post_beyond_the_limit
    with two_jobs(tmp_path, both, both, b2t_filter=B2T, wait="job", outbox_bytes="1MiB", signals=("posted",)) as jobs:
        held, got = succeed(jobs.wait())
        assert held == (2, 1 << 20, 2)
        assert got == [0.0, 0.0, 3.0, 4.0, 0.0]
        sent, came = jobs.ledgers()["baseline", 0], jobs.ledgers()["target", 0]
        assert [r.outcome for r in sent] == ["displaced", "displaced", "sent", "sent", "failed"]
        assert [r.outcome for r in came] == ["missed", "missed", "grafted", "grafted", "failed"]
        assert "newer points needed its room" in came[0].reason and "do not fit into an outbox" in came[4].reason


def post_and_leave_it(rank: Rank) -> int:
    join()
    if rank.is_baseline:
        grafter.dump("h", torch.ones(3))
        assert grafter.pending().entries == 1
        left = until_nothing_is_pending()
        rank.tell("expired")
        return left
    rank.wait_for("expired")
    grafter.dump("h", torch.zeros(3))
    return 0


@pytest.mark.parametrize("receiver", ["job", "both"])
def test_an_entry_that_nobody_takes_expires_without_any_traffic(tmp_path: Path, receiver: str) -> None:
    """No call of grafter is needed for it; who comes later, also one that would wait, is told."""
    with Jobs(tmp_path, b2t_filter=B2T, outbox_seconds=0.2, signals=("expired",)) as jobs:
        jobs.start("baseline", 1, post_and_leave_it, wait="job")
        jobs.start("target", 1, post_and_leave_it, wait=receiver)
        assert succeed(jobs.wait()) == [0, 0]
        (sent,), (came,) = jobs.ledgers().values()
        assert (sent.outcome, came.outcome) == ("expired", "missed")
        assert "nobody took it for 0.2 s" in sent.reason and "nobody took it" in came.reason


def post_at_the_end(rank: Rank) -> None:
    join()
    if rank.is_baseline:
        grafter.dump("h", torch.ones(3))


def test_what_is_left_at_the_end_of_the_run_is_recorded(tmp_path: Path) -> None:
    """The sender closes with an entry that nobody has taken: it expires, since the run has ended."""
    with two_jobs(tmp_path, post_at_the_end, post_at_the_end, b2t_filter=B2T, wait="job") as jobs:
        succeed(jobs.wait())
        (record,) = jobs.ledgers()["baseline", 0]
        assert (record.outcome, record.reason) == ("expired", "the run ended")


# Layouts, agreement.


def reshard(rank: Rank) -> list[float]:
    join()
    whole = torch.arange(12.0).reshape(2, 6)
    width = 6 // rank.world_size
    own = whole[:, rank.role_rank * width : (rank.role_rank + 1) * width].contiguous()
    value = own if rank.is_baseline else torch.zeros(2, width)
    if not rank.is_baseline:
        for sender in range(2):
            rank.wait_for(f"posted {sender}")
    value = grafter.dump("h", value, dims="t h[tp]", axes={"tp": (rank.role_rank, rank.world_size)})
    tree = {"a": torch.full((2,), float(rank.is_baseline)), "kind": "x"}
    tree = grafter.dump("tree", tree, transform=first_of_all)
    if rank.is_baseline:
        rank.tell(f"posted {rank.role_rank}")
        assert until_nothing_is_pending() == 0
    assert torch.equal(value, own)
    return tree["a"].tolist()


def first_of_all(graft_input: grafter.GraftTransformInput) -> torch.Tensor:
    return graft_input.received_list[0] * 7


def test_two_ranks_that_go_on_are_taken_by_three_that_hold_other_parts(tmp_path: Path) -> None:
    """Layouts, trees and transforms are as they are where both sides wait; no receiver waits for a sender."""
    with two_jobs(
        tmp_path, reshard, reshard, ranks=(2, 3), b2t_filter=B2T, wait="job", signals=("posted 0", "posted 1")
    ) as jobs:
        assert succeed(jobs.wait())[2:] == [[7.0, 7.0]] * 3
        for (role, _), records in jobs.ledgers().items():
            assert [r.outcome for r in records] == ["sent" if role == "baseline" else "grafted"] * 2


def reshard_between_hosts(rank: Rank) -> list[float]:
    """As if each job were on a host of its own: neither memory nor mail is shared between the two."""
    from grafter.wire.rendezvous import join

    there = join.own_identity()
    join.own_identity = lambda: there.model_copy(update={"host": f"the {rank.role}'s"})
    return reshard(rank)


def test_receivers_on_another_machine_have_it_delivered(tmp_path: Path) -> None:
    """Over a TCP stream, sealed with the run's secret, with layouts and trees as they are."""
    settings: dict[str, Any] = {"b2t_filter": B2T, "wait": "job", "secret": "s3cret"}
    with Jobs(tmp_path, hosted=False, signals=("posted 0", "posted 1"), **settings) as jobs:
        jobs.start("baseline", 2, reshard_between_hosts)
        jobs.start("target", 3, reshard_between_hosts)
        assert succeed(jobs.wait())[2:] == [[7.0, 7.0]] * 3
        for (role, _), records in jobs.ledgers().items():
            assert [r.outcome for r in records] == ["sent" if role == "baseline" else "grafted"] * 2


def disagree(rank: Rank) -> float:
    join()
    if not rank.is_baseline:
        rank.wait_for("posted")
    value = grafter.dump("h", torch.full((2,), float(rank.is_baseline)), transform=fails_on_the_second)
    if rank.is_baseline:
        rank.tell("posted")
        assert until_nothing_is_pending() == 0
    return value[0].item()


def fails_on_the_second(graft_input: grafter.GraftTransformInput) -> torch.Tensor:
    if graft_input.role_rank == 1:
        raise ValueError("not here")
    return graft_input.received_list[0]


def test_all_receivers_take_what_was_posted_or_none_does(tmp_path: Path) -> None:
    """A transform that fails on one receiver: nothing is written on any, and the sender hears why."""
    with two_jobs(tmp_path, disagree, disagree, ranks=(1, 2), b2t_filter=B2T, wait="job", signals=("posted",)) as jobs:
        assert succeed(jobs.wait()) == [1.0, 0.0, 0.0]
        for records in jobs.ledgers().values():
            assert [r.outcome for r in records] == ["failed"] and "not here" in records[0].reason
