"""Faults in the middle of a transfer: nobody hangs, nothing half is written, and the run goes on where it can."""

from __future__ import annotations

import os
import resource
import signal
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from jobs import Jobs, Rank, succeed

import grafter
from grafter.core import copying
from grafter.wire.exchange import gloo, shared_memory, staging

FAR = 1000.0
SOON = 250.0
MIB = 1 << 20
# 16 leaves of 64 MiB: 1 GiB, whose memory nobody touches beyond the middle.
LEAVES = 16
LEAF_NUMEL = 16 << 20
BACKENDS = pytest.mark.parametrize("backend", ["auto", "gloo"])


def gigabyte(fill: float) -> list[torch.Tensor]:
    """One leaf of 64 MiB under 16 names that are views: a point of 1 GiB that costs its sender 64 MiB."""
    leaf = torch.full((LEAF_NUMEL,), fill)
    return [leaf[:] for _ in range(LEAVES)]


def hold_in_the_middle(rank: Rank, backend: str) -> None:
    """Make this rank tell the test once its third leaf is under way, and wait there for what the test does to it."""
    met = {"count": 0}

    def pause() -> None:
        met["count"] += 1
        if met["count"] == 3:
            rank.tell("middle")
            rank.wait_for("go on", 90)

    if backend == "auto" and rank.is_baseline:
        write_piece = shared_memory._write_piece

        def write_slowly(*arguments: Any) -> None:
            if arguments[1].piece.spec.nbytes > MIB:
                pause()
            write_piece(*arguments)

        shared_memory._write_piece = write_slowly
    elif backend == "auto":
        # The receiver over shared memory does nothing while the sender writes: its middle is the sender's.
        return
    elif rank.is_baseline:
        chunks_of = gloo.chunks_of

        def chunks_slowly(tensor: torch.Tensor) -> Any:
            if tensor.numel() == LEAF_NUMEL:
                pause()
            return chunks_of(tensor)

        gloo.chunks_of = chunks_slowly
    else:
        chunk_sizes = gloo.chunk_sizes

        def sizes_slowly(shape: Any, itemsize: int) -> Any:
            if tuple(shape) == (LEAF_NUMEL,):
                pause()
            return chunk_sizes(shape, itemsize)

        gloo.chunk_sizes = sizes_slowly


def graft_gigabyte(rank: Rank) -> list[float]:
    """What lies in the target's leaves after the point has failed or gone through."""
    backend, holder = rank.arguments
    grafter.dump("first", torch.ones(1))
    if rank.role == holder:
        hold_in_the_middle(rank, backend)
    tree = gigabyte(1.0 if rank.is_baseline else 2.0)
    own = [tree[0]] if rank.is_baseline else [torch.full((LEAF_NUMEL,), 2.0) for _ in range(2)]
    if not rank.is_baseline:
        tree = own + tree[2:]
    error = None
    try:
        grafter.dump("gigabyte", tree)
    except grafter.GrafterError as caught:
        error = caught
    values = sorted({float(v) for leaf in own for v in (leaf.min(), leaf.max())})
    if error is not None:
        raise type(error)(f"{error} || values {values}")
    return values


def strike(directory: Path, backend: str, victim: str, number: int, **settings: Any) -> tuple[Jobs, Any]:
    """Run the pair until the middle of the transfer, send `victim` a signal there; (jobs, survivor's result)."""
    # Over shared memory only the sender works during the transfer; the receiver is struck while it waits for it.
    holder = "baseline" if backend == "auto" else victim
    jobs = Jobs(directory, backend=backend, stats="off", b2t_filter="True", signals=("middle", "go on"), **settings)
    with jobs:
        jobs.start("baseline", 1, graft_gigabyte, backend, holder)
        jobs.start("target", 1, graft_gigabyte, backend, holder)
        assert jobs.signals["middle"].wait(250)
        jobs.kill(victim, 0, number)
        struck = time.monotonic()
        if holder != victim:
            jobs.signals["go on"].set()
        survivor = jobs.wait_for_one("target" if victim == "baseline" else "baseline", 0)
        assert time.monotonic() - struck < SOON
    return jobs, survivor


@BACKENDS
@pytest.mark.parametrize("victim", ["baseline", "target"], ids=["the sender", "the receiver"])
def test_a_process_killed_in_the_middle_of_a_gigabyte_is_named_and_nothing_is_written(
    tmp_path: Path, backend: str, victim: str
) -> None:
    _, survivor = strike(tmp_path, backend, victim, signal.SIGKILL, timeout=FAR)
    assert survivor.error_kind == "PeerLostError"
    assert f"{victim} rank 0" in survivor.error
    if victim == "baseline":
        assert "values [2.0]" in survivor.error


