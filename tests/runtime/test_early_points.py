"""Points that do not wait, before both jobs have joined: kept, and made up for once they have."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pytest
import torch
from jobs import Jobs, Rank, succeed
from outbox_parts import join, outcomes, point_keys, until_nothing_is_pending

import grafter
from grafter.core.points import PointKey
from grafter.runtime import deferred_points
from grafter.runtime.lifecycle import Lifecycle
from grafter.store.dumps.reader import open_dumps

KIB = 1024


def reasons(jobs: Jobs, role: str, rank: int = 0) -> dict[str, str]:
    return {record.name: record.reason for record in jobs.ledgers()[role, rank]}


# The other job is not even started.


def send_and_go_on(rank: Rank) -> int:
    value = torch.arange(4.0)
    for name in ("a", "b", "c"):
        value = grafter.dump(name, value, extras={"scale": torch.tensor(2.0)})
        value += 10
    pending = grafter.pending()
    assert (pending.entries, pending.open, pending.bytes) == (3, 3, 60)
    rank.tell("went on")
    rank.wait_for("took")
    return until_nothing_is_pending()


def wait_and_take(rank: Rank) -> list[list[float]]:
    got = [grafter.dump(name, torch.zeros(4)).tolist() for name in ("a", "b", "c")]
    rank.tell("took")
    return got


def test_a_sender_goes_on_before_the_other_job_has_started(tmp_path: Path) -> None:
    """What it dumped lies in its outbox, as it was, and the job that starts then takes it; no further point of the
    sender is needed for that."""
    with Jobs(tmp_path, t2b_filter="True", signals=("went on", "took")) as jobs:
        jobs.start("target", 1, send_and_go_on, wait="job")
        assert jobs.signals["went on"].wait(250)
        jobs.start("baseline", 1, wait_and_take)
        got, left = succeed(jobs.wait())
        assert got == [[n + 0.0, n + 1.0, n + 2.0, n + 3.0] for n in (0, 10, 20)] and left == 0
        assert set(outcomes(jobs, "target").values()) == {"sent"}
        assert set(outcomes(jobs, "baseline").values()) == {"grafted"}


def receive_and_go_on(rank: Rank) -> list[list[float]]:
    got = [grafter.dump(name, torch.zeros(2)).tolist() for name in ("a", "b")]
    rank.tell("went on")
    rank.wait_for("sent")
    got.append(grafter.dump("c", torch.zeros(2)).tolist())
    return got


def send_what_nobody_takes(rank: Rank) -> None:
    for name in ("a", "b", "c"):
        if name == "c":
            rank.tell("sent")
        grafter.dump(name, torch.ones(2))
    assert until_nothing_is_pending() == 0


@pytest.mark.parametrize("sender", ["job", "both"])
def test_a_receiver_goes_on_before_the_other_job_has_started(tmp_path: Path, sender: str) -> None:
    """Its points are missed on both sides, and a sender that would wait there is told; later points meet."""
    with Jobs(tmp_path, b2t_filter="True", signals=("went on", "sent")) as jobs:
        jobs.start("target", 1, receive_and_go_on, wait="job")
        assert jobs.signals["went on"].wait(250)
        jobs.start("baseline", 1, send_what_nobody_takes, wait=sender)
        _, got = succeed(jobs.wait())
        assert got[:2] == [[0.0, 0.0], [0.0, 0.0]]
        for role in ("baseline", "target"):
            found = outcomes(jobs, role)
            assert found["a"] == found["b"] == "missed"
        assert "target rank 0" in reasons(jobs, "baseline")["a"] and "continued" in reasons(jobs, "baseline")["a"]
        assert "before both jobs had joined, and continued" in reasons(jobs, "target")["a"]


# Some ranks of a job had joined when they came, and others had not.


def come_early(rank: Rank) -> Any:
    (early,) = rank.arguments
    join()
    if not rank.is_baseline:
        rank.wait_for("posted 0")
        rank.wait_for("posted 1")
    is_waiting = Lifecycle.is_waiting
    if (rank.role, rank.role_rank) in early:
        # As if the word that both jobs are there had not come yet.
        Lifecycle.is_waiting = property(lambda self: True)  # type: ignore[method-assign, assignment]
    got = grafter.dump("h", torch.full((2,), float(rank.is_baseline)))
    Lifecycle.is_waiting = is_waiting  # type: ignore[method-assign]
    grafter._calls._active().dispatch.catch_up_in_background()
    if rank.is_baseline:
        rank.tell(f"posted {rank.role_rank}")
    assert until_nothing_is_pending() == 0
    later = grafter.dump("later", torch.full((2,), float(rank.is_baseline)), wait="both")
    return got.tolist(), later.tolist(), keys_of_h()


def keys_of_h() -> int:
    """How many keys the store has of it, once all ranks have tidied up."""
    digest = PointKey("h", (), 0, "forward", 0).digest
    deadline = time.monotonic() + 250
    while (left := sum(digest in key for key in point_keys())) and time.monotonic() < deadline:
        time.sleep(0.05)
    return left


@pytest.mark.parametrize("early", [0, 1])
@pytest.mark.parametrize("sender", ["job", "both"])
def test_receivers_of_which_one_had_gone_on_all_miss_the_point(tmp_path: Path, early: int, sender: str) -> None:
    """Whether it leads them or not, and whether the senders have posted the point or wait there."""
    names = ("posted 0", "posted 1")
    with Jobs(tmp_path, b2t_filter="True", signals=names) as jobs:
        if sender == "both":
            for name in names:
                jobs.signals[name].set()
        jobs.start("baseline", 2, come_early, (("target", early),), wait=sender)
        jobs.start("target", 2, come_early, (("target", early),), wait="job")
        results = succeed(jobs.wait())
        assert [got for got, _, _ in results] == [[1.0, 1.0]] * 2 + [[0.0, 0.0]] * 2
        assert [later for _, later, _ in results] == [[1.0, 1.0]] * 4
        assert not any(left for _, _, left in results)
        for role in ("baseline", "target"):
            assert [outcomes(jobs, role, rank)["h"] for rank in range(2)] == ["missed", "missed"]
        assert f"target rank {early} was here before both jobs had joined" in reasons(jobs, "target", 1 - early)["h"]


@pytest.mark.parametrize("early", [(0,), (1,), (0, 1)])
def test_senders_of_which_some_had_not_joined_are_taken(tmp_path: Path, early: tuple[int, ...]) -> None:
    """The receivers get it in full, and all senders hear that it was taken."""
    where = tuple(("baseline", rank) for rank in early)
    with Jobs(tmp_path, b2t_filter="True", wait="job", signals=("posted 0", "posted 1")) as jobs:
        jobs.start("baseline", 2, come_early, where)
        jobs.start("target", 2, come_early, where)
        results = succeed(jobs.wait())
        assert [got for got, _, _ in results] == [[1.0, 1.0]] * 4
        assert [outcomes(jobs, "baseline", rank)["h"] for rank in range(2)] == ["sent", "sent"]
        assert not any(left for _, _, left in results)


# What becomes of them otherwise.


def post_too_much(rank: Rank) -> int:
    for number in range(3):
        grafter.dump("h", torch.full((100 * KIB,), float(number)), number=number)
    assert grafter.pending().entries == 2
    rank.tell("went on")
    rank.wait_for("took")
    return until_nothing_is_pending()


def take_what_is_left(rank: Rank) -> list[float]:
    got = [grafter.dump("h", torch.full((100 * KIB,), 9.0), number=number)[0].item() for number in range(3)]
    rank.tell("took")
    return got


@pytest.mark.parametrize("senders", [1, 2])
def test_the_oldest_makes_room_also_before_there_is_a_run(tmp_path: Path, senders: int) -> None:
    """It is displaced on all its ranks, and a receiver that waits for it is told why."""
    with Jobs(tmp_path, t2b_filter="True", signals=("went on", "took"), outbox_bytes="1MiB") as jobs:
        jobs.start("target", senders, post_too_much, wait="job")
        assert jobs.signals["went on"].wait(250)
        jobs.start("baseline", 1, take_what_is_left, transform_path="transforms/take_last.py:transform")
        got, *left = succeed(jobs.wait())
        assert got == [9.0, 1.0, 2.0] and left == [0] * senders
        for rank in range(senders):
            assert [r.outcome for r in jobs.ledgers()["target", rank]] == ["displaced", "sent", "sent"]
        first = jobs.ledgers()["baseline", 0][0]
        assert first.outcome == "missed" and "GRAFTER_OUTBOX_BYTES" in first.reason


def post_and_leave(rank: Rank) -> None:
    grafter.dump("h", torch.ones(2))
    rank.tell("went on")


def come_too_late(rank: Rank) -> list[float]:
    return grafter.dump("h", torch.zeros(2)).tolist()  # type: ignore[no-any-return]


def test_a_job_that_ends_before_the_other_has_started_stays_to_say_so(tmp_path: Path) -> None:
    """It posts what it has as soon as there is a run, and takes it back, since it leaves."""
    with Jobs(tmp_path, t2b_filter="True", signals=("went on",)) as jobs:
        jobs.start("target", 1, post_and_leave, wait="job")
        assert jobs.signals["went on"].wait(250)
        jobs.start("baseline", 1, come_too_late)
        got, _ = succeed(jobs.wait())
        (came,), (sent,) = jobs.ledgers()["baseline", 0], jobs.ledgers()["target", 0]
        assert (got, came.outcome, sent.outcome) in (
            ([0.0, 0.0], "missed", "expired"),
            ([1.0, 1.0], "grafted", "sent"),
        )


def fail_early(rank: Rank) -> str:
    def make() -> torch.Tensor:
        raise ZeroDivisionError("the user's")

    with pytest.raises(ZeroDivisionError, match="the user's"):
        grafter.dump("h", make)
    rank.tell("went on")
    return "went on"


def test_a_value_that_cannot_be_made_is_told_at_the_call_and_to_the_other_job(tmp_path: Path) -> None:
    """The point has failed on both sides, and the reason is the user's error."""
    with Jobs(tmp_path, t2b_filter="True", signals=("went on",)) as jobs:
        jobs.start("target", 1, fail_early, wait="job")
        assert jobs.signals["went on"].wait(250)
        jobs.start("baseline", 1, come_too_late)
        assert succeed(jobs.wait()) == [[0.0, 0.0], "went on"]
        (came,), (sent,) = jobs.ledgers()["baseline", 0], jobs.ledgers()["target", 0]
        assert came.outcome == sent.outcome == "failed"
        assert "ZeroDivisionError: the user's" in came.reason


