"""All receivers write or none does, where one is stopped, interrupted or killed: in its transform, right before and
after its vote, and before and inside of its write."""

from __future__ import annotations

import contextlib
import os
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from jobs import Jobs, Rank, Result, succeed

import grafter
from tests.wire.pairing.test_agreement import by_store, wait_until_heard

FAR, SHORT = 100.0, 4.0
PHASES = ["transform", "before vote", "after vote", "before write", "inside write"]
NEW, OLD = [3.0, 3.0], [7.0, 7.0]


def first_of(graft_input: Any) -> torch.Tensor:
    return graft_input.received_list[0]


@contextlib.contextmanager
def at(phase: str, act: Callable[[], None]) -> Iterator[Callable[[Any], torch.Tensor]]:
    """Inside, this process does `act` once, at that place of its next point; yields the transform of the point."""
    from grafter.core.commit_protocol import YES
    from grafter.runtime.point_receiver import ReceivedPoint
    from grafter.wire.exchange.incoming import IncomingLeaf
    from grafter.wire.pairing.host_votes import HostVotes
    from grafter.wire.pairing.store_votes import StoreVotes

    leaves = 0

    def transform(graft_input: Any) -> torch.Tensor:
        if phase == "transform" and graft_input.path.endswith("['b']"):
            act()
        return first_of(graft_input)

    def around(owner: type, name: str, before: bool, is_meant: Callable[..., bool]) -> None:
        original = getattr(owner, name)

        def replaced(self: Any, *arguments: Any) -> Any:
            setattr(owner, name, original)
            if not is_meant(*arguments):
                setattr(owner, name, replaced)
                return original(self, *arguments)
            if before:
                act()
            result = original(self, *arguments)
            if not before:
                act()
            return result

        setattr(owner, name, replaced)
        undo.append((owner, name, original))

    def is_second(*_: Any) -> bool:
        nonlocal leaves
        leaves += 1
        return leaves == 2

    undo: list[tuple[type, str, Any]] = []
    if phase.endswith("vote"):
        for votes in (HostVotes, StoreVotes):
            around(votes, "append", phase == "before vote", lambda kind, reason: kind == YES)
    elif phase == "before write":
        around(ReceivedPoint, "write", True, lambda: True)
    elif phase == "inside write":
        around(IncomingLeaf, "write", True, is_second)
    try:
        yield transform
    finally:
        for owner, name, original in undo:
            setattr(owner, name, original)


def receive(rank: Rank, phase: str | None, number: int, name: str) -> tuple[list[list[float]], str | None]:
    """One point of two leaves: what it holds then, and the name of what was raised. phase: where the signal comes."""
    value = {"a": torch.full((2,), OLD[0]), "b": torch.full((2,), OLD[0])}
    raised = None
    with at(phase or "", lambda: os.kill(os.getpid(), number)) as transform:
        try:
            grafter.dump(name, value, transform=transform)
            # A signal of this rank's own arrives at once, that is, before the next line.
        except (KeyboardInterrupt, grafter.GrafterError) as error:
            raised = type(error).__name__
    return [value["a"].tolist(), value["b"].tolist()], raised


def send(name: str) -> None:
    grafter.dump(name, {"a": torch.full((2,), NEW[0]), "b": torch.full((2,), NEW[0])})


def wait_until_told(rank: Rank) -> None:
    """Until this receiver has told the senders of all that has failed."""
    failed = grafter._process.grafter.lifecycle.session.ledger._failed  # type: ignore[union-attr]
    deadline = time.monotonic() + 15
    while not failed.has_told_all and time.monotonic() < deadline:
        time.sleep(0.05)
    rank.tell("told")


def hear_all(rank: Rank) -> None:
    """Until this sender has heard of every failure that receivers have told."""
    rank.wait_for("told")
    session = grafter._process.grafter.lifecycle.session  # type: ignore[union-attr]
    failed, told = session.ledger._failed, 0
    while session.client.peek(failed._place(told)) is not None:
        told += 1
    deadline = time.monotonic() + 15
    while failed._heard < told and time.monotonic() < deadline:
        time.sleep(0.05)


