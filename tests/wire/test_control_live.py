"""Filters and dumps of a run changed while it runs: at one step on every rank of both jobs, or nowhere.

Costs about 8 s of one core. Ranks stop where the test wants them, so that each change's step is known.
"""

from __future__ import annotations

import json
import os
import signal
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from jobs import _CONTEXT, Jobs, Rank, succeed
from request_files import lines_in, wait_until
from typer.testing import CliRunner, Result

import grafter
from grafter.analysis.run.run_summary import read_run_summary
from grafter.cli.main import app
from grafter.config.control.change import Change, ChangeDecision, Proposal, proposal_place
from grafter.core.messages.wire import Seal
from grafter.core.records import LedgerRecord
from grafter.errors import ProtocolError
from grafter.store.dumps.record import DumpRecord
from grafter.store.run_files import read_history
from grafter.wire.control import RankView, RunAccess, read_decision
from grafter.wire.monitor import monitor_thread, wait_monitor
from grafter.wire.store_client import StoreClient
from grafter.wire.store_server import connect

FAR = 250.0
SECRET = "a secret"
RANKS = (("baseline", 0), ("baseline", 1), ("target", 0), ("target", 1))
# Where each rank stands at the first pause: far apart.
FIRST_PAUSE = {("baseline", 0): 5, ("baseline", 1): 6, ("target", 0): 0, ("target", 1): 1}
PAUSES = (9, 12, 14)


def look_often() -> None:
    """A second is long for a test."""
    monitor_thread._CHORES_EVERY_SECONDS = monitor_thread._TICK_SECONDS = wait_monitor._SHOWN_AFTER_SECONDS = 0.02


def run_to_pauses(rank: Rank) -> int:
    look_often()
    me = rank.role, rank.role_rank
    pauses = (FIRST_PAUSE[me], *PAUSES)
    step = 0
    while step < 17 or not rank.signals["stop"].is_set():
        grafter.dump("a", torch.full((2,), float(rank.is_baseline)))
        grafter.dump("b", torch.ones(2), layer_id=step % 2)
        if step == 12 and me == ("target", 1):
            # As the compiler does it where it comes to this point.
            active = grafter._calls._active()
            assert active.trace("b", {}).kind == "nothing"
        if step in pauses:
            rank.tell(f"{rank.role} {rank.role_rank} at {pauses.index(step)}")
            rank.wait_for(f"go {pauses.index(step)}")
        grafter.step()
        step += 1
        if step > 16:
            time.sleep(0.005)
    return step


class Run:
    """The run of the tests below, and `grafter ctl` for it."""

    def __init__(self, jobs: Jobs) -> None:
        self.jobs = jobs

    def await_pause(self, number: int) -> None:
        for role, rank in RANKS:
            assert self.jobs.signals[f"{role} {rank} at {number}"].wait(FAR)

    def ctl(self, *arguments: str, secret: str = SECRET) -> Result:
        return CliRunner().invoke(
            app, ["ctl", "--master", f"127.0.0.1:{self.jobs.port}", *arguments], env={"GRAFTER_SECRET": secret}
        )


def test_changes_hold_from_one_step_on_every_rank_or_nowhere(tmp_path: Path) -> None:
    """Ranks far apart; filters set, refused by all and by one, steps dumped, off and on; a forged change; the notes."""
    names = [f"{role} {rank} at {n}" for role, rank in RANKS for n in range(4)] + [f"go {n}" for n in range(4)]
    settings: dict[str, Any] = {"compare_filter": "name == 'none'", "secret": SECRET, "timeout": FAR}
    with Jobs(tmp_path, signals=(*names, "stop"), **settings) as jobs:
        for role in ("baseline", "target"):
            jobs.start(role, 2, run_to_pauses)
        run = Run(jobs)
        run.await_pause(0)
        until_joined(jobs.port)

        change_what_is_to_come(run)
        jobs.signals["go 0"].set()
        run.await_pause(1)
        refuse_what_no_rank_can_take(run)
        jobs.signals["go 1"].set()
        run.await_pause(2)
        refuse_what_one_rank_cannot_take(run)
        jobs.signals["go 2"].set()
        run.await_pause(3)
        switch_on_and_off_again(run)
        jobs.signals["stop"].set()
        succeed(jobs.wait())
        off_at = {line.step for line in read_history(tmp_path / "run")["target"]}

    last = max(off_at)
    compared = [*range(7, 13), *range(15, last)]
    for ledger in jobs.ledgers().values():
        assert [(record.name, record.step) for record in ledger] == [("a", step) for step in compared]
    # Measured until the change of step 10, and not from then on.
    measured = {record.step: record.difference is not None for record in jobs.ledgers()["target", 0]}
    assert all(measured[step] is (step < 10) for step in compared if step < 15)
    for role, rank in RANKS:
        assert dumped_steps(tmp_path, role, rank) == [("a", 10), ("b", 10), ("a", 11), ("b", 11)]
    notes = read_run_summary(tmp_path / "run").notes
    assert notes[0].startswith(
        "changed while it ran, from step 7 on (grafter ctl set --compare \"name == 'a'\"): compare: name == 'a'"
    )
    assert [(line.number, line.step) for line in read_history(tmp_path / "run")["baseline"]][:3] == [
        (0, 7),
        (4, 10),
        (5, 10),
    ]


