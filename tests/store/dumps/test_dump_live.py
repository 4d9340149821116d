"""Saved points where there are processes: live grafts, several ranks, signals, crashes and forks."""

from __future__ import annotations

import os
import signal
import sys
import time
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
from jobs import Jobs, Rank, Result, succeed, two_jobs
from safetensors.torch import load_file

import grafter
from grafter.store.dumps.record import DumpRecord

FAR = 1000.0
SOON = 250.0
GRAFTS = "name in ('in_place', 'returned', 'failed')"


def records_of(directory: Path, role: str, role_rank: int = 0) -> list[DumpRecord]:
    lines = (directory / "run" / role / f"rank{role_rank}.dumps.jsonl").read_text().splitlines()
    return [DumpRecord.model_validate_json(line) for line in lines]


def values_of(directory: Path, record: DumpRecord) -> dict[str, list[float]]:
    assert record.file is not None
    tensors = load_file(directory / "run" / record.role / record.file)
    return {name: tensor.tolist() for name, tensor in tensors.items()}


def _graft_and_save(rank: Rank) -> Any:
    mine = 1.0 if rank.is_baseline else 2.0
    grafter.dump("in_place", torch.full((2,), mine))
    grafter.dump("returned", torch.full((2,), mine), write="return")
    grafter.dump("failed", torch.full((2 if rank.is_baseline else 3,), mine))
    grafter.dump("compared", {"a": torch.full((2,), mine)})
    grafter.dump("alone", torch.full((2,), mine), extras={"f": print})
    grafter.dump("given", torch.full((2,), mine), save=True)
    grafter.dump("kept", torch.full((2,), mine), save=False)
    grafter.step()


@pytest.fixture(scope="module")
def live_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("live")
    with two_jobs(
        directory,
        _graft_and_save,
        _graft_and_save,
        b2t_filter=GRAFTS,
        compare_filter="name in ('compared', 'kept')",
        dump_filter="name != 'given'",
    ) as jobs:
        succeed(jobs.wait())
    return directory


def test_a_grafted_point_is_saved_as_it_was_and_as_it_went_on(live_run: Path) -> None:
    """In place and by return alike: `value` is the target's own, `grafted` what came; the sender has its value."""
    target = {record.name: record for record in records_of(live_run, "target")}
    for name, mode in (("in_place", "grafted"), ("returned", "grafted")):
        assert values_of(live_run, target[name]) == {"value": [2.0, 2.0], "grafted": [1.0, 1.0]}
        assert (target[name].direction, target[name].outcome) == ("b2t", mode)
    baseline = {record.name: record for record in records_of(live_run, "baseline")}
    assert values_of(live_run, baseline["in_place"]) == {"value": [1.0, 1.0]}
    assert (baseline["in_place"].direction, baseline["in_place"].outcome) == ("b2t", "sent")


def test_what_was_not_written_has_no_grafted_value(live_run: Path) -> None:
    """Of a failed graft and of a comparison there is the value alone, with the outcome."""
    target = {record.name: record for record in records_of(live_run, "target")}
    assert values_of(live_run, target["failed"]) == {"value": [2.0, 2.0, 2.0]}
    assert target["failed"].outcome == "failed"
    assert values_of(live_run, target["compared"]) == {"value['a']": [2.0, 2.0]}
    assert (target["compared"].direction, target["compared"].outcome) == ("compare", "compared")


def test_points_that_meet_nobody_are_saved_beside_those_that_do(live_run: Path) -> None:
    """In the program's order; `save=` decides for its call; extras that could not travel do not matter."""
    for role in ("baseline", "target"):
        records = records_of(live_run, role)
        assert [r.name for r in records] == ["in_place", "returned", "failed", "compared", "alone", "given"]
        assert [r.order for r in records] == list(range(6))
        assert (records[4].direction, records[4].outcome) == (None, None)
        assert "extras.f" in records[4].not_encoded


def _meet_once(rank: Rank) -> None:
    grafter.dump("in_place", torch.ones(2))


