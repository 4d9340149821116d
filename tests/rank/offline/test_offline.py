"""Grafts from a recording: a job that was recorded alone is played to a live one, as if it were there."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from jobs import Jobs, Rank, Result, succeed, two_jobs

import grafter
from grafter.core.processes import process_state
from grafter.core.records import LedgerRecord
from grafter.store.ledger import read_ledger, read_summaries
from grafter.tools.launch.job_keeper import descendants, parents_by_pid

RECORDED = "recorded"


def record(directory: Path, role: str, size: int, program: Callable[[Rank], Any], **settings: Any) -> Path:
    """Run one job alone, with GRAFTER_RECORD; where its recording is."""
    alone = {"record": 1, "run_name": RECORDED, "master_port": None, "store_host": None}
    with Jobs(directory, **settings) as jobs:
        jobs.start(role, size, program, **alone)
        succeed(jobs.wait())
    return directory / RECORDED


def play(rank: Rank) -> None:
    """One rank of the player, in a process that the test has already."""
    from grafter.config.settings.config import GrafterConfig
    from grafter.rank.offline.played_rank import PlayedGrafter
    from grafter.store.recording import open_recording

    recording = open_recording(rank.arguments[0], "baseline" if rank.is_baseline else "target")
    played = PlayedGrafter(GrafterConfig.from_environment(), recording.ranks[rank.role_rank])
    try:
        with torch.no_grad():
            played.play()
    finally:
        played.close()


def other(role: str) -> str:
    return "target" if role == "baseline" else "baseline"


def graft_from(
    directory: Path,
    recording: Path,
    recorded: tuple[str, int],
    program: Callable[[Rank], Any],
    size: int,
    **settings: Any,
) -> tuple[list[Result], list[Result], dict[tuple[str, int], list[LedgerRecord]]]:
    """(what the live ranks came to, what the players did, all ledgers) of a graft from a recording."""
    role, ranks = recorded
    with Jobs(directory, **settings) as jobs:
        jobs.start(role, ranks, play, recording)
        jobs.start(other(role), size, program)
        results = jobs.wait()
        ledgers = jobs.ledgers()
    split = ranks if role == "baseline" else size
    first, second = results[:split], results[split:]
    return (second, first, ledgers) if role == "baseline" else (first, second, ledgers)


def differences(ledger: list[LedgerRecord]) -> list[Any]:
    return [(r.name, r.step, r.outcome, [leaf.difference for leaf in r.leaves]) for r in ledger]


# Layouts and directions.


def sharded(rank: Rank, at_first_point: Callable[[], None] = lambda: None) -> list[Any]:
    """A tensor of 8 rows, sharded over the ranks; other values in each job, step and layer."""
    full = torch.arange(24, dtype=torch.float32).view(8, 3) * (1.0 if rank.is_baseline else -0.5)
    grafter.set_axes(tp=(rank.role_rank, rank.world_size))
    seen = []
    for step in range(2):
        for layer in range(2):
            part = (full + 100 * step + 10 * layer).chunk(rank.world_size)[rank.role_rank].clone()
            seen.append(grafter.dump("h", part, layer_id=layer, rank=rank.role_rank, dims="t[tp] d").tolist())
            if len(seen) == 1:
                at_first_point()
        grafter.step()
    return seen


@pytest.mark.parametrize(("recorded_ranks", "live_ranks"), [(1, 2), (2, 1)])
def test_a_graft_from_a_recording_writes_what_a_live_one_writes(
    tmp_path: Path, recorded_ranks: int, live_ranks: int
) -> None:
    """Another layout in the live job, either way: bit for bit what the two jobs write when both run."""
    filters = {"b2t_filter": "name == 'h' and layer_id == 1", "compare_filter": "name == 'h' and layer_id == 0"}
    with two_jobs(tmp_path / "live", sharded, sharded, ranks=(recorded_ranks, live_ranks), **filters) as jobs:
        expected = succeed(jobs.wait())[recorded_ranks:]
        expected_ledgers = jobs.ledgers()
    recording = record(tmp_path, "baseline", recorded_ranks, sharded, **filters)
    live, played, ledgers = graft_from(
        tmp_path / "later", recording, ("baseline", recorded_ranks), sharded, live_ranks, **filters
    )
    assert succeed(live) == expected
    succeed(played)
    for rank in range(live_ranks):
        assert differences(ledgers["target", rank]) == differences(expected_ledgers["target", rank])
    for rank in range(recorded_ranks):
        assert [r.outcome for r in ledgers["baseline", rank]] == ["compared", "sent"] * 2
        assert ledgers["baseline", rank][0].call_site == expected_ledgers["baseline", rank][0].call_site


def test_a_recorded_target_judges(tmp_path: Path) -> None:
    """The recorded role may receive: the player computes the differences and writes the ledger; a t2b graft sends."""
    filters = {"compare_filter": "name == 'h' and layer_id == 0", "t2b_filter": "name == 'h' and layer_id == 1"}
    with two_jobs(tmp_path / "live", sharded, sharded, ranks=(2, 1), **filters) as jobs:
        expected = succeed(jobs.wait())[:2]
        expected_ledgers = jobs.ledgers()
    recording = record(tmp_path, "target", 1, sharded, **filters)
    live, played, ledgers = graft_from(tmp_path / "later", recording, ("target", 1), sharded, 2, **filters)
    assert succeed(live) == expected
    succeed(played)
    assert differences(ledgers["target", 0]) == differences(expected_ledgers["target", 0])
    assert [r.outcome for r in ledgers["target", 0]] == ["compared", "sent"] * 2


def test_another_direction_and_a_narrower_filter(tmp_path: Path) -> None:
    """One recording serves what its filters matched, whatever the direction was then."""
    recording = record(tmp_path, "baseline", 1, sharded, b2t_filter="name == 'h'")
    filters = {"compare_filter": "name == 'h' and layer_id == 1 and step == 1"}
    live, played, ledgers = graft_from(tmp_path / "later", recording, ("baseline", 1), sharded, 1, **filters)
    succeed(live + played)
    assert [(r.step, r.tags["layer_id"], r.outcome) for r in ledgers["target", 0]] == [(1, 1, "compared")]


# What a point may carry.


def carry(rank: Rank) -> list[Any]:
    """A pytree with data beside it; extras with tensors; a stage of its own; nothing; a dtype that files lack."""
    sign = 1.0 if rank.is_baseline else -1.0
    scale = torch.tensor([2.0 + sign, 1j])
    tree = {"ids": torch.tensor([1, 2]) * int(sign), "kv": (torch.full((2,), sign), "eager")}
    seen = [grafter.dump("tree", tree)["kv"][0].tolist()]
    extras = {"scale": scale, "more": [None, {"steps": torch.arange(3)}], "n": 4}
    seen.append(grafter.dump("scaled", torch.full((3,), 5 * sign), extras=extras).tolist())
    with grafter.context(ranks=[rank.world_size - 1], stage=1):
        if rank.role_rank == rank.world_size - 1:
            seen.append(grafter.dump("late", torch.full((2,), sign, dtype=torch.complex64)).tolist())
    grafter.dump("absent", None if rank.is_baseline else torch.zeros(1))
    return seen


TRANSFORM = """
def scale(graft_input):
    received, extras = graft_input.received_list[0], graft_input.received_extras_list[0]
    assert graft_input.sender_ranks == [0, 1] and extras["n"] == 4 and extras["more"][0] is None
    return received * extras["scale"].real[0] + extras["more"][1]["steps"]
