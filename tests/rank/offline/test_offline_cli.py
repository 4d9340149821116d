"""Recording and playing from the command line."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from grafter.cli.main import app
from grafter.core.records import RankSummary
from grafter.store.dumps.reader import open_dumps
from grafter.store.ledger import read_run

# One import of torch for all ranks of a job.
PROGRAM = """
import os, sys, torch
size, steps, rank = int(sys.argv[1]), int(sys.argv[2]), 0
for other in range(1, size):
    if not os.fork():
        rank = other
        break
os.environ.update(RANK=str(rank), WORLD_SIZE=str(size))
import grafter

grafter.set_axes(tp=(rank, size))
full = torch.arange(8.0) if size == 1 else torch.zeros(8)
with open(f"{sys.argv[3]}.{rank}", "w") as seen:
    for step in range(steps):
        part = (full * (step + 1)).chunk(size)[rank].clone()
        print(grafter.dump("h", part, dims="h[tp]").tolist(), file=seen)
        grafter.step()
grafter.close()
if rank:
    os._exit(0)
for _ in range(1, size):
    os.wait()
"""


@pytest.fixture(autouse=True)
def clean_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for variable in ("GRAFTER_B2T_FILTER", "GRAFTER_DIR", "GRAFTER_PLAN", "GRAFTER_PEER", "GRAFTER_RECORD"):
        monkeypatch.delenv(variable, raising=False)


def grafter_run(*arguments: object) -> Result:
    return CliRunner().invoke(app, ["run", *map(str, arguments)])


def test_record_now_and_graft_later(tmp_path: Path) -> None:
    """One rank is recorded; later two ranks graft from it; a third step, which it lacks, ends that run with exit 1."""
    program = tmp_path / "program.py"
    program.write_text(PROGRAM)
    recording, b2t = tmp_path / "recording", ("--b2t", "name == 'h'")
    recorded = grafter_run(
        "--role", "baseline", "--record", recording, *b2t, "--", sys.executable, program, 1, 2, tmp_path / "alone"
    )
    assert recorded.exit_code == 0, recorded.output
    assert "recording into" in recorded.output
    assert "points saved to disk: baseline 2" in recorded.output
    assert len(open_dumps(recording)) == 2
    target = f"{sys.executable} {program} 2 3 {tmp_path}/seen"
    grafted = grafter_run("--peer", recording, "--target", target, *b2t, "--out", tmp_path / "out", "--name", "later")
    assert f"the baseline job is a recording, played from {recording}" in grafted.output
    assert [(tmp_path / f"seen.{rank}").read_text().splitlines()[:2] for rank in range(2)] == [
        ["[0.0, 1.0, 2.0, 3.0]", "[0.0, 2.0, 4.0, 6.0]"],
        ["[4.0, 5.0, 6.0, 7.0]", "[8.0, 10.0, 12.0, 14.0]"],
    ]
    outcomes = {
        (role, rank): [r.outcome for r in ledger] for role, rank, ledger in read_run(tmp_path / "out" / "later")
    }
    assert outcomes == {("baseline", 0): ["sent"] * 2, **{("target", rank): ["grafted"] * 2 for rank in range(2)}}
    assert grafted.exit_code == 1
    assert "the baseline is a recording, and the recording ends after step 1; it has no more points" in grafted.output


def test_a_recording_that_lost_points_is_a_failure(tmp_path: Path) -> None:
    """A recording is complete, or `grafter run` says that it is not."""
    lossy = tmp_path / "lossy.py"
    summary = RankSummary(
        role="baseline", role_rank=0, outcomes={}, unmatched={}, filters_never_matched=[], tags_never_seen=[],
        only_dumps=True, dumped=3, dumps_lost=1,
    )  # fmt: skip
    lossy.write_text(
        "import os, pathlib\n"
        "directory = pathlib.Path(os.environ['GRAFTER_DIR'], os.environ['GRAFTER_RUN_NAME'], 'baseline')\n"
        "directory.mkdir(parents=True)\n"
        f"(directory / 'rank0.summary.json').write_text({summary.model_dump_json()!r})\n"
    )
    result = grafter_run("--role", "baseline", "--record", tmp_path / "r", "--b2t", "True", "--", sys.executable, lossy)
    assert result.exit_code == 1
    assert "the recording is not complete: baseline 0 lost 1 point" in result.output


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (["--peer", "r", "--baseline", "a", "--target", "b"], "--peer plays one side, so only the other has a command"),
        (["--peer", "r"], "or one of them and --peer"),
        (["--record", "r", "--out", "o", "--baseline", "a", "--target", "b"], "--out does not go with --record"),
        (["--role", "baseline", "--peer", "r", "--master", "h:1", "--", "true"], "does not go with --peer"),
        (["--role", "baseline", "--record", "r", "--", "true"], "a filter for --record"),
        (
            ["--peer", "absent", "--target", "true", "--b2t", "True"],
            "--peer absent: absent: there is no such directory",
        ),
        (["--set", "peer=x", "--baseline", "a", "--target", "b"], "use --peer"),
    ],
)
def test_wrong_usage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: list[str], reason: str) -> None:
    """What cannot be meant is told, and nothing is started or written."""
    monkeypatch.chdir(tmp_path)
    result = grafter_run(*arguments)
    assert result.exit_code == 2
    assert reason in result.output
    assert not list(tmp_path.iterdir())


def test_the_recording_says_what_it_was_recorded_with(tmp_path: Path) -> None:
    """run.json and rank<r>.recording.json are there for people, too."""
    from grafter.config.settings.config import GrafterConfig
    from grafter.rank.grafter import Grafter

    config = GrafterConfig(
        enable=True,
        role="target",
        record=True,
        compare_filter="True",
        dir=str(tmp_path),
        run_name="r",
        log_level="error",
    )
    grafter = Grafter(config)
    grafter.step()
    grafter.close()
    facts = json.loads((tmp_path / "r" / "target" / "rank0.recording.json").read_text())
    assert (facts["role"], facts["shared_settings"]) == ("target", {"compare_filter": "True"})
    assert json.loads((tmp_path / "r" / "target" / "run.json").read_text())["configuration"]["record"] is True
