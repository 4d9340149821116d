"""Points that only one job comes to are skipped with `one_sided=skip`; all others are compared or grafted as ever."""

from __future__ import annotations

import os
import signal
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from jobs import Jobs, Rank, succeed, two_jobs
from outbox_parts import point_keys, until_nothing_is_pending

import grafter

# Faults are found within seconds; the timeout of these runs is far away.
FAR, SOON = 100.0, 30.0
WELL = {"sent", "grafted", "compared"}


def dump_steps(rank: Rank) -> list[list[float]]:
    """The argument is a list of steps, each of which is a list of names; or such a list for each rank of the job."""
    steps = rank.arguments[0]
    found = []
    for names in steps[rank.role_rank] if isinstance(steps, dict) else steps:
        for name in names:
            value = torch.full((2,), 1.0 if rank.is_baseline else 2.0)
            found.append(grafter.dump(name, value).tolist())
        grafter.step()
    return found


Story = dict[str, tuple[str, str | None]]


def run_steps(
    directory: Path, baseline: Any, target: Any, ranks: tuple[int, int] = (1, 1), **settings: Any
) -> tuple[list[Any], dict[Any, Story]]:
    """(what each rank returned; by role and rank: point -> its outcome, and the only job that came to it)."""
    with Jobs(directory, **{"timeout": FAR, "one_sided": "skip", **settings}) as jobs:
        jobs.start("baseline", ranks[0], dump_steps, baseline)
        jobs.start("target", ranks[1], dump_steps, target)
        values = succeed(jobs.wait())
        stories = {
            who: {f"{record.name}@{record.step}": (record.outcome, record.only_in) for record in records}
            for who, records in jobs.ledgers().items()
        }
    return values, stories


@pytest.mark.parametrize("ranks", [(1, 1), (2, 2), (1, 2)], ids=["1+1", "2+2", "1+2"])
@pytest.mark.parametrize("direction", ["compare", "b2t"])
def test_what_only_one_job_comes_to_is_skipped_and_all_else_meets(
    tmp_path: Path, ranks: tuple[int, int], direction: str
) -> None:
    """On either side, in the middle, at the end of a step, and in steps that only one job has."""
    baseline = [["a", "b only", "c"], ["a", "c"], ["a"]]
    target = [["a", "t only", "c", "t last"], ["t first", "a", "c"]]
    values, stories = run_steps(tmp_path, baseline, target, ranks, **{f"{direction}_filter": "True"})
    there, here = ("compared", "compared") if direction == "compare" else ("sent", "grafted")
    for (role, _), story in stories.items():
        well = there if role == "baseline" else here
        own = ["b only@0", "a@2"] if role == "baseline" else ["t only@0", "t last@0", "t first@1"]
        expected: Story = dict.fromkeys(("a@0", "c@0", "a@1", "c@1"), (well, None))
        assert story == {**expected, **dict.fromkeys(own, ("skipped", role))}
    if direction == "b2t":
        assert values[-1] == [[1.0] * 2, [2.0] * 2, [1.0] * 2, [2.0] * 2, [2.0] * 2, [1.0] * 2, [1.0] * 2]


def no_steps(rank: Rank) -> None:
    for name in ("a", rank.role, "z"):
        grafter.dump(name, torch.ones(2))


def test_without_steps_the_end_of_the_program_is_the_end_of_the_only_step(tmp_path: Path) -> None:
    """The job whose program ends stays until the other has taken what both have."""
    with two_jobs(tmp_path, no_steps, no_steps, compare_filter="True", one_sided="skip", timeout=FAR) as jobs:
        succeed(jobs.wait())
        outcomes = [[(r.name, r.outcome, r.only_in) for r in records] for records in jobs.ledgers().values()]
    assert outcomes == [
        [("a", "compared", None), ("baseline", "skipped", "baseline"), ("z", "compared", None)],
        [("a", "compared", None), ("target", "skipped", "target"), ("z", "compared", None)],
    ]


