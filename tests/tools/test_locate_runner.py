"""`grafter locate` as it runs: over a launcher that is replaced, and as a command.

With the demo's real jobs: tests/e2e/test_demo_located.py.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import typer
from locate_ledgers import ADDED, ALONE, CLEAN, FLOOR_ADDED, NAMES, record
from rich.console import Console
from typer.testing import CliRunner

from grafter.analysis.locate.verdict import Verdict
from grafter.cli.locate import locate_command
from grafter.core.records import Difference, RankSummary
from grafter.errors import GrafterError, UsageError
from grafter.store.ledger import LedgerWriter
from grafter.tools import locate_runner as runner
from grafter.tools.launch.launcher import PairResult

# --- the runs ------------------------------------------------------------------------------------------------------


@dataclass
class StubLauncher:
    """Writes the ledgers that a run would have written. `rels` by run name; what is asked for is kept."""

    rels: dict[str, list[float]]
    exit_codes: dict[str, int | None] = field(default_factory=lambda: {"baseline": 0, "target": 0})
    error: str | None = None
    interrupted: bool = False
    failed_role: str | None = None
    # Roles whose ranks never reached the end.
    lost_roles: tuple[str, ...] = ()
    unreached: tuple[str, ...] = ()
    calls: list[dict[str, Any]] = field(default_factory=list)

    def run_pair(
        self, baseline: Any, target: Any, *, settings: Any, out: Path, run_name: str, **rest: Any
    ) -> PairResult:
        self.calls.append({"baseline": baseline, "target": target, "settings": dict(settings), "run_name": run_name})
        for role in ("baseline", "target"):
            writer = LedgerWriter(out / run_name / role, 0)
            for i, (name, rel) in enumerate(zip(NAMES, self.rels[run_name], strict=False)):
                difference = Difference(rel=rel, mismatched_fraction=float(rel > 0)) if role == "target" else None
                writer.write(record(name, i, role=role, difference=difference))
            if role in self.lost_roles:
                writer.close()
                continue
            writer.write_summary(
                RankSummary(
                    role=role,
                    role_rank=0,
                    outcomes={},
                    unmatched={},
                    filters_never_matched=[],
                    tags_never_seen=[],
                    error=self.error,
                    error_kind=self.error and "PairingError",
                )
            )
            writer.close()
        return PairResult(
            out / run_name,
            self.exit_codes,
            self.interrupted,
            1.0,
            None,
            self.failed_role,
            (),
            self.unreached,
            last_lines={"target": ["Killed"]},
        )


@pytest.fixture
def launcher(monkeypatch: pytest.MonkeyPatch) -> StubLauncher:
    stub = StubLauncher({"alone": ALONE, "grafted": ADDED, "floor-alone": CLEAN, "floor-grafted": FLOOR_ADDED})
    monkeypatch.setattr(runner, "run_pair", stub.run_pair)
    return stub


def run_locate(out: Path, **changes: Any) -> Verdict:
    arguments: dict[str, Any] = {"floor": "sh c.sh", "out": out, "settings": {}, "console": Console(quiet=True)}
    return runner.locate("sh a.sh 'x y'", "sh b.sh", **(arguments | changes))


def test_locate_runs_the_pair_and_its_floor_alone_and_grafted(launcher: StubLauncher, tmp_path: Path) -> None:
    """Four runs, each with the one filter that it is about, and a verdict that is also on disk."""
    verdict = run_locate(tmp_path, points="layer_id >= 0", settings={"timeout": "20"})
    assert verdict.named == "layer 2"
    assert [call["run_name"] for call in launcher.calls] == ["alone", "grafted", "floor-alone", "floor-grafted"]
    for call in launcher.calls:
        field_set = "b2t_filter" if "grafted" in call["run_name"] else "compare_filter"
        filters = {name: value for name, value in call["settings"].items() if name.endswith("_filter") and value}
        assert filters == {field_set: "layer_id >= 0"}
        assert call["settings"]["timeout"] == "20"
        assert call["baseline"] == ["sh", "a.sh", "x y"]
        assert call["target"][1] == ("c.sh" if "floor" in call["run_name"] else "b.sh")
    assert json.loads((tmp_path / "verdict.json").read_text())["named"] == "layer 2"


def test_without_a_floor_only_the_pair_runs_and_all_points_are_taken(launcher: StubLauncher, tmp_path: Path) -> None:
    """The default filter matches every point."""
    run_locate(tmp_path, floor=None)
    assert [call["run_name"] for call in launcher.calls] == ["alone", "grafted"]
    assert launcher.calls[0]["settings"]["compare_filter"] == "name is not None"


def test_a_run_that_failed_is_an_error_with_the_ranks_words(launcher: StubLauncher, tmp_path: Path) -> None:
    """No verdict is given over half a run."""
    launcher.error, launcher.exit_codes = "both wait", {"baseline": 1, "target": 1}
    with pytest.raises(GrafterError, match=r"run `alone` failed(.|\n)*baseline rank 0: PairingError: both wait"):
        run_locate(tmp_path)


def test_a_job_that_died_is_an_error_with_its_last_lines(launcher: StubLauncher, tmp_path: Path) -> None:
    """A job that left no word through grafter is quoted."""
    launcher.exit_codes, launcher.failed_role, launcher.lost_roles = (
        {"baseline": 0, "target": -9},
        "target",
        ("target",),
    )
    with pytest.raises(GrafterError, match=r"The target job failed first. Its last lines:\n    Killed"):
        run_locate(tmp_path)


def test_a_script_that_fails_on_its_own_result_is_still_judged(launcher: StubLauncher, tmp_path: Path) -> None:
    """A parity test that ends with an error because of the fault is no obstacle to finding it; a note says so."""
    launcher.exit_codes = {"baseline": 0, "target": 1}
    verdict = run_locate(tmp_path, floor=None)
    assert verdict.named == "layer 2"
    assert "the target job ended with exit code 1" in verdict.notes[0]


def test_an_interrupted_run_is_an_error(launcher: StubLauncher, tmp_path: Path) -> None:
    """Ctrl-C in one of the runs ends locate."""
    launcher.interrupted = True
    with pytest.raises(GrafterError, match="interrupted"):
        run_locate(tmp_path)


def test_a_run_without_points_says_so(launcher: StubLauncher, tmp_path: Path) -> None:
    """Nothing compared is an error, not a verdict of no difference."""
    launcher.rels["alone"] = []
    with pytest.raises(GrafterError, match="no point met its other side under `name is not None`"):
        run_locate(tmp_path)


def test_earlier_runs_are_not_judged_again(launcher: StubLauncher, tmp_path: Path) -> None:
    """Ledgers are appended to, so a directory that holds runs is refused."""
    run_locate(tmp_path)
    with pytest.raises(UsageError, match="already holds the runs alone, grafted, floor-alone, floor-grafted"):
        run_locate(tmp_path)


def test_settings_that_locate_makes_itself_are_refused(launcher: StubLauncher, tmp_path: Path) -> None:
    """A filter in --set would change what the runs mean."""
    with pytest.raises(UsageError, match="b2t_filter"):
        run_locate(tmp_path, settings={"b2t_filter": "step == 0"})
    assert launcher.calls == []


def test_a_job_that_attach_did_not_reach_is_the_error(launcher: StubLauncher, tmp_path: Path) -> None:
    """It is told in place of the words about `grafter.dump`, which such a program does not call."""
    launcher.unreached, launcher.rels["alone"] = ("target",), []
    with pytest.raises(GrafterError, match="--attach reached no model in the target job"):
        run_locate(tmp_path)


def test_the_command_passes_its_patterns_on_as_one_setting(launcher: StubLauncher, tmp_path: Path) -> None:
    """--attach may be repeated, and not also be a --set."""
    assert invoke("--out", str(tmp_path / "x"), "--attach", "a.*", "--attach", ":B").exit_code == 1
    assert all(call["settings"]["attach"] == "a.*,:B" for call in launcher.calls)
    assert invoke("--out", str(tmp_path / "y"), "--attach", "a", "--set", "attach=b").exit_code == 2


@pytest.mark.parametrize("command", [" ", "no-such-program-here c.sh"])
def test_a_floor_that_cannot_start_is_refused(launcher: StubLauncher, tmp_path: Path, command: str) -> None:
    """A misspelt floor is told before the first run, not after two."""
    with pytest.raises(UsageError, match="the floor command"):
        run_locate(tmp_path, floor=command)
    assert launcher.calls == []


# --- the command ---------------------------------------------------------------------------------------------------


def invoke(*arguments: str) -> Any:
    app = typer.Typer()
    app.command("locate")(locate_command)
    return CliRunner().invoke(app, ["--baseline", "sh a.sh", "--target", "sh b.sh", *arguments])


def test_the_command_prints_the_table_and_exits_with_the_verdict(launcher: StubLauncher, tmp_path: Path) -> None:
    """Exit code 1 names a point, 0 names none; the same is written as a page, whose name comes last."""
    result = invoke("--out", str(tmp_path / "x"))
    assert result.exit_code == 1
    assert "The target goes wrong in layer 2" in result.stdout
    assert result.stdout.splitlines()[-1] == f"report: {tmp_path / 'x' / 'report.html'}"
    assert "The target goes wrong in layer 2" in (tmp_path / "x" / "report.html").read_text()
    launcher.rels.update(alone=CLEAN, grafted=FLOOR_ADDED)
    assert invoke("--out", str(tmp_path / "y"), "--floor", "sh c.sh").exit_code == 0


def test_the_command_prints_json_alone_on_stdout(launcher: StubLauncher, tmp_path: Path) -> None:
    """With --json stdout can be piped into a parser."""
    result = invoke("--out", str(tmp_path / "x"), "--json")
    assert json.loads(result.stdout)["named"] == "layer 2"
    assert result.exit_code == 1


def test_the_command_ends_with_2_when_a_run_failed(launcher: StubLauncher, tmp_path: Path) -> None:
    """An error is told on stderr, without a traceback."""
    launcher.error = "the target is gone"
    result = invoke("--out", str(tmp_path / "x"))
    assert result.exit_code == 2
    assert "the target is gone" in result.stderr
    assert invoke("--out", str(tmp_path / "y"), "--set", "timeout").exit_code == 2