def change_what_is_to_come(run: Run) -> None:
    wrong = run.ctl("status", secret="another")
    assert wrong.exit_code == 1
    assert "signed with another secret" in wrong.stderr
    forge_proposal(run.jobs.port)

    agreed = run.ctl("set", "--compare", "name == 'a'", "--wait", "0")
    assert "change 0 is agreed, for step 7" in agreed.stdout, agreed.output
    assert agreed.exit_code == 1, "nobody has come to step 7 yet"
    assert "0 of 4 have reached it. no rank has ended a step since" in agreed.stdout
    status = run.ctl("status")
    assert "target rank 1" in status.stdout
    assert "in force on all ranks that answer: compare: name == 'none'; stats: full" in status.stdout
    assert "to come in step 7" in status.stdout

    assert "give a shorter --hold" in run.ctl("off", "--hold", str(FAR)).stderr


def refuse_what_no_rank_can_take(run: Run) -> None:
    bad = run.ctl("set", "--b2t", "name = 'b'")
    assert bad.exit_code == 1
    assert "baseline rank 0, baseline rank 1, target rank 0, target rank 1: b2t_filter: a single `=`" in bad.stderr
    same = run.ctl("set", "--b2t", "name == 'a'", "--hold", "5")
    assert "b2t and compare have the same filter" in same.stderr
    assert "change 4 is agreed, for step 10" in run.ctl("dump-next", "2", "--wait", "0").stdout
    assert "change 5 is agreed, for step 10" in run.ctl("set", "--stats", "off", "--wait", "0").stdout


def refuse_what_one_rank_cannot_take(run: Run) -> None:
    one = run.ctl("set", "--b2t", "name == 'b'", "--wait", "0")
    assert one.exit_code == 1
    assert "change 6 is refused: target rank 1: the points b are in compiled code" in one.stderr
    assert "for step 13" in run.ctl("off", "--wait", "0").stdout
    assert "are off; call `grafter ctl on` first" in run.ctl("dump-next", "1").stderr


def switch_on_and_off_again(run: Run) -> None:
    assert "for step 15" in run.ctl("on", "--wait", "0").stdout
    # Also in step 15, and after it: what is said last counts.
    assert "for step 15" in run.ctl("set", "--stats", "light", "--wait", "0").stdout
    run.jobs.signals["go 3"].set()
    done = run.ctl("off", "--wait", str(FAR))
    assert done.exit_code == 0, done.output
    assert "on all 4 ranks" in done.stdout


def until_joined(port: int) -> None:
    deadline = time.monotonic() + FAR
    while True:
        try:
            RunAccess("127.0.0.1", port, secret=SECRET)
        except grafter.GrafterError:
            assert time.monotonic() < deadline
            time.sleep(0.05)
        else:
            return


def forge_proposal(port: int) -> None:
    """What somebody without the secret can do: nothing. The next change takes the forged one's place."""
    access = RunAccess("127.0.0.1", port, secret=SECRET)
    client = StoreClient(connect("127.0.0.1", port, timeout=3, keep_trying=lambda: True), Seal("ctl", None), "graft")
    client.seal.run_id = access._client.seal.run_id
    proposal = Proposal(change=Change(action="off"), seconds=5, by="somebody", time=0)
    client.set(proposal_place(client.run_prefix, 0), "proposal", proposal.model_dump_json())
    assert access._client.peek(proposal_place(client.run_prefix, 0)) is None
    assert access._client.seal.ignored.count == 1