@BACKENDS
@pytest.mark.parametrize("victim", ["baseline", "target"], ids=["the sender", "the receiver"])
def test_a_process_stopped_in_the_middle_fails_the_point_at_the_timeout_and_is_named(
    tmp_path: Path, backend: str, victim: str
) -> None:
    if backend == "auto" and victim == "target":
        pytest.skip("over shared memory a sender needs nothing of a receiver whose memory it has mapped")
    _, survivor = strike(tmp_path, backend, victim, signal.SIGSTOP, timeout=4)
    assert survivor.error_kind == "PointTimeoutError"
    assert f"{victim} rank 0" in survivor.error
    assert "is stopped (SIGSTOP" in survivor.error
    if victim == "baseline":
        assert "values [2.0]" in survivor.error


# One long copy over shared memory, of which the other end dies in the middle.

CHUNKS = 40


def copy_slowly(rank: Rank, count: list[int]) -> None:
    """Cut this rank's copies into chunks of 1 MiB, and wait in the third for what the test does to one of the ranks."""
    copy_chunk = copying._copy_chunk

    def copy_and_count(into: torch.Tensor, value: torch.Tensor) -> None:
        count[0] += 1
        if count[0] == 3:
            rank.tell("middle")
            rank.wait_for("go on", 90)
        copy_chunk(into, value)

    copying.CHUNK_BYTES = MIB  # type: ignore[misc]
    copying._copy_chunk = copy_and_count


