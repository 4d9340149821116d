"""The command line: exit codes, messages, and that docs/cli.md knows every option."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import typer
from fake_store import FakeStore
from typer.main import get_command
from typer.testing import CliRunner, Result

from grafter.cli.command_options import parse_master
from grafter.cli.main import _in_options, app
from grafter.errors import UsageError
from grafter.tools.launch import launcher
from tests.analysis.run.test_run_summary import EVERYONE, two_layers, write_run

REPOSITORY = Path(__file__).parents[2]
PAGE = (REPOSITORY / "docs" / "cli.md").read_text()
COMMANDS = get_command(app).commands  # type: ignore[attr-defined]


@pytest.fixture(autouse=True)
def clean_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for variable in ("GRAFTER_B2T_FILTER", "GRAFTER_DIR", "GRAFTER_PLAN", "COLUMNS"):
        monkeypatch.delenv(variable, raising=False)


def grafter(*arguments: object) -> Result:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


@pytest.mark.parametrize("command", sorted(COMMANDS))
def test_the_page_knows_every_option(command: str) -> None:
    """docs/cli.md has a section per command, with each of its options and arguments."""
    section = re.search(rf"^## `grafter {command}`$(.*?)(?=^## |\Z)", PAGE, re.M | re.S)
    assert section, f"docs/cli.md has no section `grafter {command}`"
    first_cells = re.findall(r"^\| (`--.*?) \|", section.group(1), re.M)
    documented = {option for cell in first_cells for option in re.findall(r"`(--[\w-]+)`", cell)}
    options = {name for parameter in COMMANDS[command].params for name in parameter.opts if name.startswith("--")}
    assert options - {"--help"} == documented


def test_help_and_version() -> None:
    """`grafter --help` lists the commands, each help names its options, and --version prints the version."""
    assert all(command in grafter("--help").output for command in COMMANDS)
    assert "--b2t EXPR" in grafter("run", "--help").output
    assert re.fullmatch(r"grafter \d+\.\d+\.\d+\n", grafter("--version").output)


def test_importing_the_command_line_is_quick() -> None:
    """The help needs neither torch nor pydantic nor rich."""
    code = "import sys, grafter.cli.main; print([m for m in ('torch', 'pydantic', 'rich') if m in sys.modules])"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=REPOSITORY)
    assert result.stdout == "[]\n"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--b2t", "name == 'x'"], "both --baseline CMD and --target CMD"),
        (["--baseline", "a", "--target", "b", "--host-store", "1"], "--host-store needs --role"),
        (["--role", "target", "--b2t", "name == 'x'"], "say how to start the target job"),
        (["--role", "target", "--baseline", "a"], "--baseline does not go with --role"),
        (["--role", "target", "--b2t", "name == 'x'", "--", "true"], "--host-store"),
        (["--role", "target", "--master", "here", "--", "true"], "HOST:PORT"),
        (["--role", "target", "--address", "h", "--master", "h:1", "--", "true"], "--address goes with --host-store"),
        (["--baseline", "true", "--target", "true"], "--b2t, --t2b, --compare"),
        (["--baseline", "true", "--target", "true", "--b2t", "name ="], "--b2t"),
        (["--baseline", "true", "--target", "true", "--b2t", "1", "--set", "b2t_filter=1"], "given twice"),
        (["--baseline", "true", "--target", "true", "--set", "secret=hush"], "list of processes"),
        (["--baseline", "true", "--target", "true", "--b2t", "name == 'x'", "--set", "timeuot=3"], "GRAFTER_TIMEOUT"),
        (["--baseline", "no-such-program", "--target", "true", "--b2t", "name == 'x'"], "PATH"),
        (["--no-such-option"], "no-such-option"),
    ],
)
def test_wrong_usage_is_exit_code_2(arguments: list[str], message: str, tmp_path: Path) -> None:
    """What the user wrote wrong is told as plain text on stderr, before anything is started."""
    result = grafter("run", "--out", tmp_path / "out", *arguments)
    assert result.exit_code == 2
    assert message in " ".join(result.stderr.split())
    assert "Traceback" not in result.output and "hush" not in result.output
    assert not (tmp_path / "out").exists()


def test_options_become_settings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every option of `run` reaches both jobs as its GRAFTER_* variable."""
    monkeypatch.setattr(launcher, "host_store", FakeStore)
    plan = tmp_path / "plan.yaml"
    plan.write_text("timeout: 9\n")
    filters = ["--b2t", "name == 'a'", "--t2b", "name == 'b'", "--compare", "name == 'c'", "--transform", "m:f"]
    code = "import os; [print(k, v) for k, v in sorted(os.environ.items()) if k.startswith('GRAFTER_')]"
    command = f'"{sys.executable}" -c "{code}"'
    rest = ["--plan", plan, "--set", "stats=off", "--out", tmp_path / "out", "--name", "mine"]
    result = grafter("run", "--baseline", command, "--target", "true", *filters, *rest)
    settings = dict(
        line.removeprefix("[baseline] GRAFTER_").split(" ", 1) for line in result.output.splitlines() if "[b" in line
    )
    assert settings == {
        "B2T_FILTER": "name == 'a'",
        "T2B_FILTER": "name == 'b'",
        "COMPARE_FILTER": "name == 'c'",
        "TRANSFORM_PATH": "m:f",
        "PLAN": str(plan),
        "STATS": "off",
        "DIR": str(tmp_path / "out"),
        "RUN_NAME": "mine",
        "ENABLE": "1",
        "ROLE": "baseline",
        "MASTER_ADDRESS": "127.0.0.1",
        "MASTER_PORT": "1",
        "STORE_HOST": "launcher",
    }
    assert result.exit_code == 1
    assert "nothing was grafted or compared" in result.output


