"""What cannot be grafted says so at once, and the other job hears of it: recomputation, forks, threads, captures."""

from __future__ import annotations

import os
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from jobs import Jobs, Rank, succeed, two_jobs
from torch.utils.checkpoint import checkpoint

import grafter

FAR = 1000.0
SOON = 250.0

# Recomputation.


def train_with_checkpoint(rank: Rank) -> Any:
    """The baseline sends in its forward pass; the target's recomputation fires a point that its forward did not."""
    use_reentrant, name = rank.arguments
    seen = []

    def block(x: torch.Tensor) -> torch.Tensor:
        y = x * 2
        grafter.dump(name, y)
        if len(seen) == 1:
            grafter.dump("second", x * 2)
        seen.append(float(y.detach().sum()))
        return y.sin()

    weight = torch.full((2,), 1.0 if rank.is_baseline else 3.0, requires_grad=True)
    out = checkpoint(block, weight * 1, use_reentrant=use_reentrant)
    if not rank.is_baseline:
        out.sum().backward()
    grafter.dump("after", torch.ones(1))
    return seen


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_a_point_that_fires_in_a_recomputation_alone_is_refused_and_the_other_job_told(
    tmp_path: Path, use_reentrant: bool
) -> None:
    """The forward pass grafts; its recomputation raises with what to do, and the other job is told of it."""
    with Jobs(tmp_path, compiler=True, b2t_filter="True", timeout=FAR) as jobs:
        for role in ("baseline", "target"):
            jobs.start(role, 1, train_with_checkpoint, use_reentrant, "h")
        baseline, target = jobs.wait()
        ledger = jobs.ledgers()["target", 0]
    assert [record.outcome for record in ledger] == ["grafted"]
    assert target.error_kind == "UsageError"
    assert "the point 'second' at" in target.error and "test_refusals.py:" in target.error
    assert "fires in a recomputation" in target.error and "must do the same both times" in target.error
    assert baseline.error_kind == "PeerLostError"
    assert "target rank 0 has left with UsageError" in baseline.error and "recomputation" in baseline.error
    assert baseline.seconds < SOON


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_an_unmatched_point_in_a_recomputation_is_left_alone(tmp_path: Path, use_reentrant: bool) -> None:
    with Jobs(tmp_path, compiler=True, b2t_filter="name == 'after'", timeout=FAR) as jobs:
        for role in ("baseline", "target"):
            jobs.start(role, 1, train_with_checkpoint, use_reentrant, "h")
        assert succeed(jobs.wait()) == [[4.0], [12.0, 12.0]]


def dump_in_a_hook(rank: Rank) -> Any:
    """Gradient hooks run in backward without recomputing anything; autograd does so with grad disabled."""
    x = torch.full((2,), 1.0 if rank.is_baseline else 3.0, requires_grad=True)
    y = x * 2
    found = []
    y.register_hook(lambda gradient: found.append(grafter.dump("gradient", gradient.clone()).tolist()))
    (y * y).sum().backward()
    return found


def test_a_point_in_a_gradient_hook_is_no_recomputation(tmp_path: Path) -> None:
    with two_jobs(tmp_path, dump_in_a_hook, dump_in_a_hook, b2t_filter="True") as jobs:
        assert succeed(jobs.wait()) == [[[4.0, 4.0]], [[4.0, 4.0]]]


# Forks.


def fork_and_dump(rank: Rank) -> Any:
    grafter.dump("h", torch.ones(1))
    read, write = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            unmatched = torch.ones(1)
            grafter.step()
            assert grafter.dump("unmatched", unmatched) is unmatched
            grafter.dump("h", torch.ones(1))
            os.write(write, b"no error")
        except BaseException as error:
            os.write(write, f"{type(error).__name__}: {error}".encode())
        finally:
            grafter.close()
            os._exit(0)
    os.close(write)
    told = os.read(read, 4096).decode()
    os.waitpid(pid, 0)
    value = torch.full((1,), 1.0 if rank.is_baseline else 9.0)
    return told, float(grafter.dump("h", value))


def test_a_forked_child_is_refused_and_its_parent_unaffected(tmp_path: Path) -> None:
    """The child's step, unmatched points and close do nothing to the parent's run."""
    with two_jobs(tmp_path, fork_and_dump, fork_and_dump, b2t_filter="name == 'h'") as jobs:
        results = succeed(jobs.wait())
        ledgers = jobs.ledgers()
    for role, (told, value) in zip(("baseline", "target"), results, strict=True):
        assert told.startswith("UsageError: the point 'h' at ")
        assert f"forked from {role} rank 0" in told and "spawn" in told
        assert value == 1.0
        assert [(r.step, r.occurrence) for r in ledgers[role, 0]] == [(0, 0), (0, 1)]


# Threads.