# Gradients, hooks, dumps.


def differentiate(rank: Rank) -> list[float]:
    weight = torch.nn.Parameter(torch.ones(2))
    h = grafter.dump("h", weight * 2.0)
    (h * (3.0 if rank.is_baseline else 5.0)).sum().backward()
    rank.tell("went on")
    assert weight.grad is not None
    return weight.grad.tolist()


@pytest.mark.parametrize(("direction", "expected"), [("t2b", "sent"), ("b2t", "missed")])
def test_gradients_wait_for_nobody_either(tmp_path: Path, direction: str, expected: str) -> None:
    """One is posted, or missed, in a backward pass that was over before the other job had started."""
    settings: dict[str, Any] = {f"{direction}_filter": "phase == 'backward'"}
    with Jobs(tmp_path, gradients=True, signals=("went on",), **settings) as jobs:
        jobs.start("target", 1, differentiate_and_stay, wait="job")
        assert jobs.signals["went on"].wait(250)
        jobs.start("baseline", 1, differentiate)
        theirs, own = succeed(jobs.wait())
        assert own == [10.0, 10.0] and theirs == ([10.0, 10.0] if direction == "t2b" else [6.0, 6.0])
        assert outcomes(jobs, "target") == {"h": expected}


def differentiate_and_stay(rank: Rank) -> list[float]:
    gradient = differentiate(rank)
    join()
    assert until_nothing_is_pending() == 0
    return gradient