def until_decided(access: RunAccess, number: int) -> ChangeDecision:
    deadline = time.monotonic() + FAR
    while (decision := read_decision(access._client, number)) is None:
        assert time.monotonic() < deadline
        time.sleep(0.02)
    return decision


def dumped_steps(directory: Path, role: str, rank: int) -> list[tuple[str, int]]:
    lines = (directory / "run" / role / f"rank{rank}.dumps.jsonl").read_text().splitlines()
    records = [DumpRecord.model_validate_json(line) for line in lines]
    assert all(record.file is not None for record in records)
    return [(record.name, record.step) for record in records]


def step_until_stopped(rank: Rank) -> int:
    look_often()
    while not rank.signals["stop"].is_set():
        grafter.dump("h", torch.ones(1))
        grafter.step()
        time.sleep(0.002)
    return grafter._calls._active().control._number


def propose_and_die(port: int, seconds: float) -> None:
    """`grafter ctl`, killed before it knows what came of its change."""
    access = RunAccess("127.0.0.1", port)
    access._await_decision = lambda *_: os.kill(os.getpid(), signal.SIGKILL)  # type: ignore[assignment,method-assign]
    access.change(Change(action="off"), seconds=seconds)


def kill_in_the_middle(port: int, seconds: float) -> None:
    process = _CONTEXT.Process(target=propose_and_die, args=(port, seconds))
    process.start()
    process.join(FAR)
    assert process.exitcode == -signal.SIGKILL


def test_a_killed_ctl_and_a_stopped_rank_hold_nobody_for_long(tmp_path: Path) -> None:
    """Killed in the middle, a change is decided all the same; a rank that cannot answer has it refused as a whole, and
    one that answers late is waited for, at the end of a step, which the board explains."""
    with Jobs(tmp_path, signals=("stop",), compare_filter="name == 'none'", timeout=2 * FAR) as jobs:
        jobs.start("baseline", 1, step_until_stopped)
        jobs.start("target", 1, step_until_stopped)
        with pytest.raises(grafter.GrafterError, match="no run of the group 'other'"):
            RunAccess("127.0.0.1", jobs.port, group_name="other")
        access = until_access(jobs.port)

        kill_in_the_middle(jobs.port, FAR)
        assert until_decided(access, 0).step is not None
        views = access.await_effect(0, FAR)
        assert all(view.state is not None and view.state.in_force.is_off for view in views)

        jobs.kill("target", 0, signal.SIGSTOP)
        kill_in_the_middle(jobs.port, 0.3)
        decision = until_decided(access, 1)
        assert decision.refused is not None
        assert decision.refused.startswith("no answer from target rank 0 within 0 s")

        changed: list[Any] = []
        late = threading.Thread(target=lambda: changed.append(until_access(jobs.port).change(ON, seconds=FAR)))
        late.start()
        deadline = time.monotonic() + FAR
        while "waits for the decision on change 2 of the run (on), at the end of step" not in doing(access)[0]:
            assert time.monotonic() < deadline
            time.sleep(0.02)
        jobs.kill("target", 0, signal.SIGCONT)
        late.join(FAR)
        assert changed[0].decision.step is not None
        views = access.await_effect(2, FAR)
        assert all(view.state is not None and not view.state.in_force.is_off for view in views)
        jobs.signals["stop"].set()
        assert succeed(jobs.wait()) == [3, 3]
    with pytest.raises(ProtocolError, match="no secret"):
        Seal("ctl", None).open("k", Seal("baseline/0", "x").seal("k", "run", "").encode())


def serve_and_step(rank: Rank) -> None:
    """A conversation that grows by one row a step; one job also has a recorder of requests, once it is told to."""
    look_often()
    recorder, step = None, 0
    while not rank.signals["stop"].is_set():
        if recorder is None and not rank.is_baseline and rank.signals["make a recorder"].is_set():
            recorder = grafter.RequestRecorder(rank.arguments[0])
        tokens = grafter.Tokens.from_lengths(["conversation"], [8 + step])
        grafter.dump("h", torch.ones(8 + step, 2), dims="t h", tokens=tokens)
        if recorder is not None:
            recorder.record(str(step), {"text": "x", "logits": [1]})
            recorder.finish(str(step), "y")
        grafter.step()
        step += 1
        time.sleep(0.002)
    if recorder is not None:
        recorder.close()


def step_of(result: Result) -> int:
    assert result.exit_code == 0, result.output
    return int(result.stdout.partition("for step ")[2].split()[0])