@pytest.mark.parametrize("extra", ["both", "baseline", "target"])
def test_mutual_waits_of_receivers_end_and_both_jobs_go_on(tmp_path: Path, extra: str) -> None:
    """Points of both directions, with one more on one side or on each: at most one point behind is lost with it."""
    common = ["b2t 1", "t2b 1", "b2t 2", "t2b 2", "b2t 3", "t2b 3"]
    baseline = [["b2t 0", *(["t2b only baseline"] if extra != "target" else []), *common]]
    target = [["b2t 0", *(["b2t only target"] if extra != "baseline" else []), *common]]
    filters = {"b2t_filter": "name.startswith('b2t')", "t2b_filter": "name.startswith('t2b')"}
    _, stories = run_steps(tmp_path, baseline, target, **filters)
    for (role, _), story in stories.items():
        lost = {name for name, (outcome, _) in story.items() if outcome not in WELL}
        only = {f"{'t2b' if role == 'baseline' else 'b2t'} only {role}@0"} if extra in (role, "both") else set()
        assert lost == only | ({"b2t 1@0"} if extra == "baseline" else set()), (role, story)


@pytest.mark.parametrize("absent", [0, 1], ids=["the leader", "a follower"])
@pytest.mark.parametrize("role", ["baseline", "target"])
def test_a_point_that_not_all_ranks_of_a_job_come_to_is_skipped_on_all_that_do(
    tmp_path: Path, role: str, absent: int
) -> None:
    """Whichever rank it is, and whether its job sends or receives. Ranks of the receivers may wait for each other, at
    this point and at the next: one of the two points is given up first, which may be the next."""
    whole = [["a", "x", "b"], ["a", "b"]]
    partial = {absent: [["a", "b"], ["a", "b"]], 1 - absent: whole}
    steps = {"baseline": whole, "target": whole, role: partial}
    _, stories = run_steps(tmp_path, steps["baseline"], steps["target"], (2, 2), b2t_filter="True")
    for (own, rank), story in stories.items():
        lost = {name for name, (outcome, _) in story.items() if outcome not in WELL}
        assert lost - {"x@0"} == ({"b@0"} if (role, absent) == ("target", 1) else set())
        if own == role:
            assert ("x@0" in story) == (rank != absent)
        assert story.get("x@0", ("skipped", own)) == ("skipped", own)


def test_both_jobs_must_agree_on_it(tmp_path: Path) -> None:
    """Each of them relies on what the other does."""
    with Jobs(tmp_path, compare_filter="True") as jobs:
        jobs.start("baseline", 1, no_steps, one_sided="skip")
        jobs.start("target", 1, no_steps)
        results = jobs.wait()
    assert {result.error_kind for result in results} == {"JoinError"}
    assert all("GRAFTER_ONE_SIDED is\n  skip" in result.error for result in results)


def test_without_it_the_error_says_how_to_skip_such_points(tmp_path: Path) -> None:
    """Ready to paste."""
    with two_jobs(tmp_path, no_steps, no_steps, compare_filter="True", timeout=FAR) as jobs:
        results = jobs.wait()
    assert {result.error_kind for result in results} == {"PairingError"}
    assert all("`grafter run --set one_sided=skip`" in result.error for result in results)


# The order of arrival.


def in_order(rank: Rank) -> list[float]:
    """The baseline passes three steps before the target begins."""
    assert grafter._calls._active().begin() is None and grafter._calls._active().session
    if not rank.is_baseline:
        rank.wait_for("the baseline is done")
    found = []
    for _ in range(3):
        for name in ("a", f"{rank.role} only", "b"):
            found.append(grafter.dump(name, torch.full((2,), 1.0 if rank.is_baseline else 2.0)).sum().item())
        grafter.step()
    if rank.is_baseline:
        rank.tell("the baseline is done")
    return found


def test_a_sender_runs_ahead_and_waits_at_its_end_for_receivers_that_come_later(tmp_path: Path) -> None:
    """It is steps ahead of them, and none of its points is lost."""
    with two_jobs(
        tmp_path,
        in_order,
        in_order,
        b2t_filter="True",
        one_sided="skip",
        timeout=FAR,
        signals=("the baseline is done",),
    ) as jobs:
        assert succeed(jobs.wait())[1] == [2.0, 4.0, 2.0] * 3
        skipped = [[r.only_in for r in records if r.outcome == "skipped"] for records in jobs.ledgers().values()]
    assert skipped == [["baseline"] * 3, ["target"] * 3]