def run_hooked(rank: Rank) -> None:
    model = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.ReLU())
    if not rank.is_baseline:
        model.append(torch.nn.Tanh())
    grafter.attach(model, "0", "2", inputs=False)
    model(torch.ones(1, 2))
    rank.tell("went on")


def test_a_module_that_the_other_job_turns_out_not_to_have_is_skipped(tmp_path: Path) -> None:
    """The early point of its hook, too; nothing of it stays in the outbox."""
    with Jobs(tmp_path, t2b_filter="True", signals=("went on",)) as jobs:
        jobs.start("target", 1, run_hooked, wait="job")
        assert jobs.signals["went on"].wait(250)
        jobs.start("baseline", 1, run_hooked)
        succeed(jobs.wait())
        first, last = (record.outcome for record in jobs.ledgers()["target", 0])
        assert first in ("sent", "expired") and last == "skipped"


def save_early(rank: Rank) -> None:
    grafter.dump("h", torch.full((3,), float(rank.is_baseline)))
    rank.tell("went on")
    join()


def test_dumps_do_not_wait_where_the_run_has_a_name(tmp_path: Path) -> None:
    """They are in the directory of the run that begins later."""
    with Jobs(tmp_path, b2t_filter="True", dump_filter="True", signals=("went on",)) as jobs:
        jobs.start("target", 1, save_early, wait="job")
        assert jobs.signals["went on"].wait(250)
        jobs.start("baseline", 1, save_early, wait="job")
        succeed(jobs.wait())
        (dumped,) = open_dumps(tmp_path / "run" / "target")
        assert [record.outcome for record in dumped.records.values()] == ["missed"]