def test_a_live_run_refuses_the_name_of_an_earlier_one_before_it_writes(tmp_path: Path) -> None:
    """The rank whose dumps are there leaves at once with the reason, the other hears it, and the files stay."""
    directory = tmp_path / "run" / "target"
    directory.mkdir(parents=True)
    for name in ("rank0.dumps.jsonl", "run.json", "rank0.summary.json"):
        (directory / name).write_text("of the earlier run")
    with two_jobs(tmp_path, _meet_once, _meet_once, b2t_filter=GRAFTS) as jobs:
        baseline, target = jobs.wait()
    assert "two runs would mix" in str(target.error) and "two runs would mix" in str(baseline.error)
    assert {path.name: path.read_text() for path in directory.iterdir()} == dict.fromkeys(
        ("rank0.dumps.jsonl", "run.json", "rank0.summary.json"), "of the earlier run"
    )


def _save_alone(rank: Rank) -> tuple[int, int]:
    for _ in range(2):
        with grafter.context(layer_id=1):
            grafter.dump("h", torch.full((2,), float(rank.role_rank)), tp_rank=rank.role_rank)
        grafter.dump("first", torch.ones(1), tp_rank=rank.role_rank)
        grafter.step()
    # A forked child has no thread that writes: it goes on, and leaves what is the parent's alone.
    child = os.fork()
    if child == 0:
        signal.alarm(20)
        grafter.dump("h", torch.ones(2))
        grafter.step()
        grafter.close()
        os._exit(7)
    _, status = os.waitpid(child, 0)
    # Its own SIGTERM is none of ours either.
    ended = 0
    for _ in range(20):
        other = os.fork()
        if other == 0:
            time.sleep(20)
            os._exit(0)
        # Also one that has hardly begun.
        os.kill(other, signal.SIGTERM)
        ended += os.waitstatus_to_exitcode(os.waitpid(other, 0)[1])
    return os.waitstatus_to_exitcode(status), ended


def test_ranks_that_only_dump_need_neither_store_nor_each_other(tmp_path: Path) -> None:
    """Two ranks write into one run, each its own; a filter may choose ranks; forked children neither write nor hang."""
    filter_ = "name == 'h' or (name == 'first' and tp_rank == 0)"
    with Jobs(tmp_path, hosted=False, dump_filter=filter_, master_port=None) as jobs:
        jobs.start("target", 2, _save_alone)
        assert succeed(jobs.wait()) == [(7, -20 * signal.SIGTERM)] * 2
    for role_rank, expected in ((0, ["h", "first", "h", "first"]), (1, ["h", "h"])):
        records = records_of(tmp_path, "target", role_rank)
        assert [record.name for record in records] == expected
        assert [r.step for r in records if r.name == "h"] == [0, 1]
        assert all(r.role_world_size == 2 and r.participants == (0, 1) for r in records)
        assert values_of(tmp_path, records[0]) == {"value": [float(role_rank)] * 2}
        # The filter read a tag of the rank; the key did not.
        assert records[0].tags == {"layer_id": 1, "tp_rank": role_rank}
    assert {path.name for path in (tmp_path / "run" / "target").iterdir()} == {
        "rank0", "rank0.dumps.jsonl", "rank0.summary.json", "rank1", "rank1.dumps.jsonl", "rank1.summary.json",
        "run.json",
    }  # fmt: skip


def _raise_at_once(rank: Rank) -> None:
    for number in range(50):
        grafter.dump("h", torch.full((1000,), float(number)))
    raise ValueError("the program's own")


def _end_by_sigterm(rank: Rank) -> None:
    (handler,) = rank.arguments
    if handler:

        def own_handler(number: int, frame: object) -> None:
            rank.tell("handled")
            sys.exit(5)

        signal.signal(signal.SIGTERM, own_handler)
    for number in range(50):
        grafter.dump("h", torch.full((1000,), float(number)))
    if not handler:
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(30)
    with pytest.raises(SystemExit):
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(30)
    # Nothing of ours runs any more: the handler alone has brought everything to disk.
    os._exit(9)


def _wait_for_nobody(rank: Rank) -> None:
    grafter.dump("h", torch.full((3,), 4.0))
    if rank.is_baseline:
        grafter.dump("meets", torch.full((3,), 5.0))
    # As in a collective whose other ranks are gone.
    store = torch.distributed.TCPStore("127.0.0.1", 0, is_master=True, timeout=timedelta(seconds=50))
    store.get("never set")