def tell_once_it_waits(rank: Rank, session: Any) -> None:
    while session.housekeeping.current_wait is None:
        time.sleep(0.01)
    rank.tell("the target waits")


def receivers_first(rank: Rank) -> list[float]:
    """The baseline comes once the target waits at a point that it alone has."""
    session = grafter._calls._active().begin() or grafter._calls._active().session
    if rank.is_baseline:
        rank.wait_for("the target waits")
    else:
        threading.Thread(target=tell_once_it_waits, args=(rank, session), daemon=True).start()
    return [
        grafter.dump(name, torch.full((2,), 1.0 if rank.is_baseline else 2.0)).sum().item()
        for name in (f"{rank.role} only", "a", "b")
    ]


def test_receivers_that_come_first_wait_until_the_step_is_over(tmp_path: Path) -> None:
    """At the first point that only they have; the later ones of the step are met at once."""
    with two_jobs(
        tmp_path, receivers_first, receivers_first, b2t_filter="True", one_sided="skip", timeout=FAR,
        signals=("the target waits",),
    ) as jobs:  # fmt: skip
        assert succeed(jobs.wait())[1] == [4.0, 2.0, 2.0]


# Faults.


def killed_sender(rank: Rank) -> None:
    grafter.dump("a", torch.ones(2))
    if rank.is_baseline:
        os.kill(os.getpid(), signal.SIGKILL)
    grafter.dump("b", torch.ones(2))


def test_a_sender_that_dies_ends_the_run_of_the_receivers(tmp_path: Path) -> None:
    """What it never came to is not a point of theirs alone."""
    with two_jobs(tmp_path, killed_sender, killed_sender, compare_filter="True", one_sided="skip", timeout=FAR) as jobs:
        _, target = jobs.wait()
    assert target.error_kind == "PeerLostError"
    assert "baseline rank 0" in target.error


def test_receivers_may_go_on_ungrafted_where_their_sender_dies(tmp_path: Path) -> None:
    """As ever, with GRAFTER_ON_PEER_LOSS=detach."""
    settings = {"compare_filter": "True", "one_sided": "skip", "on_peer_loss": "detach", "timeout": FAR}
    with two_jobs(tmp_path, killed_sender, killed_sender, **settings) as jobs:
        _, target = jobs.wait()
        assert target.error_kind is None and target.seconds < SOON
        assert [r.name for r in jobs.ledgers()["target", 0]] in (["a"], [])


def never_ends_its_step(rank: Rank) -> None:
    assert grafter._calls._active().begin() is None and grafter._calls._active().session
    if rank.is_baseline:
        rank.wait_for("the time is up")
        return
    try:
        grafter.dump("only here", torch.ones(2))
    finally:
        rank.tell("the time is up")


def test_a_wait_whose_time_is_up_says_that_the_step_is_not_over(tmp_path: Path) -> None:
    """It may still be met, so it is not skipped: GRAFTER_TIMEOUT holds as for every point."""
    settings = {"compare_filter": "True", "one_sided": "skip", "timeout": 3, "signals": ("the time is up",)}
    with two_jobs(tmp_path, never_ends_its_step, never_ends_its_step, **settings) as jobs:
        _, target = jobs.wait()
    assert target.error_kind == "PointTimeoutError"
    assert "have not passed the end of step 0, so the point cannot be skipped yet" in target.error


def killed_receiver(rank: Rank) -> None:
    grafter.dump("a", torch.ones(2))
    if not rank.is_baseline:
        os.kill(os.getpid(), signal.SIGKILL)
    for number in range(5):
        grafter.dump("b", torch.ones(2), number=number)


def test_a_receiver_that_dies_does_not_hold_up_the_end_of_the_sender(tmp_path: Path) -> None:
    """What it was to take has failed, and the ledger says why."""
    with two_jobs(
        tmp_path, killed_receiver, killed_receiver, compare_filter="True", one_sided="skip", timeout=FAR
    ) as jobs:
        baseline, _ = jobs.wait()
        assert baseline.seconds < SOON
        records = jobs.ledgers()["baseline", 0]
    assert [(r.name, r.outcome) for r in records[1:]] == [("b", "failed")] * 5
    assert all("target" in (r.reason or "") for r in records[1:])