def test_dumps_of_a_run_that_gets_another_name_are_told(tmp_path: Path) -> None:
    """The rank that would mix them ends, and the message names both directories and what to set."""
    with Jobs(tmp_path, b2t_filter="True", dump_filter="True", signals=("went on",)) as jobs:
        jobs.start("target", 1, save_early, wait="job", run_name="mine")
        assert jobs.signals["went on"].wait(250)
        jobs.start("baseline", 1, save_early, wait="job")
        _, saved = jobs.wait()
        for word in ("/mine before both jobs had joined", "the run is in", "/run.", "GRAFTER_RUN_NAME"):
            assert saved.error is not None and word in saved.error


# What a review found.


def come_to_points_of_ones_own(rank: Rank) -> int:
    deferred_points._MOST_KEPT = 4
    (which,) = rank.arguments
    for number in range(6):
        grafter.dump("h", torch.ones(2), number=number)
        if rank.role_rank == which:
            grafter.dump("loss", torch.ones(2), number=number, ranks=[which])
    rank.tell(f"went on {rank.role_rank}")
    rank.wait_for("took")
    return until_nothing_is_pending()


def take_six(rank: Rank) -> list[float]:
    join()
    got = [grafter.dump("h", torch.zeros(2), number=number)[0].item() for number in range(6)]
    rank.tell("took")
    return got


@pytest.mark.parametrize("which", [0, 1])
@pytest.mark.parametrize("direction", ["t2b", "b2t"])
def test_a_rank_that_keeps_fewer_values_is_waited_for_by_nobody(tmp_path: Path, which: int, direction: str) -> None:
    """It has points of its own, so its older ones are displaced sooner: then they are on all ranks."""
    names = ("went on 0", "went on 1", "took")
    settings: dict[str, Any] = {f"{direction}_filter": "True", "transform_path": "transforms/take_last.py:transform"}
    with Jobs(tmp_path, signals=names, timeout=250, outbox_seconds=1, **settings) as jobs:
        jobs.start("target", 2, come_to_points_of_ones_own, which, wait="job")
        for name in names[:2]:
            assert jobs.signals[name].wait(250)
        jobs.start("baseline", 1, take_six)
        got, *left = succeed(jobs.wait())
        assert left == [0, 0]
        if direction == "t2b":
            # Of twelve points four are kept: two of h on the rank that has the others, too.
            assert got == [0.0] * 4 + [1.0] * 2


def post_many_and_ask(rank: Rank) -> int:
    for number in range(1500):
        grafter.dump("h", torch.ones(2), number=number)
    rank.tell("went on")
    highest = 0
    while grafter._calls._active().dispatch.deferred.points:
        highest = max(highest, grafter.pending().entries)
    rank.tell("made up")
    assert highest > 0
    return until_nothing_is_pending()


def take_none(rank: Rank) -> None:
    join()
    rank.wait_for("made up")


def test_what_is_pending_can_be_asked_while_early_points_are_made_up(tmp_path: Path) -> None:
    """By the program, while the thread that has joined posts them."""
    with Jobs(tmp_path, t2b_filter="True", outbox_seconds=1, signals=("went on", "made up")) as jobs:
        jobs.start("target", 1, post_many_and_ask, wait="job")
        assert jobs.signals["went on"].wait(250)
        jobs.start("baseline", 1, take_none)
        assert succeed(jobs.wait()) == [None, 0]


def miss_many(rank: Rank) -> None:
    for number in range(1100):
        grafter.dump("h", torch.ones(2), number=number)
    rank.tell("went on")
    join()
    rank.tell("made up")
    rank.wait_for("sent")


def send_the_first(rank: Rank) -> None:
    join()
    rank.wait_for("made up")
    grafter.dump("h", torch.ones(2), number=0)
    rank.tell("sent")


def test_a_sender_is_told_of_the_first_of_many_points_that_were_missed(tmp_path: Path) -> None:
    """A server that was started first has gone past more than a thousand."""
    with Jobs(tmp_path, b2t_filter="True", timeout=250, signals=("went on", "made up", "sent")) as jobs:
        jobs.start("target", 1, miss_many, wait="job")
        assert jobs.signals["went on"].wait(250)
        jobs.start("baseline", 1, send_the_first)
        succeed(jobs.wait())
        assert outcomes(jobs, "baseline") == {"h": "missed"}


def share_by_a_group(rank: Rank) -> None:
    import torch.distributed as dist

    (directory,) = rank.arguments
    dist.init_process_group(
        "gloo", init_method=f"file://{directory}/group", rank=rank.role_rank, world_size=rank.world_size
    )
    grafter.dump("h", torch.ones(2), ranks=dist.new_group([0, 1]))
    dist.barrier()
    dist.destroy_process_group()
    rank.tell(f"went on {rank.role_rank}")
    join()
    assert until_nothing_is_pending() == 0