"""


def test_everything_that_a_point_carries_is_played(tmp_path: Path) -> None:
    """Pytrees, extras, transforms, participants and reasons are as between two live jobs."""
    (tmp_path / "scale.py").write_text(TRANSFORM)
    plan = tmp_path / "plan.yaml"
    plan.write_text(f'rules:\n  - {{match: "scaled", transform: "{tmp_path}/scale.py:scale"}}\n')
    settings = {"b2t_filter": "True", "plan": plan}
    with two_jobs(tmp_path / "live", carry, carry, ranks=(2, 2), **settings) as jobs:
        expected = succeed(jobs.wait())[2:]
        expected_ledgers = jobs.ledgers()
    recording = record(tmp_path, "baseline", 2, carry, **settings)
    live, played, ledgers = graft_from(tmp_path / "later", recording, ("baseline", 2), carry, 2, **settings)
    assert succeed(live) == expected == [[[1.0] * 2, [15.0, 16.0, 17.0]], [[1.0] * 2, [15.0, 16.0, 17.0], [1.0] * 2]]
    succeed(played)
    for rank in range(2):
        assert differences(ledgers["target", rank]) == differences(expected_ledgers["target", rank])
    reasons = [r.reason for r in ledgers["target", 0] if r.name == "absent"]
    assert reasons == [
        f"baseline rank {rank}: the value is None, not a tensor (when it was recorded)" for rank in (0, 1)
    ] or reasons == [
        "; ".join(f"baseline rank {rank}: the value is None, not a tensor (when it was recorded)" for rank in (0, 1))
    ]


def dump_and_fill_the_disk(rank: Rank) -> None:
    """The second point's file finds no room."""
    from grafter.store.dumps import saver

    write, written = saver.write_tensors, []

    def write_some(path: Path, *arguments: Any) -> None:
        written.append(path)
        if len(written) == 2:
            raise OSError(28, "No space left on device")
        write(path, *arguments)

    saver.write_tensors = write_some
    dump_three(rank)