def test_a_run_ends_with_its_table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Jobs that grafted give exit code 0 and the table of points, here from ledgers that the job copies."""
    monkeypatch.setattr(launcher, "host_store", FakeStore)
    write_run(tmp_path / "ready", two_layers(), EVERYONE)
    copy = f"cp -r {tmp_path}/ready/baseline {tmp_path}/ready/target {tmp_path}/out/mine"
    where = ["--out", tmp_path / "out", "--name", "mine"]
    result = grafter("run", "--baseline", copy, "--target", "true", "--b2t", "name == 'layer'", *where)
    assert result.exit_code == 0, result.output
    assert "2 grafted" in result.output and "1.8e-06" in result.output
    again = grafter("run", "--baseline", copy, "--target", "true", "--b2t", "name == 'layer'", *where)
    assert again.exit_code == 2
    assert "already holds a run" in again.stderr


def test_show_prints_tables_or_json(tmp_path: Path) -> None:
    """`show` takes a run or the out directory; --json is one object a line, in the order and number asked for."""
    write_run(tmp_path / "run", two_layers(), EVERYONE)
    assert "layer layer_id=1" in grafter("show", tmp_path).output
    lines = grafter("show", tmp_path / "run", "--json", "--sort", "rel").output.splitlines()
    rows = [json.loads(line) for line in lines]
    assert [row["rel"] for row in rows] == [1.8e-6, 1e-14]
    assert rows[0]["tags"] == {"layer_id": 1}
    assert len(grafter("show", tmp_path, "--json", "--limit", "1").output.splitlines()) == 1
    assert len(grafter("show", tmp_path, "--json", "--all-ranks").output.splitlines()) == 6
    assert grafter("show", tmp_path, "--json", "--failed").output == ""


def test_show_of_nothing_is_explained(tmp_path: Path) -> None:
    """A directory without a run is exit code 1 and one sentence on stderr; so is a broken ledger."""
    result = grafter("show", tmp_path)
    assert result.exit_code == 1
    assert "holds no run" in result.stderr
    ledger = tmp_path / "run" / "target" / "rank0.ledger.jsonl"
    ledger.parent.mkdir(parents=True)
    ledger.write_text("{}\n")
    result = grafter("show", tmp_path)
    assert result.exit_code == 1
    assert "rank0.ledger.jsonl:1: not a ledger record" in result.stderr


def test_a_master_is_host_and_port() -> None:
    """HOST:PORT, with brackets around an IPv6 address; anything else is refused."""
    assert parse_master("10.0.0.1:29400") == ("10.0.0.1", 29400)
    assert parse_master("[::1]:5") == ("::1", 5)
    for text in ("", ":1", "host", "host:", "host:x", "host:0", "host:70000"):
        with pytest.raises(UsageError, match="HOST:PORT"):
            parse_master(text)


def test_a_new_command_is_one_function() -> None:
    """The application takes another command by one registration; `typer.Exit` carries its code."""
    other = typer.Typer()
    other.registered_commands += app.registered_commands

    @other.command("extra")
    def extra() -> None:
        raise typer.Exit(5)

    assert CliRunner().invoke(other, ["extra"]).exit_code == 5


def test_an_error_names_options_where_no_variable_is_set(monkeypatch: pytest.MonkeyPatch) -> None:
    """A variable with a value beside it is an example of setting it, and stays; so does one that is set."""
    text = "a filter for GRAFTER_RECORD: as GRAFTER_RECORD=1"
    monkeypatch.delenv("GRAFTER_RECORD", raising=False)
    assert _in_options(text) == "a filter for --record: as GRAFTER_RECORD=1"
    monkeypatch.setenv("GRAFTER_RECORD", "1")
    assert _in_options(text) == text