def test_a_process_group_that_is_gone_by_then_has_said_whose_the_point_was(tmp_path: Path) -> None:
    names = ("went on 0", "went on 1")
    with Jobs(tmp_path, t2b_filter="True", signals=names) as jobs:
        jobs.start("target", 2, share_by_a_group, str(tmp_path), wait="job")
        for name in names:
            assert jobs.signals[name].wait(250)
        jobs.start("baseline", 1, come_too_late, transform_path="transforms/take_last.py:transform")
        assert succeed(jobs.wait()) == [[1.0, 1.0], None, None]


def have_no_backward_pass(rank: Rank) -> None:
    (has_joined,) = rank.arguments
    grafter._calls._active().begin()
    while has_joined and grafter._calls._active().lifecycle.is_waiting:
        time.sleep(0.01)
    grafter.dump("h", torch.nn.Parameter(torch.ones(2)) * 2.0)
    grafter.step()
    rank.tell("went on")
    # It comes to no further point, and asks for nothing.
    rank.wait_for("done")


def differentiate_alone(rank: Rank) -> list[float]:
    grafter._calls._active().begin()
    rank.wait_for("went on")
    weight = torch.nn.Parameter(torch.ones(2))
    grafter.dump("h", weight * 2.0).sum().backward()
    grafter.step()
    rank.tell("done")
    assert weight.grad is not None
    return weight.grad.tolist()


@pytest.mark.parametrize("direction", ["t2b", "b2t"])
@pytest.mark.parametrize("has_joined", [True, False])
def test_a_gradient_that_never_came_is_told_once_there_is_a_run(
    tmp_path: Path, direction: str, has_joined: bool
) -> None:
    """The job that waits for it, or with it, goes on with its own; also where no point had asked for the run yet."""
    settings: dict[str, Any] = {f"{direction}_filter": "phase == 'backward'"}
    with Jobs(tmp_path, gradients=True, timeout=250, signals=("went on", "done"), **settings) as jobs:
        jobs.start("target", 1, have_no_backward_pass, has_joined, wait="job")
        if not has_joined:
            assert jobs.signals["went on"].wait(250)
        jobs.start("baseline", 1, differentiate_alone)
        assert succeed(jobs.wait()) == [[2.0, 2.0], None]


def save_hooked(rank: Rank) -> None:
    model = torch.nn.Sequential(torch.nn.Linear(2, 2))
    grafter.attach(model, "0", inputs=False)
    model(torch.ones(1, 2)).sum().backward()
    rank.tell("went on")
    join()


def test_hooks_whose_points_are_only_saved_wait_for_nobody(tmp_path: Path) -> None:
    """Nor do those of their gradients."""
    with Jobs(
        tmp_path, t2b_filter="name == 'never'", dump_filter="True", gradients=True, signals=("went on",)
    ) as jobs:  # fmt: skip
        jobs.start("target", 1, save_hooked, wait="job")
        assert jobs.signals["went on"].wait(250)
        jobs.start("baseline", 1, save_hooked)
        succeed(jobs.wait())
        assert len(open_dumps(tmp_path / "run" / "target").points) >= 2


def leave_by_an_interrupt(rank: Rank) -> None:
    grafter.dump("h", torch.ones(2))
    rank.tell("went on")
    rank.wait_for("joined")
    while not grafter._calls._active().lifecycle.join_attempt.is_over:  # type: ignore[union-attr]
        time.sleep(0.01)
    time.sleep(0.2)
    raise KeyboardInterrupt


def stay_without_the_point(rank: Rank) -> None:
    grafter._calls._active().begin()
    assert grafter._calls._active().lifecycle.join_attempt is not None
    if rank.is_baseline:
        join()
        rank.tell("joined")
    rank.wait_for("left")


def test_an_interrupt_ends_a_rank_whose_early_points_wait_for_another(tmp_path: Path) -> None:
    """The thread that makes up for them waits for a rank of its own job, which is not there yet."""
    with Jobs(tmp_path, t2b_filter="True", timeout=60, signals=("went on", "joined", "left")) as jobs:
        jobs.start("target", 2, leave_by_an_interrupt, only=0, wait="job")
        jobs.start("target", 2, stay_without_the_point, only=1, wait="job")
        assert jobs.signals["went on"].wait(250)
        jobs.start("baseline", 1, stay_without_the_point)
        result = jobs.wait_for_one("target", 0, seconds=250)
        jobs.signals["left"].set()
        assert result.error_kind == "KeyboardInterrupt"
        jobs.wait()