def wait_for_lines(directory: Path, count: int, role: str = "baseline") -> Path:
    """Until a job has written so many records."""
    log, deadline = directory / "run" / role / "rank0.dumps.jsonl", time.monotonic() + 30
    while not log.exists() or log.read_text().count("\n") < count:
        assert time.monotonic() < deadline, f"the {role} wrote nothing"
        time.sleep(0.02)
    return log


def _end(jobs: Jobs, role: str) -> tuple[Result, int | None]:
    process = jobs.jobs[role].processes[0]
    (result,) = jobs.wait()
    process.join(10)
    return result, process.exitcode


def test_the_last_points_before_an_exception_are_on_disk(tmp_path: Path) -> None:
    """An exception that nobody catches costs nothing of what was dumped before it."""
    with Jobs(tmp_path, hosted=False, dump_filter="True") as jobs:
        jobs.start("baseline", 1, _raise_at_once)
        result, _ = _end(jobs, "baseline")
    assert result.error_kind == "ValueError"
    records = records_of(tmp_path, "baseline")
    assert [values_of(tmp_path, record)["value"][0] for record in records] == list(range(50))


def test_sigterm_writes_first_and_then_does_what_it_would_have_done(tmp_path: Path) -> None:
    """By default the process dies of it, and its status says so; a handler of the program's own is called."""
    with (
        Jobs(tmp_path / "default", hosted=False, dump_filter="True") as default,
        Jobs(tmp_path / "own", hosted=False, dump_filter="True", signals=("handled",)) as own,
    ):
        default.start("baseline", 1, _end_by_sigterm, False)
        own.start("baseline", 1, _end_by_sigterm, True)
        assert _end(default, "baseline")[1] == -signal.SIGTERM
        assert _end(own, "baseline")[1] == 9
        assert own.signals["handled"].is_set()
    for directory in (tmp_path / "default", tmp_path / "own"):
        values = [values_of(directory, record)["value"][0] for record in records_of(directory, "baseline")]
        assert values == list(range(50))


def test_sigterm_ends_a_rank_that_waits_where_no_handler_runs(tmp_path: Path) -> None:
    """In the library's own waits, or ours, no Python handler runs: the process ends all the same, at once, and a point
    that was meeting is saved without an outcome."""
    with Jobs(tmp_path, b2t_filter="name == 'meets'", dump_filter="True", timeout=FAR) as jobs:
        jobs.start("baseline", 1, _wait_for_nobody)
        jobs.start("target", 1, _wait_for_nobody)
        for role in ("baseline", "target"):
            wait_for_lines(tmp_path, 1, role)
        time.sleep(0.5)
        start = time.monotonic()
        for role in ("target", "baseline"):
            process = jobs.jobs[role].processes[0]
            jobs.kill(role, 0, signal.SIGTERM)
            process.join(250)
            assert process.exitcode == -signal.SIGTERM
        assert time.monotonic() - start < SOON
    records = records_of(tmp_path, "baseline")
    assert [(record.name, record.direction, record.outcome) for record in records] == [
        ("h", None, None), ("meets", "b2t", None),
    ]  # fmt: skip
    assert values_of(tmp_path, records[1]) == {"value": [5.0] * 3}
    assert "met the other side" in str(records[1].reason)


def test_sigkill_leaves_whole_files_and_lines(tmp_path: Path) -> None:
    """Whatever was under way, each line is whole and its file is there; a temporary file is not mistaken for one."""
    with Jobs(tmp_path, hosted=False, dump_filter="True") as jobs:
        jobs.start("baseline", 1, _dump_for_ever)
        log = wait_for_lines(tmp_path, 20)
        jobs.kill("baseline", 0, signal.SIGKILL)
        _end(jobs, "baseline")
    text = log.read_text()
    assert text.endswith("\n")
    records = records_of(tmp_path, "baseline")
    assert len(records) >= 20
    assert all(len(values_of(tmp_path, record)["value"]) == 5000 for record in records)
    for path in (tmp_path / "run" / "baseline" / "rank0").iterdir():
        assert path.suffix in (".safetensors", ".tmp")


def _dump_for_ever(rank: Rank) -> None:
    value = torch.ones(5000)
    while True:
        grafter.dump("h", value)