def graft_one_long_tensor(rank: Rank) -> None:
    (is_strided,) = rank.arguments
    grafter.dump("first", torch.ones(1))
    count = [0]
    value = torch.full((CHUNKS, MIB // 4), 1.0 if rank.is_baseline else 2.0)
    if is_strided:
        value = torch.full((CHUNKS, MIB // 2), 1.0 if rank.is_baseline else 2.0)[:, ::2]
    if rank.is_baseline:
        copy_slowly(rank, count)
    try:
        grafter.dump("long", value)
    except grafter.GrafterError as error:
        raise type(error)(f"{error} || chunks {count[0]} values {value.unique().tolist()}") from None


@pytest.mark.parametrize("is_strided", [False, True], ids=["contiguous", "strided"])
@pytest.mark.parametrize("victim", ["baseline", "target"], ids=["the sender", "the receiver"])
def test_a_rank_killed_in_the_middle_of_one_long_copy_is_reported_before_the_next_chunk(
    tmp_path: Path, victim: str, is_strided: bool
) -> None:
    """A chunk takes at most some 10 ms. The receiver, which only waits, learns it from the closed channel."""
    with Jobs(tmp_path, stats="off", b2t_filter="True", timeout=FAR, signals=("middle", "go on")) as jobs:
        jobs.start("baseline", 1, graft_one_long_tensor, is_strided)
        jobs.start("target", 1, graft_one_long_tensor, is_strided)
        assert jobs.signals["middle"].wait(60)
        jobs.kill(victim, 0)
        jobs.jobs[victim].processes[0].join(30)
        if victim == "target":
            jobs.signals["go on"].set()
        survivor = jobs.wait_for_one("target" if victim == "baseline" else "baseline", 0)
    assert survivor.error_kind == "PeerLostError"
    assert f"{victim} rank 0 (pid " in survivor.error
    # The third was under way.
    assert f"chunks {0 if victim == 'baseline' else 3} " in survivor.error
    assert survivor.seconds < SOON
    if victim == "baseline":
        assert "values [2.0]" in survivor.error


# The program's own signal handlers.


class OwnError(RuntimeError):
    """What a handler of the program raises: of a kind that torch raises, too."""


def graft_with_an_alarm(rank: Rank) -> list[Any]:
    """The sender's handler raises in the middle of its copy; the program catches that, and goes on."""
    caught: list[Any] = []

    def handle(number: int, frame: Any) -> None:
        raise OwnError("mine")

    signal.signal(signal.SIGUSR1, handle)
    copy_chunk = copying._copy_chunk
    if rank.is_baseline:

        def copy_and_strike(into: torch.Tensor, value: torch.Tensor) -> None:
            if not caught:
                os.kill(os.getpid(), signal.SIGUSR1)
            copy_chunk(into, value)

        copying._copy_chunk = copy_and_strike
    for number in range(2):
        value = torch.full((5,), 1.0 if rank.is_baseline else 2.0)
        try:
            grafter.dump("h", value, number=number)
        except OwnError as error:
            caught.append(str(error))
        caught.append(value.tolist())
    return caught


def test_an_exception_of_a_senders_signal_handler_is_its_own_and_the_receivers_are_told(tmp_path: Path) -> None:
    """The point fails at the receivers, which would otherwise wait, and the next one is grafted."""
    with Jobs(tmp_path, b2t_filter="True", timeout=FAR, stats="off") as jobs:
        jobs.start("baseline", 1, graft_with_an_alarm)
        jobs.start("target", 2, graft_with_an_alarm)
        baseline, *targets = succeed(jobs.wait())
        ledgers = jobs.ledgers()
    assert baseline == ["mine", [1.0] * 5, [1.0] * 5]
    assert targets == [[[2.0] * 5, [1.0] * 5]] * 2
    for rank in range(2):
        records = ledgers["target", rank]
        assert [record.outcome for record in records] == ["failed", "grafted"]
        assert "baseline rank 0 left the point with OwnError" in records[0].reason


def graft_by_two(rank: Rank) -> list[float]:
    """2 to 2; baseline rank 1 is held in the middle of its second point."""
    grafter.dump("first", torch.ones(1))
    if rank.is_baseline and rank.role_rank == 1:
        write_piece = shared_memory._write_piece

        def write_never(*arguments: Any) -> None:
            rank.tell("middle")
            rank.wait_for("go on", 90)
            write_piece(*arguments)

        shared_memory._write_piece = write_never
    value = torch.full((1000,), 1.0 if rank.is_baseline else 2.0)
    try:
        # A receiver may hear first that the other one has given the second point up, which then has failed.
        grafter.dump("second", value)
        grafter.dump("third", value)
    except grafter.GrafterError as error:
        raise type(error)(f"{error} || values {sorted(set(value.tolist()))}") from None
    return sorted(set(value.tolist()))


def test_third_ranks_get_the_same_error_and_none_has_written(tmp_path: Path) -> None:
    """Target 0 has all its bytes when the sender of target 1 dies: it does not write, and all name the dead one."""
    with Jobs(tmp_path, b2t_filter="True", timeout=FAR, signals=("middle", "go on")) as jobs:
        jobs.start("baseline", 2, graft_by_two)
        jobs.start("target", 2, graft_by_two)
        assert jobs.signals["middle"].wait(250)
        jobs.kill("baseline", 1)
        killed = time.monotonic()
        results = jobs.wait()
        assert time.monotonic() - killed < SOON
    survivors = [results[0], results[2], results[3]]
    assert [r.error_kind for r in survivors] == ["PeerLostError"] * 3
    assert all("baseline rank 1" in r.error for r in survivors)
    assert [r.error.endswith("values [2.0]") for r in survivors[1:]] == [True, True]
    assert len({r.error.split(" || ")[0] for r in survivors}) == 1


# A receiver without memory, a sender that cannot write: the point fails everywhere, and the run goes on.


def take_memory_away(rank: Rank, who: tuple[str, int]) -> None:
    if (rank.role, rank.role_rank) == who:
        staging._available_bytes = lambda: MIB


def graft_without_memory(rank: Rank) -> list[list[float]]:
    """The values after each of five points: 4 MiB (refused), 4 KiB, 4 MiB with memory again, and so on."""
    (who,) = rank.arguments
    values = []
    honest = staging._available_bytes
    for number, numel in enumerate([MIB, 1024, MIB, 1 << 21, 16]):
        if number in (0, 3):
            take_memory_away(rank, who)
        else:
            staging._available_bytes = honest
        value = torch.full((numel,), 1.0 if rank.is_baseline else 2.0)
        transform = add_all if rank.role_rank >= 0 and not rank.is_baseline else None
        grafter.dump("h", value, number=number, transform=transform)
        values.append(sorted(set(value.tolist())))
    return values


def add_all(graft_input: Any) -> torch.Tensor:
    return torch.stack(graft_input.received_list).sum(0)


@BACKENDS
@pytest.mark.parametrize(
    ("ranks", "who"),
    [((1, 1), 0), ((1, 2), 0), ((1, 2), 1), ((2, 2), 0), ((2, 2), 1)],
    ids=["1 to 1", "1 to 2, the first", "1 to 2, the second", "2 to 2, the first", "2 to 2, the second"],
)
def test_a_receiver_without_memory_fails_the_point_everywhere_and_the_run_goes_on(
    tmp_path: Path, backend: str, ranks: tuple[int, int], who: int
) -> None:
    """All ranks say why in their ledgers; the next points graft, over a new gloo group where that is the way."""
    with Jobs(tmp_path, backend=backend, b2t_filter="True", timeout=FAR, stats="off") as jobs:
        jobs.start("baseline", ranks[0], graft_without_memory, ("target", who))
        jobs.start("target", ranks[1], graft_without_memory, ("target", who))
        results = jobs.wait()
        values = succeed(results)
        ledgers = jobs.ledgers()
    all_added = [float(ranks[0])]
    assert values[ranks[0] :] == [[[2.0], all_added, all_added, [2.0], all_added]] * ranks[1]
    for (role, _), records in ledgers.items():
        done = "sent" if role == "baseline" else "grafted"
        assert [r.outcome for r in records] == ["failed", done, done, "failed", done], role
        for record in (records[0], records[3]):
            assert f"target rank {who} has no memory to receive into" in record.reason
    assert max(r.seconds for r in results) < SOON


def limit_memory(rank: Rank) -> list[list[float]]:
    """Sender `rank.arguments[0]` may map no more than it has at the points 1 and 2, of which 1 needs a new block."""
    values = []
    is_limited = rank.is_baseline and rank.role_rank == rank.arguments[0]
    unlimited = resource.getrlimit(resource.RLIMIT_AS)
    for number, numel in enumerate([1024, 6 * MIB, 6 * MIB, 6 * MIB, 1024]):
        value = torch.full((numel,), 1.0 if rank.is_baseline else 2.0)
        if is_limited and number in (1, 2):
            pages = int(Path("/proc/self/statm").read_text().split()[0])
            limit = pages * resource.getpagesize() + 8 * MIB
            resource.setrlimit(resource.RLIMIT_AS, (limit, unlimited[1]))
        transform = None if rank.is_baseline else add_all
        grafter.dump("h", value, number=number, transform=transform)
        resource.setrlimit(resource.RLIMIT_AS, unlimited)
        values.append(value.unique().tolist())
    return values


@pytest.mark.parametrize("ranks", [(1, 1), (2, 2)], ids=["1 to 1", "2 to 2"])
def test_a_sender_that_cannot_map_the_receivers_memory_fails_the_point_everywhere_and_the_run_goes_on(
    tmp_path: Path, ranks: tuple[int, int]
) -> None:
    """A limit of address space (RLIMIT_AS): once it is raised, the same block is mapped after all."""
    with Jobs(tmp_path, b2t_filter="True", timeout=FAR, stats="off") as jobs:
        jobs.start("baseline", ranks[0], limit_memory, 0)
        jobs.start("target", ranks[1], limit_memory, 0)
        values = succeed(jobs.wait())
        ledgers = jobs.ledgers()
    grafted = [float(ranks[0])]
    assert values[ranks[0] :] == [[grafted, [2.0], [2.0], grafted, grafted]] * ranks[1]
    for (role, _), records in ledgers.items():
        done = "sent" if role == "baseline" else "grafted"
        assert [record.outcome for record in records] == [done, "failed", "failed", done, done], role
        for record in records[1:3]:
            assert "baseline rank 0 cannot map the " in record.reason
            assert "Cannot allocate memory" in record.reason


def fail_to_write(rank: Rank) -> list[list[float]]:
    """Sender `rank.arguments[0]` cannot read its tensor at the points 1 and 2."""
    number = 0
    if rank.is_baseline and rank.role_rank == rank.arguments[0]:
        write_piece = shared_memory._write_piece

        def write_or_fail(*arguments: Any) -> None:
            if number in (1, 2):
                raise RuntimeError("no memory on the device")
            write_piece(*arguments)

        shared_memory._write_piece = write_or_fail
    values = []
    for number in range(5):
        value = torch.full((1024 << (9 if number == 2 else 0),), 1.0 if rank.is_baseline else 3.0)
        grafter.dump("h", value, number=number, transform=None if rank.is_baseline else add_all)
        values.append(sorted(set(value.tolist())))
    return values


@pytest.mark.parametrize("who", [0, 1])
def test_a_sender_that_cannot_write_fails_the_point_everywhere_and_the_run_goes_on(tmp_path: Path, who: int) -> None:
    """2 to 2: what the other sender has written of the failed point is passed over by the next one."""
    with Jobs(tmp_path, b2t_filter="True", timeout=FAR, stats="off") as jobs:
        jobs.start("baseline", 2, fail_to_write, who)
        jobs.start("target", 2, fail_to_write, who)
        results = jobs.wait()
        values = succeed(results)
        ledgers = jobs.ledgers()
    assert values[2:] == [[[2.0], [3.0], [3.0], [2.0], [2.0]]] * 2
    for rank in range(2):
        records = ledgers["target", rank]
        assert [r.outcome for r in records] == ["grafted", "failed", "failed", "grafted", "grafted"]
        assert f"baseline rank {who} cannot write its tensor: no memory on the device" in records[1].reason
    assert [r.outcome for r in ledgers["baseline", who]] == ["sent", "failed", "failed", "sent", "sent"]
    assert max(r.seconds for r in results) < SOON