def is_receiver(rank: Rank, receivers: str) -> bool:
    return rank.role == receivers


# Interrupted: the program catches it and goes on.


def be_interrupted(rank: Rank) -> list[Any]:
    carrier, receivers, which = rank.arguments
    by_store(Rank(rank.role, rank.role_rank, rank.world_size, rank.signals, (carrier,)))
    signal.signal(signal.SIGINT, signal.default_int_handler)
    found = []
    for phase in PHASES:
        if is_receiver(rank, receivers):
            found.append(receive(rank, phase if rank.role_rank == which else None, signal.SIGINT, phase))
        else:
            send(phase)
    if is_receiver(rank, receivers):
        found.append(receive(rank, None, 0, "last"))
        wait_until_told(rank)
    else:
        send("last")
        hear_all(rank)
    return found


@pytest.mark.parametrize(
    ("carrier", "receivers", "size", "which"),
    [
        ("mail", "target", 2, 0),
        ("mail", "target", 2, 1),
        ("mail", "target", 3, 0),
        ("mail", "target", 3, 2),
        ("mail", "baseline", 2, 0),
        ("store", "target", 2, 1),
        ("store", "target", 3, 0),
    ],
)
def test_a_receiver_that_is_interrupted_writes_as_all_others_do_and_raises_afterwards(
    tmp_path: Path, carrier: str, receivers: str, size: int, which: int
) -> None:
    """At each phase; and the next point grafts. Where the receivers are the baseline, its rank 0 hosts the store."""
    filters = {"b2t_filter": "True"} if receivers == "target" else {"t2b_filter": "True"}
    sender = "baseline" if receivers == "target" else "target"
    with Jobs(tmp_path, hosted=receivers == "target", timeout=FAR, signals=("told",), **filters) as jobs:
        for role in ("baseline", "target"):
            jobs.start(role, size if role == receivers else 1, be_interrupted, carrier, receivers, which)
        values = succeed(jobs.wait())
        ledgers = jobs.ledgers()
    found = values[:-1] if receivers == "baseline" else values[1:]
    for number, phase in enumerate(PHASES):
        held = [one[number][0] for one in found]
        assert held in ([[NEW] * 2] * size, [[OLD] * 2] * size), (phase, held)
        assert [one[number][1] for one in found] == ["KeyboardInterrupt" if r == which else None for r in range(size)]
        is_written = held[0][0] == NEW
        assert is_written or not phase.endswith("write")
        assert not is_written or phase not in ("transform", "before vote")
        outcomes = [ledgers[receivers, rank][number].outcome for rank in range(size)]
        assert outcomes == ["grafted" if is_written else "failed"] * size, phase
        reasons = {ledgers[receivers, rank][number].reason for rank in range(size)}
        assert reasons == {None if is_written else f"{receivers} rank {which} left with KeyboardInterrupt"}
        assert ledgers[sender, 0][number].outcome == ("sent" if is_written else "failed")
    assert [one[-1] for one in found] == [([NEW, NEW], None)] * size


def is_written_by(held: list[list[list[float]]], phase: str) -> bool:
    """Whether the first has written. Behind the vote both are right: its yes stands in the log, so that the others may
    commit, and one of them may give up before the last has voted."""
    if phase == "after vote":
        return held[0][0] == NEW
    return phase.endswith("write")


# Killed: the run is over, and those who live have all written or not.


def be_killed(rank: Rank) -> Any:
    carrier, which, phase = rank.arguments
    by_store(Rank(rank.role, rank.role_rank, rank.world_size, rank.signals, (carrier,)))
    if rank.is_baseline:
        send("h")
        wait_until_heard(rank, 3)
        return None
    return receive(rank, phase if rank.role_rank == which else None, signal.SIGKILL, "h")