def dump_three(rank: Rank) -> list[float]:
    value = 1.0 if rank.is_baseline else 2.0
    seen = []
    for i in range(3):
        seen.append(float(grafter.dump("h", torch.tensor(value + i), layer_id=i)))
    return seen


def test_a_point_that_could_not_be_recorded_is_skipped_with_the_reason(tmp_path: Path) -> None:
    """A full disk costs the point, not the recording; its record says so, and so does the ledger of the graft."""
    filters = {"b2t_filter": "name == 'h'"}
    recording = record(tmp_path, "baseline", 1, dump_and_fill_the_disk, **filters)
    assert [summary.dumps_lost for summary in read_summaries(recording)] == [1]
    live, played, ledgers = graft_from(tmp_path / "later", recording, ("baseline", 1), dump_three, 1, **filters)
    assert succeed(live) == [[1.0, 3.0, 3.0]]
    succeed(played)
    skipped = ledgers["target", 0][1]
    assert skipped.outcome == "skipped"
    assert "the recording cannot be used here" in str(skipped.reason)
    assert "No space left on device" in str(skipped.reason)


def converse(rank: Rank) -> list[Any]:
    """Two sequences that grow turn by turn, in another order in each job; only the baseline sends new rows alone."""
    seen = []
    names = ["a", "b"] if rank.is_baseline else ["b", "a"]
    for turn in range(1, 4):
        tokens = grafter.Tokens.from_lengths(names, [2 * turn] * 2)
        rows = torch.arange(4.0 * turn).view(-1, 1) if rank.is_baseline else torch.full((4 * turn, 1), -1.0)
        seen.append(grafter.dump("r", rows, dims="t d", tokens=tokens, new_rows_only=rank.is_baseline).tolist())
        grafter.step()
    return seen


def test_rows_by_token_and_new_rows_alone_are_played(tmp_path: Path) -> None:
    """Which rows are new follows from what met now, not from what was recorded."""
    filters = {"b2t_filter": "name == 'r'"}
    with two_jobs(tmp_path / "live", converse, converse, **filters) as jobs:
        _, expected = succeed(jobs.wait())
        received = [record.bytes_received for record in jobs.ledgers()["target", 0]]
    recording = record(tmp_path, "baseline", 1, converse, **filters)
    live, played, ledgers = graft_from(tmp_path / "later", recording, ("baseline", 1), converse, 1, **filters)
    assert succeed(live) == [expected]
    assert [row for row in expected[1] if row == [-1.0]]
    succeed(played)
    assert [record.bytes_received for record in ledgers["target", 0]] == received