def dump_from_two_threads(rank: Rank) -> Any:
    """Each thread dumps its own points, one after the other: the lock of the test makes one order on both sides."""
    turns = [threading.Event() for _ in range(9)]
    turns[0].set()
    found: dict[str, float] = {}

    def work(thread: int) -> None:
        for i in range(4):
            turn = 2 * i + thread
            turns[turn].wait(250)
            value = torch.full((2,), 1.0 if rank.is_baseline else 9.0)
            with grafter.context(thread=thread):
                found[f"{thread}/{i}"] = float(grafter.dump("h", value, i=i)[0])
            turns[turn + 1].set()

    threads = [threading.Thread(target=work, args=(n,)) for n in (0, 1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(250)
    return sorted(found), set(found.values())


def test_two_threads_graft_in_one_order(tmp_path: Path) -> None:
    with two_jobs(tmp_path, dump_from_two_threads, dump_from_two_threads, b2t_filter="True") as jobs:
        results = succeed(jobs.wait())
        ledger = jobs.ledgers()["target", 0]
    names = [f"{thread}/{i}" for thread in (0, 1) for i in range(4)]
    assert results == [(names, {1.0})] * 2
    assert [(r.tags["thread"], r.tags["i"]) for r in ledger] == [(thread, i) for i in range(4) for thread in (0, 1)]


def dump_from_threads_in_other_orders(rank: Rank) -> Any:
    """The baseline comes to `a` first, the target to `b`; each has a thread that waits with the other one."""
    first, second = ("a", "b") if rank.is_baseline else ("b", "a")
    grafter.dump("start", torch.ones(1))
    errors: list[str] = []

    def work(name: str) -> None:
        try:
            grafter.dump(name, torch.ones(1))
        except grafter.GrafterError as error:
            errors.append(f"{type(error).__name__}: {error}")

    one = threading.Thread(target=work, args=(first,))
    one.start()
    grafter_of_process = grafter._process.grafter
    assert grafter_of_process is not None
    # Until the first thread is at its point, the second could come before it.
    while grafter_of_process.lock.acquire(blocking=False):
        grafter_of_process.lock.release()
        time.sleep(0.001)
    rank.tell(f"{rank.role} first")
    rank.wait_for("target first" if rank.is_baseline else "baseline first")
    two = threading.Thread(target=work, args=(second,))
    two.start()
    one.join(250)
    two.join(250)
    return errors


def test_threads_in_other_orders_fail_within_seconds_with_both_points(tmp_path: Path) -> None:
    """One point at a time: two jobs whose threads come in other orders ask for different points, and are told so.

    Whether the second thread could have helped is not known; a run that would hang is ended instead.
    """
    signals = ("baseline first", "target first")
    settings = {"b2t_filter": "True", "timeout": FAR, "signals": signals}
    with two_jobs(tmp_path, dump_from_threads_in_other_orders, dump_from_threads_in_other_orders, **settings) as jobs:
        results = jobs.wait()
    for result in results:
        assert result.seconds < SOON
        assert len(result.value) == 2
        assert all(text.startswith("PairingError") for text in result.value)
        assert "waits for 'a' (step=0)" in result.value[0] and "waits for 'b' (step=0)" in result.value[0]


# After the end.


def dump_after_close(rank: Rank) -> Any:
    grafter.dump("h", torch.ones(1))
    grafter.close()
    grafter.close()
    grafter.step()
    assert grafter.dump("unmatched", 3) == 3
    with pytest.raises(grafter.GrafterError, match=r"the point 'h' at .* comes after grafter\.close\(\)"):
        grafter.dump("h", torch.ones(1))
    return "refused"


def test_a_matched_point_after_close_is_refused(tmp_path: Path) -> None:
    with two_jobs(tmp_path, dump_after_close, dump_after_close, b2t_filter="name == 'h'") as jobs:
        assert succeed(jobs.wait()) == ["refused"] * 2


def dump_with_bad_arguments(rank: Rank) -> Any:
    """Usage errors before a point has a key: both jobs make the same call, and both get the error at once."""
    found = []
    for arguments in ({"layer": torch.tensor(3)}, {"wait": 1}, {"write": "inplace"}, {"name": "x"}):
        try:
            grafter.dump("h", torch.ones(1), **arguments)
        except grafter.GrafterError as error:
            found.append(f"{type(error).__name__}: {error}".split(";")[0].split(". ")[0])
    grafter.dump("h", torch.ones(1))
    return found


def test_wrong_arguments_of_a_matched_point_raise_at_the_call_and_the_run_can_go_on(tmp_path: Path) -> None:
    with two_jobs(tmp_path, dump_with_bad_arguments, dump_with_bad_arguments, b2t_filter="True") as jobs:
        results = succeed(jobs.wait())
        ledger = jobs.ledgers()["target", 0]
    for found in results:
        assert found == [
            "UsageError: tag layer is a Tensor of shape []",
            "UsageError: `wait=1` is not known",
            "UsageError: `write='inplace'` is not known",
            "UsageError: `name` is the first argument of `grafter.dump`",
        ]
    assert [(r.outcome, r.occurrence) for r in ledger] == [("grafted", 0)]


# CUDA graphs.


def capture(rank: Rank) -> Any:
    value = torch.ones(2, device="cuda")
    grafter.dump("h", value)
    graph = torch.cuda.CUDAGraph()
    found = None
    with torch.cuda.graph(graph):
        value.mul_(2)
        try:
            grafter.dump("h", value)
        except grafter.GrafterError as error:
            found = str(error)
    grafter.dump("h", value)
    return found


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU: a CUDA graph capture")
def test_a_matched_point_in_a_cuda_graph_capture_is_refused(tmp_path: Path) -> None:
    with two_jobs(tmp_path, capture, capture, b2t_filter="True") as jobs:
        for text in succeed(jobs.wait()):
            assert "in a CUDA graph capture" in text and "without CUDA graphs" in text