@pytest.mark.parametrize("phase", PHASES)
@pytest.mark.parametrize(
    ("carrier", "size", "which"), [("mail", 2, 0), ("mail", 3, 0), ("mail", 3, 1), ("store", 3, 2)]
)
def test_where_a_receiver_is_killed_the_others_agree(
    tmp_path: Path, carrier: str, size: int, which: int, phase: str
) -> None:
    with Jobs(tmp_path, b2t_filter="True", timeout=FAR) as jobs:
        jobs.start("baseline", 1, be_killed, carrier, which, phase)
        jobs.start("target", size, be_killed, carrier, which, phase)
        _, *targets = jobs.wait()
        ledgers = jobs.ledgers()
    assert targets[which] == Result()
    others = [rank for rank in range(size) if rank != which]
    held = [targets[rank].value[0] for rank in others]
    is_written = is_written_by(held, phase)
    assert held == [[NEW if is_written else OLD] * 2] * len(others)
    for rank in others:
        assert [line.outcome for line in ledgers["target", rank]] == ["grafted" if is_written else "failed"]


# Stopped past the timeout, and resumed.


def be_stopped(rank: Rank) -> Any:
    receivers, which, phase = rank.arguments
    if is_receiver(rank, receivers):
        found = receive(rank, phase if rank.role_rank == which else None, signal.SIGSTOP, "h")
        if rank.role_rank != which:
            rank.tell(f"over {rank.role_rank}")
        return found
    with contextlib.suppress(grafter.GrafterError):
        send("h")
    rank.wait_for("resumed")
    wait_until_heard(rank, 15 if phase in ("transform", "before vote") else 3)
    return None


def wait_until_stopped(pid: int) -> None:
    deadline = time.monotonic() + 60
    while Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "T":
        assert time.monotonic() < deadline, "it never stopped"
        time.sleep(0.02)


@pytest.mark.parametrize("phase", PHASES)
@pytest.mark.parametrize(
    ("receivers", "size", "which"),
    [("target", 2, 0), ("target", 3, 0), ("target", 3, 1), ("baseline", 3, 0)],
    ids=["the first of two", "the first of three", "the second of three", "the store's host, of three"],
)
def test_a_receiver_that_is_stopped_past_the_timeout_and_resumed_does_what_the_others_did(
    tmp_path: Path, receivers: str, size: int, which: int, phase: str
) -> None:
    """In its transform, or before its vote: nobody writes, and all ledgers say so, also the sender's."""
    filters = {"b2t_filter": "True"} if receivers == "target" else {"t2b_filter": "True"}
    others = [rank for rank in range(size) if rank != which]
    signals = ("resumed", *(f"over {rank}" for rank in others))
    with Jobs(tmp_path, hosted=receivers == "target", timeout=SHORT, signals=signals, **filters) as jobs:
        for role in ("baseline", "target"):
            jobs.start(role, size if role == receivers else 1, be_stopped, receivers, which, phase)
        wait_until_stopped(jobs.pid(receivers, which))
        for rank in others:
            assert jobs.signals[f"over {rank}"].wait(60), f"rank {rank} hangs"
        jobs.kill(receivers, which, signal.SIGCONT)
        jobs.signals["resumed"].set()
        results = jobs.wait()
        ledgers = jobs.ledgers()
    found = [r.value[0] for r in (results[:-1] if receivers == "baseline" else results[1:])]
    is_written = is_written_by(found, phase)
    assert found == [[NEW if is_written else OLD] * 2] * size
    for rank in range(size):
        outcomes = [line.outcome for line in ledgers[receivers, rank]]
        assert outcomes == ["grafted" if is_written else "failed"], (rank, results)
    sender = "baseline" if receivers == "target" else "target"
    if receivers == "target":
        assert [line.outcome for line in ledgers[sender, 0]] == ["sent" if is_written else "failed"]