# Gradients.


def train(rank: Rank) -> list[Any]:
    """Two layers; the target's graph asks for its gradients in another order, and has one that the baseline has not."""
    seen = []
    for step in range(2):
        x = torch.arange(1.0, 4.0).mul(1.0 if rank.is_baseline else 3.0).add(step).requires_grad_()
        # Autograd goes through what was made last first.
        a, b = (x * 2, x * 3) if rank.is_baseline else (x * 3, x * 2)[::-1]
        for name, value in (("a", a), ("b", b)):
            value.retain_grad()
            grafter.dump(name, value)
        unused = grafter.dump("unused", x * 5)
        total = (a * b).sum() + (0 if rank.is_baseline else unused.sum())
        total.backward()
        seen.append(x.grad.tolist() if x.grad is not None else None)
        grafter.step()
    return seen


@pytest.mark.parametrize("role", ["baseline", "target"])
def test_gradients_are_served_in_the_order_in_which_they_are_asked_for(tmp_path: Path, role: str) -> None:
    """Points of phase backward are recorded and played, in both roles; one that never came is skipped."""
    direction = "b2t_filter" if role == "baseline" else "compare_filter"
    settings = {direction: "phase == 'backward'", "gradients": 1}
    with two_jobs(tmp_path / "live", train, train, **settings) as jobs:
        expected = succeed(jobs.wait())
        expected_ledgers = jobs.ledgers()
    recording = record(tmp_path, role, 1, train, **settings)
    live, played, ledgers = graft_from(tmp_path / "later", recording, (role, 1), train, 1, **settings)
    assert succeed(live) == [expected[0 if role == "target" else 1]]
    succeed(played)

    def told(ledger: list[LedgerRecord]) -> list[Any]:
        return sorted((r.name, r.step, r.outcome, str(r.difference)) for r in ledger)

    assert told(ledgers["target", 0]) == told(expected_ledgers["target", 0])
    assert {r.outcome for r in ledgers["target", 0] if r.name == "unused"} == {"skipped"}


def train_parameters(rank: Rank) -> list[Any]:
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.ReLU(), torch.nn.Linear(4, 2))
    grafter.attach(model)
    model(torch.ones(2, 3) * (1.0 if rank.is_baseline else 2.0)).sum().backward()
    grafter.step()
    return [parameter.grad.tolist() for parameter in model.parameters() if parameter.grad is not None]


def test_hooks_and_gradients_of_parameters_are_played(tmp_path: Path) -> None:
    """A model with hooks: outputs, their gradients and those of parameters come from the recording."""
    settings = {"b2t_filter": "True", "gradients": 1}
    with two_jobs(tmp_path / "live", train_parameters, train_parameters, **settings) as jobs:
        baseline, target = succeed(jobs.wait())
        assert baseline == target
        expected_ledgers = jobs.ledgers()
    recording = record(tmp_path, "baseline", 1, train_parameters, **settings)
    live, played, ledgers = graft_from(tmp_path / "later", recording, ("baseline", 1), train_parameters, 1, **settings)
    assert succeed(live) == [target]
    succeed(played)
    assert differences(ledgers["target", 0]) == differences(expected_ledgers["target", 0])


def run_stage(rank: Rank) -> list[Any]:
    """A pipeline of two stages, whose modules are on one rank each; a single rank has both."""
    layers = torch.nn.ModuleDict({"first": torch.nn.Identity(), "second": torch.nn.Identity()})
    names = list(layers) if rank.world_size == 1 else [list(layers)[rank.role_rank]]
    model = torch.nn.ModuleDict({name: layers[name] for name in names})
    grafter.attach(model)
    value = torch.ones(2) if rank.is_baseline else torch.zeros(2)
    return [model[name](value).tolist() for name in names]


