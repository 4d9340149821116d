"""A matched point that fails is in its job's log when it happens, with the reason; again and again, it is counted."""

from __future__ import annotations

import logging
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from jobs import Jobs, Rank, succeed

import grafter
from grafter.runtime.point_ledger import FailureLog


def messages(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.name == "grafter"]


def test_a_name_and_reason_has_one_line_and_is_counted_from_then_on(caplog: pytest.LogCaptureFixture) -> None:
    log = FailureLog("target rank 0")
    for step in range(3):
        log.add("h", f"'h' (step={step})", "shapes\n  differ")
    log.add("h", "'h' (step=3)", "another reason")
    log.add("g", "'g' (step=3)", "shapes\n  differ")
    assert messages(caplog) == [
        "grafter: target rank 0: the point 'h' (step=0) failed, and nothing was written: shapes differ",
        "grafter: target rank 0: the point 'h' (step=3) failed, and nothing was written: another reason",
        "grafter: target rank 0: the point 'g' (step=3) failed, and nothing was written: shapes differ",
    ]
    log.close()
    assert messages(caplog)[3:] == ["grafter: target rank 0: failed again for a reason given above: 'h' 2 more times"]


def test_the_lines_are_bounded(caplog: pytest.LogCaptureFixture) -> None:
    """A reason that is different each time, with an address in it, say, does not fill the log."""
    log = FailureLog("target rank 0")
    for number in range(1000):
        log.add("h", "'h'", f"{number} {'x' * 2000}")
    log.close()
    assert len(messages(caplog)) == 101
    assert max(map(len, messages(caplog))) < 1000
    assert "900 more failures" in messages(caplog)[-1]


def test_nothing_is_said_where_nothing_failed(caplog: pytest.LogCaptureFixture) -> None:
    FailureLog("target rank 0").close()
    assert messages(caplog) == []


def fail(graft_input: Any) -> torch.Tensor:
    """On one of two receivers: which of them refuses is then no question of time."""
    if graft_input.role_rank == 1:
        raise ValueError("the transform's own fault")
    return graft_input.received_list[0]  # type: ignore[no-any-return]


def fail_twice(rank: Rank) -> list[str]:
    """What this rank's log had, right after the points and after the run's end."""
    lines: list[str] = []

    class Keep(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            lines.append(f"{record.levelname} {logging.Formatter('%(message)s').format(record)}")

    logger = logging.getLogger("grafter")
    logger.addHandler(Keep())
    for _ in range(2):
        grafter.dump("h", torch.ones(2), transform=None if rank.is_baseline else fail)
        grafter.step()
    # Its receivers tell a sender within about a second: it must have heard before it leaves.
    rank.tell(f"{rank.role} {rank.role_rank}")
    if rank.is_baseline:
        while not any("the point" in line for line in lines):
            rank.wait_for("target 0", 60)
            time.sleep(0.02)
    grafter.close()
    return lines


@pytest.mark.parametrize("level", ["warning", "debug"])
def test_both_jobs_say_it_once_when_it_happens_and_the_traceback_at_debug(tmp_path: Path, level: str) -> None:
    signals = ("baseline 0", "target 0", "target 1")
    with Jobs(tmp_path, b2t_filter="True", timeout=60, log_level=level, signals=signals) as jobs:
        jobs.start("baseline", 1, fail_twice)
        jobs.start("target", 2, fail_twice)
        baseline, first, second = succeed(jobs.wait())
    for lines in (baseline, first):
        failed = [line for line in lines if "the point 'h'" in line and "failed, and nothing" in line]
        assert len(failed) == 1
        assert failed[0].startswith("WARNING ")
        assert "(step=0)" in failed[0]
        assert "ValueError: the transform's own fault" in failed[0]
    assert not any("failed, and nothing" in line for line in second), "one line for the job"
    assert any("failed again for a reason given above: 'h' 1 more time" in line for line in first)
    tracebacks = [line for line in second if line.startswith("DEBUG") and "Traceback" in line and "in fail" in line]
    assert len(tracebacks) == (2 if level == "debug" else 0)
