"""A wait always explains itself: jobs that ask for different points, peers that leave, die, stop or never come."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from jobs import Jobs, Rank, two_jobs

import grafter

# Faults must be told within seconds; the timeout of these runs is far away.
FAR = 1000.0
SOON = 250.0


def dump_names(rank: Rank) -> None:
    """Dump the names that the test gives this role, in order."""
    for name in rank.arguments[0]:
        grafter.dump(name, torch.ones(2))


def run_names(
    directory: Path, baseline: Any, target: Any, ranks: tuple[int, int] = (1, 1), **settings: Any
) -> list[Any]:
    with Jobs(directory, compare_filter="True", timeout=FAR, **settings) as jobs:
        jobs.start("baseline", ranks[0], dump_names, baseline)
        jobs.start("target", ranks[1], dump_names, target)
        return jobs.wait()


@pytest.mark.parametrize("hosted", [True, False], ids=["hosted by the launcher", "hosted by baseline rank 0"])
def test_jobs_that_ask_for_different_names_both_fail_with_both_sides(tmp_path: Path, hosted: bool) -> None:
    results = run_names(tmp_path, ["a", "b", "x"], ["a", "b", "y"], hosted=hosted)
    for result in results:
        assert result.error_kind == "PairingError"
        assert result.seconds < SOON
        assert "baseline rank 0 waits for 'x' (step=0)" in result.error
        assert "target rank 0 waits for 'y' (step=0)" in result.error
        assert result.error.count("'a' (step=0) compared; 'b' (step=0) compared") == 2, "the last points of both"
        assert result.error.count("test_waits.py:") >= 2, "where in the user's code, of both"
        assert "in dump_names" in result.error
    assert results[0].error == results[1].error


def test_one_more_point_on_one_side_fails_both_or_names_who_left(tmp_path: Path) -> None:
    baseline, target = run_names(tmp_path, ["a", "a"], ["a"])
    assert target.error_kind is None
    assert baseline.error_kind == "PairingError"
    assert baseline.seconds < SOON
    assert "'a' (step=0, occurrence=1)" in baseline.error
    assert "target rank 0 has left (it ended in good order)" in baseline.error


def dump_step(rank: Rank) -> None:
    for _ in range(rank.arguments[0]):
        grafter.dump("h", torch.ones(1), layer_id=0)
        grafter.step()
    grafter.dump("end", torch.ones(1))


def test_one_more_step_fails_both(tmp_path: Path) -> None:
    with Jobs(tmp_path, compare_filter="True", timeout=FAR) as jobs:
        jobs.start("baseline", 1, dump_step, 2)
        jobs.start("target", 1, dump_step, 3)
        results = jobs.wait()
    for result in results:
        assert result.error_kind == "PairingError"
        assert "baseline rank 0 waits for 'end' (step=2)" in result.error
        assert "target rank 0 waits for 'h' (layer_id=0, step=2)" in result.error


def dump_layer(rank: Rank) -> None:
    grafter.dump("h", torch.ones(1), layer_id=rank.arguments[0])


def test_another_layer_and_type_of_tag_is_told(tmp_path: Path) -> None:
    """1 and '1' are different tags, and the message shows the difference."""
    with Jobs(tmp_path, compare_filter="True", timeout=FAR) as jobs:
        jobs.start("baseline", 1, dump_layer, 1)
        jobs.start("target", 1, dump_layer, "1")
        results = jobs.wait()
    for result in results:
        assert "layer_id=1," in result.error
        assert "layer_id='1'," in result.error


def dump_by_rank(rank: Rank) -> None:
    names = rank.arguments[0][rank.role_rank]
    for name in names:
        grafter.dump(name, torch.ones(2))


def test_ranks_of_one_job_that_part_are_told(tmp_path: Path) -> None:
    with Jobs(tmp_path, compare_filter="True", timeout=FAR) as jobs:
        jobs.start("baseline", 2, dump_by_rank, [["a", "b"], ["a", "c"]])
        jobs.start("target", 1, dump_by_rank, [["a", "b"]])
        results = jobs.wait()
    assert {r.error_kind for r in results} == {"PairingError"}
    assert all("baseline rank 1 waits for 'c'" in r.error for r in results)


def free_two_waiters(rank: Rank) -> None:
    """Baseline 0 waits at `late`, target 0 at `other`; target 1 runs for a while and then frees both."""
    if rank.is_baseline:
        grafter.dump("late", torch.ones(1), ranks=[0])
        grafter.dump("other", torch.ones(1))
    elif rank.role_rank == 0:
        grafter.dump("other", torch.ones(1))
    else:
        time.sleep(4)
        grafter.dump("late", torch.ones(1), ranks=[1])
        grafter.dump("other", torch.ones(1))


def test_a_third_rank_that_can_still_free_two_waiters_raises_no_alarm(tmp_path: Path) -> None:
    with Jobs(tmp_path, b2t_filter="True", timeout=FAR) as jobs:
        jobs.start("baseline", 1, free_two_waiters)
        jobs.start("target", 2, free_two_waiters)
        results = jobs.wait()
    assert [r.error_kind for r in results] == [None, None, None]


def declare_differently(rank: Rank) -> None:
    ranks = [0] if not rank.is_baseline else ([0, 1] if rank.role_rank == 0 else [1, 2] if rank.role_rank == 1 else [2])
    grafter.step()
    if rank.role_rank < 2:
        grafter.dump("h", torch.ones(1), ranks=ranks)


def test_ranks_of_one_role_that_declare_different_participants_fail_on_both_sides(tmp_path: Path) -> None:
    with Jobs(tmp_path, compare_filter="True", timeout=FAR) as jobs:
        jobs.start("baseline", 3, declare_differently)
        jobs.start("target", 1, declare_differently)
        results = jobs.wait()
    failed = [r for r in results if r.error_kind is not None]
    assert len(failed) == 3
    assert all(r.error_kind == "PairingError" and "different participants" in r.error for r in failed)


def die_or_wait(rank: Rank) -> None:
    grafter.dump("first", torch.ones(1))
    if rank.is_baseline:
        rank.tell("met")
        time.sleep(60)
    grafter.dump("second", torch.ones(1))


@pytest.mark.parametrize("hosted", [True, False], ids=["a sender", "the store's host"])
def test_a_peer_killed_while_the_other_waits_is_named(tmp_path: Path, hosted: bool) -> None:
    with Jobs(tmp_path, b2t_filter="True", timeout=FAR, hosted=hosted, signals=("met",)) as jobs:
        jobs.start("baseline", 1, die_or_wait)
        jobs.start("target", 1, die_or_wait)
        assert jobs.signals["met"].wait(250)
        time.sleep(1.5)  # long enough for a first heartbeat
        jobs.kill("baseline", 0)
        killed = time.monotonic()
        _, target = jobs.wait()
        assert time.monotonic() - killed < SOON
    assert target.error_kind == "PeerLostError"
    assert "baseline rank 0" in target.error
    # The store's own host takes its last heartbeat with it.
    assert not hosted or "last heard of" in target.error


def test_a_stopped_peer_is_named_at_once_and_fails_at_the_timeout(tmp_path: Path) -> None:
    with Jobs(tmp_path, b2t_filter="True", timeout=4, signals=("met",)) as jobs:
        jobs.start("baseline", 1, die_or_wait)
        jobs.start("target", 1, die_or_wait)
        assert jobs.signals["met"].wait(250)
        jobs.kill("baseline", 0, signal.SIGSTOP)
        target = jobs.wait_for_one("target", 0)
    assert target.error_kind == "PointTimeoutError"
    assert "is stopped (SIGSTOP" in target.error


def test_a_stopped_store_host_fails_the_wait_near_the_timeout(tmp_path: Path) -> None:
    with Jobs(tmp_path, b2t_filter="True", timeout=3, hosted=False, signals=("met",)) as jobs:
        jobs.start("baseline", 1, die_or_wait)
        jobs.start("target", 1, die_or_wait)
        assert jobs.signals["met"].wait(250)
        jobs.kill("baseline", 0, signal.SIGSTOP)
        target = jobs.wait_for_one("target", 0)
    assert target.error_kind in ("PeerLostError", "PointTimeoutError")
    assert "stopped" in target.error


def stop_then_go_on(rank: Rank) -> str:
    grafter.dump("first", torch.ones(1))
    if rank.is_baseline:
        rank.tell("met")
        os.kill(os.getpid(), signal.SIGSTOP)
    grafter.dump("second", torch.ones(1))
    return "done"


@pytest.mark.parametrize("hosted", [True, False])
def test_a_stopped_peer_that_is_continued_goes_on(tmp_path: Path, hosted: bool) -> None:
    with Jobs(tmp_path, b2t_filter="True", timeout=FAR, hosted=hosted, signals=("met",)) as jobs:
        jobs.start("baseline", 1, stop_then_go_on)
        jobs.start("target", 1, stop_then_go_on)
        assert jobs.signals["met"].wait(250)
        time.sleep(3)
        jobs.kill("baseline", 0, signal.SIGCONT)
        results = jobs.wait()
    assert [r.value for r in results] == ["done", "done"], results


def raise_after_first(rank: Rank) -> None:
    grafter.dump("first", torch.ones(1))
    if rank.is_baseline:
        raise ValueError("the user's own fault")
    grafter.dump("second", torch.ones(1))


def test_a_peer_that_raised_is_named_with_its_error(tmp_path: Path) -> None:
    with two_jobs(tmp_path, raise_after_first, raise_after_first, b2t_filter="True", timeout=FAR) as jobs:
        baseline, target = jobs.wait()
    assert baseline.error_kind == "ValueError"
    assert target.error_kind == "PeerLostError"
    assert "baseline rank 0 has left with ValueError: the user's own fault" in target.error


def exit_at_once(rank: Rank) -> None:
    grafter.dump("first", torch.ones(1))
    if rank.is_baseline:
        os._exit(3)
    grafter.dump("second", torch.ones(1))


def test_a_peer_that_exits_without_closing_is_named(tmp_path: Path) -> None:
    with two_jobs(tmp_path, exit_at_once, exit_at_once, b2t_filter="True", timeout=FAR) as jobs:
        _, target = jobs.wait()
    assert target.error_kind == "PeerLostError"
    assert target.seconds < SOON
    assert "baseline rank 0 is gone" in target.error


def detach(rank: Rank) -> list[float]:
    values = [float(grafter.dump("first", torch.tensor(1.0 if rank.is_baseline else 2.0)))]
    if rank.is_baseline:
        os._exit(3)
    for name in ("second", "third"):
        values.append(float(grafter.dump(name, torch.tensor(2.0))))
    return values


def test_on_peer_loss_detach_goes_on_ungrafted(tmp_path: Path) -> None:
    with two_jobs(tmp_path, detach, detach, b2t_filter="True", timeout=FAR, on_peer_loss="detach") as jobs:
        _, target = jobs.wait()
    assert target.value == [1.0, 2.0, 2.0]


def wait_alone(rank: Rank) -> None:
    grafter.dump("h", torch.ones(1))


def test_a_job_that_never_comes_fails_at_the_join_timeout(tmp_path: Path) -> None:
    with Jobs(tmp_path, b2t_filter="True", join_timeout=2) as jobs:
        jobs.start("target", 1, wait_alone)
        (target,) = jobs.wait()
    assert target.error_kind == "PointTimeoutError"
    assert "GRAFTER_JOIN_TIMEOUT" in target.error


def test_an_exit_that_the_launcher_reports_ends_the_wait_to_join(tmp_path: Path) -> None:
    with Jobs(tmp_path, b2t_filter="True", join_timeout=FAR) as jobs:
        jobs.start("target", 1, wait_alone)
        jobs.store.report_job_exit("baseline", "exited with code 7")
        (target,) = jobs.wait()
    assert target.error_kind == "PeerLostError"
    assert "the baseline job exited with code 7" in target.error
    assert target.seconds < SOON


def interrupt_then_raise(rank: Rank) -> None:
    grafter.dump("first", torch.ones(1))
    if rank.is_baseline:
        rank.tell("waiting")
        grafter.dump("second", torch.ones(1))
    else:
        rank.wait_for("over")


@pytest.mark.parametrize("hosted", [True, False])
def test_ctrl_c_ends_a_wait_at_once(tmp_path: Path, hosted: bool) -> None:
    """A rank that waits, in mail or in the store, answers SIGINT with KeyboardInterrupt within a second or two."""
    with Jobs(tmp_path, b2t_filter="True", timeout=FAR, hosted=hosted, signals=("waiting", "over")) as jobs:
        jobs.start("baseline", 1, interrupt_then_raise)
        jobs.start("target", 1, interrupt_then_raise)
        assert jobs.signals["waiting"].wait(250)
        time.sleep(1.0)
        jobs.kill("baseline", 0, signal.SIGINT)
        baseline = jobs.wait_for_one("baseline", 0, seconds=250)
        jobs.signals["over"].set()
        jobs.wait()
    assert baseline.error_kind == "KeyboardInterrupt"


def close_without_a_point(rank: Rank) -> None:
    """Nothing of grafter is called before."""
    grafter.close()


@pytest.mark.parametrize("leaver", ["baseline", "target"])
def test_a_job_that_leaves_without_a_point_is_reported_to_the_other_at_once(tmp_path: Path, leaver: str) -> None:
    """Both started by hand: baseline rank 0 hosts the store, whichever of the two it is."""
    other = "target" if leaver == "baseline" else "baseline"
    with Jobs(tmp_path, b2t_filter="True", timeout=FAR, join_timeout=FAR, hosted=False) as jobs:
        jobs.start(leaver, 1, close_without_a_point)
        jobs.start(other, 1, wait_alone)
        results = dict(zip(("baseline", "target"), jobs.wait(), strict=True))
    assert results[leaver].error_kind is None
    assert results[other].error_kind == "PairingError"
    assert f"{leaver} rank 0 has left (it ended in good order)" in results[other].error
    assert results[other].seconds < SOON


def meet_or_close(rank: Rank) -> float:
    value = torch.tensor([1.0 if rank.is_baseline else 2.0])
    if rank.role_rank == 0:
        grafter.dump("h", value, ranks=[0])
    return float(value)


def test_a_rank_without_a_point_does_not_keep_the_others_of_its_job_from_joining(tmp_path: Path) -> None:
    with Jobs(tmp_path, b2t_filter="True", timeout=FAR, join_timeout=FAR, hosted=False) as jobs:
        jobs.start("baseline", 1, meet_or_close)
        jobs.start("target", 2, meet_or_close)
        assert [result.value for result in jobs.wait()] == [1.0, 1.0, 2.0]


def raise_before_any_point(rank: Rank) -> None:
    raise ValueError("the user's own fault")


@pytest.mark.parametrize("leaver", ["baseline", "target"])
def test_a_rank_that_fails_before_all_have_joined_is_reported_to_the_others(tmp_path: Path, leaver: str) -> None:
    """The second rank of its job is never started, so nobody can join."""
    other = "target" if leaver == "baseline" else "baseline"
    with Jobs(tmp_path, b2t_filter="True", timeout=FAR, join_timeout=FAR, hosted=False) as jobs:
        jobs.start(other, 1, wait_alone)
        jobs.start(leaver, 2, raise_before_any_point, only=0)
        results = dict(zip(("baseline", "target"), jobs.wait(), strict=True))
    assert results[leaver].error_kind == "ValueError"
    assert results[other].error_kind == "PeerLostError", results[other]
    assert f"{leaver} rank 0 has left with" in results[other].error
    assert results[other].seconds < SOON


def interrupt_while_it_stays(rank: Rank) -> None:
    fd = os.open(rank.arguments[0], os.O_WRONLY | os.O_CREAT)
    os.dup2(fd, 2)
    grafter.close()


def test_ctrl_c_ends_a_rank_that_stays_for_the_others_to_join(tmp_path: Path) -> None:
    with Jobs(tmp_path, b2t_filter="True", timeout=FAR, hosted=False) as jobs:
        printed = tmp_path / "stderr"
        jobs.start("baseline", 1, interrupt_while_it_stays, printed)
        deadline = time.monotonic() + 60
        while not printed.exists() or "stays until all ranks" not in printed.read_text():
            assert time.monotonic() < deadline
            time.sleep(0.05)
        jobs.kill("baseline", 0, signal.SIGINT)
        assert jobs.wait_for_one("baseline", 0, seconds=20).error_kind == "KeyboardInterrupt"


def dump_unmatched_until_told(rank: Rank) -> None:
    for _ in range(600):
        grafter.dump("h", torch.ones(1))
        time.sleep(0.05)


def test_filters_that_differ_end_both_jobs_though_one_matches_nothing(tmp_path: Path) -> None:
    """The side whose own filter never matches learns it at its next call, matched or not."""
    with Jobs(tmp_path, timeout=FAR) as jobs:
        jobs.start("baseline", 1, wait_alone, b2t_filter="name == 'h'")
        jobs.start("target", 1, dump_unmatched_until_told, b2t_filter="name == 'nope'")
        results = jobs.wait()
    assert [r.error_kind for r in results] == ["JoinError", "JoinError"]
    assert all("the two sides are set differently" in r.error for r in results)


def dump_one_more_on_the_last_rank(rank: Rank) -> None:
    grafter.dump("a", torch.ones(1))
    if rank.role_rank == 1:
        grafter.dump("b", torch.ones(1))


def test_a_rank_whose_own_leader_has_left_is_told_within_seconds(tmp_path: Path) -> None:
    """Leaders look for mutual waits; where the leader left in good order, the rank that waits for it looks itself."""
    with Jobs(tmp_path, b2t_filter="True", timeout=FAR) as jobs:
        jobs.start("baseline", 1, dump_one_more_on_the_last_rank)
        jobs.start("target", 2, dump_one_more_on_the_last_rank)
        results = jobs.wait()
    assert [r.error_kind for r in results] == [None, None, "PairingError"]
    assert results[2].seconds < SOON
    assert "target rank 0 has left (it ended in good order)" in results[2].error


def close_on_a_full_disk(rank: Rank) -> None:
    from grafter.store.ledger import LedgerWriter

    def no_room(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    grafter.dump("a", torch.ones(1))
    if rank.is_baseline:
        LedgerWriter.write_summary = no_room  # type: ignore[method-assign]
    else:
        grafter.dump("b", torch.ones(1))


def test_a_rank_that_cannot_write_its_summary_still_leaves_in_good_order(tmp_path: Path) -> None:
    with two_jobs(tmp_path, close_on_a_full_disk, close_on_a_full_disk, b2t_filter="True", timeout=FAR) as jobs:
        baseline, target = jobs.wait()
    assert baseline.error_kind is None
    assert target.error_kind == "PairingError"
    assert "baseline rank 0 has left (it ended in good order)" in target.error