def test_modules_of_pipeline_stages_are_announced(tmp_path: Path) -> None:
    """Which recorded rank has which module is in the recording, so each stage is grafted by its own rank."""
    filters = {"b2t_filter": "name.endswith('.out')"}
    recording = record(tmp_path, "baseline", 2, run_stage, **filters)
    live, played, _ = graft_from(tmp_path / "later", recording, ("baseline", 2), run_stage, 1, **filters)
    assert succeed(live) == [[[1.0, 1.0], [1.0, 1.0]]]
    succeed(played)


# Jobs that do not fit the recording.


def dump_more(rank: Rank) -> None:
    dump_three(rank)
    grafter.step()
    dump_three(rank)


def test_a_recording_that_ends_early_explains_the_wait(tmp_path: Path) -> None:
    """One more step than was recorded is told at once, with both sides named."""
    filters = {"b2t_filter": "name == 'h'"}
    recording = record(tmp_path, "baseline", 1, dump_three, **filters)
    live, played, _ = graft_from(tmp_path / "later", recording, ("baseline", 1), dump_more, 1, **filters)
    succeed(played)
    assert live[0].error_kind == "PairingError"
    text = str(live[0].error)
    assert text.startswith(
        "the baseline is a recording, and the recording ends after step 0; it has no more points: target waits for 'h' "
        "(layer_id=0, step=1)."
    )
    assert f"baseline rank 0 (played from {recording}/baseline) has left" in text
    assert "its last points: 'h' (layer_id=0, step=0) sent" in text
    assert live[0].seconds < 15


def dump_other(rank: Rank) -> None:
    grafter.dump("h", torch.zeros(()), layer_id=0)
    grafter.dump("h", torch.zeros(()), layer_id=7)


def test_a_point_that_the_recording_lacks_is_told_as_between_two_live_jobs(tmp_path: Path) -> None:
    """Both sides with their last points and lines; the recorded side's line is the recorded one."""
    filters = {"b2t_filter": "name == 'h'"}
    recording = record(tmp_path, "baseline", 1, dump_three, **filters)
    live, played, _ = graft_from(tmp_path / "later", recording, ("baseline", 1), dump_other, 1, **filters)
    assert played[0].error_kind == live[0].error_kind == "PairingError"
    text = str(live[0].error)
    assert text.startswith(
        "the baseline is a recording, and this job asks for points that it lacks, or asks in another order: baseline "
        "waits for 'h' (layer_id=1, step=0); target waits for 'h' (layer_id=7, step=0)."
    )
    here = Path(__file__)
    assert f"at {here}" in text.split("target rank 0")[0]
    assert "in dump_three" in text.split("target rank 0")[0]
    assert "in dump_other" in text


def dump_one(rank: Rank) -> float:
    return float(grafter.dump("h", torch.tensor(2.0), layer_id=0))


@pytest.mark.parametrize("gradients", [0, 1])
def test_a_live_job_that_leaves_early_is_no_error(tmp_path: Path, gradients: int) -> None:
    """The player ends in good order, and its summary has no error."""
    filters = {"b2t_filter": "name == 'h'" if not gradients else "True", "gradients": gradients}
    recording = record(tmp_path, "baseline", 1, train if gradients else dump_three, **filters)
    program = dump_a if gradients else dump_one
    live, played, _ = graft_from(tmp_path / "later", recording, ("baseline", 1), program, 1, **filters)
    assert succeed(live) == [1.0]
    succeed(played)
    assert [summary.error for summary in read_summaries(tmp_path / "later" / "run")] == [None, None]


def dump_a(rank: Rank) -> float:
    x = torch.ones(3, requires_grad=True)
    for name in ("a", "b", "unused"):
        grafter.dump(name, x * 2)
    return 1.0


# With a live peer; secrets.


def test_a_live_run_can_be_recorded(tmp_path: Path) -> None:
    """With both jobs there, each keeps what it came with; the graft from that writes the same again."""
    filters = {"b2t_filter": "name == 'h'"}
    with two_jobs(tmp_path, dump_three, dump_three, record=1, **filters) as jobs:
        baseline, target = succeed(jobs.wait())
        assert baseline == target
    live, played, ledgers = graft_from(
        tmp_path / "later", tmp_path / "run", ("baseline", 1), dump_three, 1, secret="between us", **filters
    )
    assert succeed(live) == [target]
    succeed(played)
    assert [r.outcome for r in ledgers["target", 0]] == ["grafted"] * 3
    recorded = grafter.open_dumps(tmp_path / "run", role="target")
    assert [float(point.local(0)) for point in recorded] == [2.0, 3.0, 4.0]
    assert [float(point.local(0, which="grafted")) for point in recorded] == [1.0, 2.0, 3.0]