def test_windows_dumps_and_recorders_change_at_one_step_in_both_jobs(tmp_path: Path) -> None:
    """And are refused as a whole: a start that is none, a change of recorders where nobody has one."""
    recorded, names = tmp_path / "requests", ("stop", "make a recorder")
    settings: dict[str, Any] = {"compare_filter": "name == 'h'", "secret": SECRET, "timeout": FAR}
    with Jobs(tmp_path, signals=names, **settings) as jobs:
        for role in ("baseline", "target"):
            jobs.start(role, 1, serve_and_step, recorded)
        run = Run(jobs)
        until_joined(jobs.port)

        bad = run.ctl("set", "--start", "-1", "--stats", "off")
        assert bad.exit_code == 1
        assert "is refused: baseline rank 0, target rank 0: these settings" in bad.stderr
        assert "start='-1': it must be at least 0" in bad.stderr
        start = step_of(run.ctl("set", "--start", "5", "--wait", str(FAR)))
        new = step_of(run.ctl("set", "--start", "", "--new-rows-only", "on", "--wait", str(FAR)))
        every = step_of(run.ctl("set", "--windows", "off", "--wait", str(FAR)))
        limits = ("--dump-level", "statistics", "--dump-max-points", "3")
        dumped = step_of(run.ctl("set", "--dump", "name == 'h'", *limits, "--wait", str(FAR)))
        assert "dump level: statistics; dump limits: points 3; stats: full; windows: off" in run.ctl("status").stdout

        nobody = run.ctl("record", "off")
        assert nobody.exit_code == 1
        assert "would change nothing on any rank: its process has no grafter.RequestRecorder" in nobody.stderr
        jobs.signals["make a recorder"].set()
        wait_until(lambda: "recorder of target rank 0: on, 1000 to a batch" in run.ctl("status").stdout)
        bare = step_of(run.ctl("record", "--exclude", "logits", "--wait", str(FAR)))
        off = run.ctl("record", "off", "--threshold", "7", "--wait", str(FAR))
        assert "recorder of target rank 0: off, 7 to a batch, without logits, into" in off.stdout, off.output
        assert "there is no recorder of requests in the process of baseline rank 0" in off.stdout
        on = step_of(run.ctl("record", "on", "--threshold", "0", "--wait", str(FAR)))
        assert counts(run)["recorded"] > 0
        dump = step_of(run.ctl("record", "dump-now", "--wait", str(FAR)))
        wait_until(lambda: set(range(on, dump)) <= {int(line["id"]) for line in lines_in(recorded)})
        # From here on nobody waits for the other.
        step_of(run.ctl("off", "--wait", str(FAR)))
        jobs.signals["stop"].set()
        succeed(jobs.wait())

    for ledger in jobs.ledgers().values():
        assert [matched(record) for record in ledger] == [
            8 + step if step < start or step >= every or step == new else 3 + step if step < new else 1
            for step in range(len(ledger))
        ]
    for role in ("baseline", "target"):
        assert dumped_levels(tmp_path, role) == [(dumped + n, "statistics") for n in range(3)]
    lines = {int(line["id"]): line for line in lines_in(recorded)}
    first = min(lines)
    assert [step for step in sorted(lines) if step < on] == list(range(first, step_of(off)))
    assert all(("logits" in line["request"]) is (step < bare) for step, line in lines.items())


def matched(record: LedgerRecord) -> int:
    assert record.tokens is not None
    return record.tokens.matched


def counts(run: Run) -> dict[str, int]:
    ranks = json.loads(run.ctl("status", "--json").stdout)["ranks"]
    found: dict[str, int] = ranks[1]["recorders"][0]["counts"]
    return found


def dumped_levels(directory: Path, role: str) -> list[tuple[int, str]]:
    lines = (directory / "run" / role / "rank0.dumps.jsonl").read_text().splitlines()
    records = [DumpRecord.model_validate_json(line) for line in lines]
    return [(record.step, record.level) for record in records]


ON = Change(action="on")


def doing(access: RunAccess) -> list[str]:
    views: list[RankView] = access.look(0)
    return [view.line.doing if view.line is not None else "" for view in views]


def until_access(port: int) -> RunAccess:
    deadline = time.monotonic() + FAR
    while True:
        try:
            return RunAccess("127.0.0.1", port)
        except grafter.GrafterError:
            assert time.monotonic() < deadline
            time.sleep(0.05)