def failing_receiver(rank: Rank) -> None:
    grafter.dump("a", torch.ones(2))
    if not rank.is_baseline:
        raise RuntimeError("the program has failed")
    grafter.dump("b", torch.ones(2))


def test_a_receiver_that_fails_does_not_hold_up_the_end_of_the_sender(tmp_path: Path) -> None:
    """Nor is what it left out called a point of the baseline alone."""
    with two_jobs(
        tmp_path, failing_receiver, failing_receiver, compare_filter="True", one_sided="skip", timeout=FAR
    ) as jobs:
        baseline, _ = jobs.wait()
        assert baseline.seconds < SOON
        last = jobs.ledgers()["baseline", 0][-1]
    assert last.outcome == "failed" and "target" in last.reason


# The bound of bytes.

ELEMENTS = 4096
LIMIT = 8 * 4 * ELEMENTS


def many(rank: Rank) -> None:
    """40 values, of which 8 fit into the outbox."""
    for number in range(40):
        grafter.dump("h", torch.full((ELEMENTS,), float(number)), number=number)


def test_a_sender_whose_outbox_is_full_waits_for_the_receivers(tmp_path: Path) -> None:
    """Nothing is displaced as long as they take something."""
    with two_jobs(
        tmp_path, many, many, compare_filter="True", one_sided="skip", timeout=FAR, outbox_bytes=LIMIT
    ) as jobs:
        succeed(jobs.wait())
        outcomes = [[r.outcome for r in records] for records in jobs.ledgers().values()]
    assert outcomes == [["compared"] * 40] * 2


def many_behind_another(rank: Rank) -> None:
    if not rank.is_baseline:
        grafter.dump("only here", torch.ones(2))
    many(rank)


def test_where_the_receivers_wait_elsewhere_the_oldest_make_room_and_say_so(tmp_path: Path) -> None:
    """Neither job hangs, and no point is lost without a word: what was displaced names the limit in both ledgers."""
    with two_jobs(
        tmp_path, many_behind_another, many_behind_another, compare_filter="True", one_sided="skip", timeout=FAR,
        outbox_bytes=LIMIT,
    ) as jobs:  # fmt: skip
        baseline, _ = jobs.wait()
        assert baseline.error_kind is None and baseline.seconds < SOON
        sent, came = jobs.ledgers().values()
    assert [r.outcome for r in sent] == ["displaced"] * 32 + ["compared"] * 8
    assert [r.outcome for r in came] == ["skipped"] + ["missed"] * 32 + ["compared"] * 8
    assert all("GRAFTER_OUTBOX_BYTES" in r.reason for r in [*sent[:32], *came[1:33]])


# What is left behind.

# What the last points of both jobs leave in the store, until there is a next one.
MOST_KEYS = 6


def long_run(rank: Rank) -> tuple[int, int]:
    for step in range(30):
        for name in ("a", f"{rank.role} {step % 3}", "b"):
            grafter.dump(name, torch.ones(8))
        grafter.step()
    left = until_nothing_is_pending()
    rank.tell(f"done {rank.role}")
    for role in ("baseline", "target"):
        rank.wait_for(f"done {role}")
    keys = len(point_keys([], at_most=MOST_KEYS)) if rank.is_baseline else 0
    rank.tell("counted") if rank.is_baseline else rank.wait_for("counted")
    return left, keys


def test_one_sided_points_leave_nothing_in_the_outbox_and_next_to_nothing_in_the_store(tmp_path: Path) -> None:
    """The keys of the last points stay until the next ones; of 60 points that only one job came to, that is all."""
    with two_jobs(
        tmp_path, long_run, long_run, b2t_filter="True", one_sided="skip", timeout=FAR,
        signals=("done baseline", "done target", "counted"),
    ) as jobs:  # fmt: skip
        (left, keys), _ = succeed(jobs.wait())
    assert left == 0
    assert keys <= MOST_KEYS