# GRAFTER_PEER: the live job starts the player.


def dump_sharded_and_find_player(rank: Rank) -> tuple[list[Any], list[int]]:
    players: list[int] = []
    return sharded(rank, lambda: players.extend(find_players())), players


def find_players() -> list[int]:
    """The player that this process has started, and its ranks."""
    return descendants(os.getpid(), parents_by_pid())


def test_several_live_ranks_meet_the_player_at_one_port(tmp_path: Path) -> None:
    """Rank 0 of the live job hosts the store, though it is the target, and starts one player, which ends with it."""
    recording = record(tmp_path, "baseline", 1, sharded, b2t_filter="name == 'h'")
    with Jobs(tmp_path / "later", hosted=False, b2t_filter="name == 'h'", secret="between us") as jobs:
        jobs.start("target", 2, dump_sharded_and_find_player, peer=recording)
        (first, players), (second, none) = succeed(jobs.wait())
        assert len(players) == 2
        assert not any(map(_lives, players))
    assert none == []
    assert first[-1] == [[110.0 + 3 * row + column for column in range(3)] for row in range(4)]
    assert second[-1] == [[110.0 + 3 * row + column for column in range(3)] for row in range(4, 8)]
    ledger = read_ledger(tmp_path / "later" / "run" / "baseline" / "rank0.ledger.jsonl")
    assert [r.outcome for r in ledger] == ["sent"] * 4


def dump_and_stay(rank: Rank) -> None:
    told = {"value": dump_one(rank), "players": find_players()}
    (Path(rank.arguments[0]) / "told.json").write_text(json.dumps(told))
    rank.tell("there")
    rank.wait_for("never")


def test_a_killed_live_rank_leaves_no_player_behind(tmp_path: Path) -> None:
    """One rank needs no port and no second command; SIGKILL to it ends the player and its ranks."""
    recording = record(tmp_path, "baseline", 1, dump_three, b2t_filter="name == 'h'")
    with Jobs(tmp_path / "later", hosted=False, signals=("there", "never"), b2t_filter="name == 'h'") as jobs:
        jobs.start("target", 1, dump_and_stay, tmp_path, peer=recording, master_port=None)
        assert jobs.signals["there"].wait(250)
        told = json.loads((tmp_path / "told.json").read_text())
        assert told["value"] == 1.0
        jobs.kill("target", 0)
        jobs.wait()
        deadline = time.monotonic() + 250
        while (left := [pid for pid in told["players"] if _lives(pid)]) and time.monotonic() < deadline:
            time.sleep(0.05)
        assert len(told["players"]) == 2
        assert not left


def _lives(pid: int) -> bool:
    return process_state(pid)[0] not in ("", "Z", "X")


def test_a_player_that_cannot_start_is_told_at_once(tmp_path: Path) -> None:
    """What was found in the recording is in the player's output, and nobody waits for it until the time is up."""
    recording = record(tmp_path, "baseline", 1, dump_three, b2t_filter="name == 'h'")
    (recording / "baseline" / "rank0.dumps.jsonl").write_text("no record\n" * 3)
    for file in (recording / "baseline" / "rank0").iterdir():
        file.write_bytes(b"")
    with Jobs(tmp_path / "later", hosted=False, b2t_filter="name == 'h'") as jobs:
        jobs.start("target", 1, dump_three, peer=recording, master_port=None)
        (live,) = jobs.wait()
    assert live.error_kind == "PeerLostError"
    assert "the baseline job (a recording) exited with code 2" in str(live.error)
    assert "target rank 0 was still waiting" in str(live.error)
