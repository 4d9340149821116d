"""The board says what a rank really does: at which stage of which point it is, once that lasts."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pytest
import torch
from jobs import Jobs, Rank, succeed

import grafter
from grafter.wire.monitor.status_board import BoardLine, board_key, describe_line

STAGES = {
    "sending": ("baseline", "sends 'second' (step=0)"),
    "receiving": ("target", "receives 'second' (step=0)"),
    "transforming": ("target", "transforms and checks what it has received for 'second' (step=0)"),
    "measuring": ("target", "computes statistics of 'second' (step=0)"),
    "voting": ("target", "votes on 'second' (step=0)"),
    "deciding": ("target", "waits for the outcome of 'second' (step=0)"),
    "writing": ("target", "copies what it has received into 'second' (step=0)"),
}


def hold_at(rank: Rank, stage: str) -> None:
    """Make this rank's next point last in this stage until the test has seen it."""
    from grafter.runtime import leaf_figures
    from grafter.wire.exchange.incoming import IncomingLeaf, Reception
    from grafter.wire.pairing.host_votes import HostVotes

    session: Any = grafter._process.grafter.lifecycle.session  # type: ignore[union-attr]
    places: dict[str, tuple[Any, str]] = {
        "sending": (session.transfer, "send"),
        "receiving": (session.transfer, "receive"),
        "transforming": (Reception, "incoming"),
        "measuring": (leaf_figures, "compare"),
        "voting": (HostVotes, "append"),
        "deciding": (HostVotes, "await_news"),
        "writing": (IncomingLeaf, "write"),
    }
    holder, name = places[stage]
    real = getattr(holder, name)

    def held(*args: Any, **kwargs: Any) -> Any:
        rank.wait_for("seen")
        return real(*args, **kwargs)

    setattr(holder, name, held)


def meet_slowly(rank: Rank) -> float:
    stage = rank.arguments[0]
    value = torch.full((3,), 1.0 if rank.is_baseline else 2.0)
    grafter.dump("first", value)
    if STAGES[stage][0] == rank.role and rank.role_rank == 0:
        hold_at(rank, stage)
    elif stage == "deciding" and not rank.is_baseline:
        # Else rank 0 might find the point decided, and wait for nobody.
        hold_at(rank, "voting")
    grafter.dump("second", value)
    rank.wait_for("seen")
    return float(value[0])


def line_of(jobs: Jobs, role: Any) -> BoardLine | None:
    run = jobs.store.peek_run()
    if run is None:
        return None
    client, payload = run
    client.seal.run_id = payload.partition(" ")[0]
    found = client.peek(board_key(client, role, 0))
    return BoardLine.model_validate_json(found.payload) if found is not None else None


@pytest.mark.parametrize("stage", STAGES)
def test_a_rank_that_lingers_in_a_stage_says_so(tmp_path: Path, stage: str) -> None:
    role, text = STAGES[stage]
    with Jobs(tmp_path, b2t_filter="True", timeout=100, signals=("seen",)) as jobs:
        jobs.start("baseline", 2, meet_slowly, stage)
        jobs.start("target", 2, meet_slowly, stage)
        deadline = time.monotonic() + 60
        while (line := line_of(jobs, role)) is None or not line.doing.startswith(text):
            assert time.monotonic() < deadline, line
            time.sleep(0.05)
        assert line.state == "running", "whoever needs it watches it directly"
        assert "test_status_board.py" in line.call_site
        told = describe_line(line, time.time())
        assert told.startswith(f"{role} rank 0 {text}, since ")
        assert "running and at no point" not in told
        jobs.signals["seen"].set()
        assert succeed(jobs.wait()) == [1.0] * 4


def compute_between_points(rank: Rank) -> None:
    grafter.dump("first", torch.ones(1))
    rank.tell(rank.role)
    rank.wait_for("seen")


def test_a_rank_between_two_points_is_at_none(tmp_path: Path) -> None:
    with Jobs(tmp_path, b2t_filter="True", timeout=100, signals=("seen", "baseline", "target")) as jobs:
        jobs.start("baseline", 1, compute_between_points)
        jobs.start("target", 1, compute_between_points)
        assert jobs.signals["target"].wait(60)
        deadline = time.monotonic() + 60
        while (line := line_of(jobs, "target")) is None or line.doing:
            assert time.monotonic() < deadline, line
            time.sleep(0.05)
        assert "is running and at no point" in describe_line(line, time.time())
        jobs.signals["seen"].set()
        succeed(jobs.wait())
