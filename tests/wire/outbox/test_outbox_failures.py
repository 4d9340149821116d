"""Points that never wait, in two pipeline stages; ranks of the second stage fail, and nothing stays in an outbox."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from jobs import Jobs, Rank, succeed
from outbox_parts import join, point_keys, until_nothing_is_pending

import grafter
from grafter.wire.exchange.staging import StagingRefused
from grafter.wire.outbox.pull import Puller

READING_FAILS, NO_ROOM, NO_MEMORY = 1, 2, 3
NUMBERS = range(5)
STAGES = {0: [0], 1: [1, 2], 2: [1, 2]}


def fails_to_read() -> torch.Tensor:
    raise ZeroDivisionError("no such row")


def send_in_stages(rank: Rank) -> tuple[int, list[str]]:
    """(entries left, store keys that were not there before) of one rank of the baseline; 0 is the first stage."""
    join()
    stage = STAGES[rank.role_rank]
    grafter.dump("h", torch.zeros(4), ranks=stage, stage=len(stage), number=-1)
    rank.tell(f"posted -1 {rank.role_rank}")
    assert until_nothing_is_pending() == 0
    rank.wait_for("begin")
    before = point_keys()
    rank.tell(f"counted {rank.role_rank}")
    for other in range(3):
        rank.wait_for(f"counted {other}")
    for number in NUMBERS:
        value: Any = torch.full((4 if number != NO_ROOM else 4096,), number + 1.0)
        if (rank.role_rank, number) == (2, READING_FAILS):
            with pytest.raises(ZeroDivisionError):
                grafter.dump("h", fails_to_read, ranks=stage, stage=len(stage), number=number)
        else:
            grafter.dump("h", value, ranks=stage, stage=len(stage), number=number)
        rank.tell(f"posted {number} {rank.role_rank}")
    left = until_nothing_is_pending()
    if len(stage) == 1:
        rank.tell("forgotten")
    rank.wait_for("end")
    return left, sorted(point_keys(before) - before)


def take_in_stages(rank: Rank) -> list[float]:
    join()
    session = grafter._calls._active().session
    stage, reserve, got = STAGES[rank.role_rank], session.transfer.staging.reserve, []

    def refuse(nbytes: int) -> bool:
        raise StagingRefused("it is full")

    for number in (-1, *NUMBERS):
        if number == 0 and len(stage) > 1:
            # The first stage has taken all, and its senders have forgotten it, when the second comes.
            rank.wait_for("forgotten")
        for sender in stage:
            rank.wait_for(f"posted {number} {sender}")
        session.transfer.staging.reserve = refuse if (rank.role_rank, number) == (2, NO_MEMORY) else reserve
        value = torch.zeros(4 if number != NO_ROOM else 4096)
        got.append(grafter.dump("h", value, ranks=stage, stage=len(stage), number=number)[0].item())
        rank.tell(f"taken {number} {rank.role_rank}")
        if number == -1 and rank.role_rank == 0:
            for other in (1, 2):
                rank.wait_for(f"taken -1 {other}")
            rank.tell("begin")
    if rank.role_rank == 0:
        for other in (1, 2):
            rank.wait_for(f"taken {NUMBERS[-1]} {other}")
        rank.tell("end")
    return got[1:]


def names_of_signals() -> tuple[str, ...]:
    each = [f"{word} {number} {rank}" for word in ("posted", "taken") for number in (-1, *NUMBERS) for rank in range(3)]
    return (*each, *(f"counted {rank}" for rank in range(3)), "begin", "forgotten", "end")


def test_what_fails_in_the_second_stage_is_drained_on_every_rank(tmp_path: Path) -> None:
    """A sender cannot read its value, has no room, and a receiver no memory: each is final for all ranks of that stage
    alone, pending() returns to 0 everywhere, and the store holds no more keys than before."""
    with Jobs(tmp_path, b2t_filter="True", wait="job", signals=names_of_signals()) as jobs:
        for sender in range(3):
            jobs.start("baseline", 3, send_in_stages, only=sender, outbox_bytes="8KiB" if sender == 2 else "1GiB")
        jobs.start("target", 3, take_in_stages)
        results = succeed(jobs.wait())
        assert [left for left, _ in results[:3]] == [0, 0, 0]
        assert [more for _, more in results[:3]] == [[], [], []]
        assert results[3:] == [[1.0, 2.0, 3.0, 4.0, 5.0], *[[1.0, 0.0, 0.0, 0.0, 5.0]] * 2]
        for (role, rank), records in jobs.ledgers().items():
            well = "sent" if role == "baseline" else "grafted"
            found = [r.outcome for r in records][1:]
            assert found == ([well] * 5 if rank == 0 else [well, "failed", "failed", "failed", well]), (role, rank)
            reasons = [r.reason or "" for r in records][1:]
            if rank:
                assert "no such row" in reasons[READING_FAILS]
                assert "do not fit" in reasons[NO_ROOM]
                assert "it is full" in reasons[NO_MEMORY]


def send_to_those_who_die(rank: Rank) -> Any:
    join()
    stage = STAGES[rank.role_rank]
    grafter.dump("h", torch.ones(1000), ranks=stage, stage=len(stage))
    rank.tell(f"posted {rank.role_rank}")
    first = until_nothing_is_pending()
    if rank.role_rank == 0:
        return first, 0, 0
    # One that is killed can delete nothing any more.
    assert point_keys(set()) == set()
    rank.tell(f"clean {rank.role_rank}")
    for other in (1, 2):
        rank.wait_for(f"clean {other}")
    grafter.dump("h", torch.ones(1000), ranks=stage, stage=len(stage))
    rank.tell(f"again {rank.role_rank}")
    if rank.role_rank == 2:
        rank.wait_for("never")
    second = until_nothing_is_pending()
    # The word for receivers that may still come stays, and nothing else.
    client = grafter._calls._active().session.client
    return first, second, len(point_keys({key for key in point_keys() if client.peek(key).kind == "gone"}))


def the_first(graft_input: grafter.GraftTransformInput) -> torch.Tensor:
    return graft_input.received_list[0]


def die_in_the_middle(rank: Rank) -> str:
    join()
    for sender in range(3):
        rank.wait_for(f"posted {sender}")
    stage = [rank.role_rank]
    if rank.role_rank == 1:

        def die(*_: Any) -> Any:
            os.kill(os.getpid(), signal.SIGKILL)

        Puller._source = die  # type: ignore[method-assign]
    grafter.dump("h", torch.zeros(1000), ranks=stage, stage=len(STAGES[rank.role_rank]), transform=the_first)
    rank.wait_for("checked")
    return "lived"


def test_a_receiver_or_a_sender_that_is_killed_leaves_nothing_in_an_outbox(tmp_path: Path) -> None:
    """A receiver in the middle of its pull, after it has claimed the entry for its side; then one of two senders, after
    it has posted. The others hear of it by themselves, and the first stage goes on."""
    names = (*(f"{word} {rank}" for word in ("posted", "clean", "again") for rank in range(3)), "never")
    with Jobs(tmp_path, b2t_filter="True", wait="job", signals=(*names, "checked")) as jobs:
        jobs.start("baseline", 3, send_to_those_who_die)
        jobs.start("target", 2, die_in_the_middle)
        for sender in (1, 2):
            assert jobs.signals[f"again {sender}"].wait(250)
        jobs.kill("baseline", 2)
        jobs.signals["checked"].set()
        first, second, killed, lived, died = jobs.wait()
        assert (first.error, first.value) == (None, (0, 0, 0))
        assert (second.error, second.value) == (None, (0, 0, 1))
        assert killed.value is died.value is None and lived.value == "lived"
        sent = jobs.ledgers()["baseline", 1]
        assert [r.outcome for r in sent] == ["failed", "failed"]
        assert "a rank that was taking it is gone" in sent[0].reason
        assert "a rank that holds a part of it is gone" in sent[1].reason
        assert [r.outcome for r in jobs.ledgers()["baseline", 0]] == ["sent"]


def post_for_two(rank: Rank) -> int:
    join()
    grafter.dump("h", torch.ones(1000))
    rank.tell("posted")
    return until_nothing_is_pending()


def die_as_follower(rank: Rank) -> None:
    join()
    rank.wait_for("posted")
    if rank.role_rank == 1:
        Puller.pull = lambda *_: os.kill(os.getpid(), signal.SIGKILL)  # type: ignore[method-assign, assignment, return-value]
    grafter.dump("h", torch.zeros(1000))


def test_a_run_that_is_over_drains_all_outboxes(tmp_path: Path) -> None:
    """A receiver is killed while its leader waits for its vote: the run ends for all, and the sender, which is at no
    point, drops what it holds."""
    with Jobs(tmp_path, b2t_filter="True", wait="job", signals=("posted",)) as jobs:
        jobs.start("baseline", 1, post_for_two)
        jobs.start("target", 2, die_as_follower)
        sender, leader, follower = jobs.wait()
        assert sender.value == 0 and follower.value is None
        assert leader.error_kind == "PeerLostError"
        assert [r.outcome for r in jobs.ledgers()["baseline", 0]] == ["failed"]


def dump_with_another_wait(rank: Rank) -> None:
    join()
    wait = "job" if rank.role_rank == 0 or not rank.is_baseline else "both"
    grafter.dump("h", torch.ones(2), wait=wait)


def test_ranks_of_one_job_that_wait_for_different_things_are_told(tmp_path: Path) -> None:
    """One rank gives wait="job" and the other does not: an error on both that names both lines, and no hang."""
    with Jobs(tmp_path, b2t_filter="True") as jobs:
        jobs.start("baseline", 2, dump_with_another_wait)
        jobs.start("target", 1, dump_with_another_wait)
        first, second, _ = jobs.wait()
        assert first.error_kind == second.error_kind == "PairingError"
        assert "baseline rank 0 takes it with wait=job" in first.error and "rank 1 with wait=both" in second.error
