"""The launch scripts, with Pythons that are shell scripts: nothing is installed here."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[2]
BASH = shutil.which("bash") or "/bin/bash"
# What the scripts may count on beside bash; a PATH of only these has no Python.
TOOLS = ("cat", "cksum", "dirname", "rm", "mkdir", "chmod", "cp")

# Answers as a Python of some version with or without venv, and keeps a list of what it was asked.
FAKE_PYTHON = """#!{bash}
echo "$0 $*" >> {log}
case "$*" in
  *version_info*) exit {too_old} ;;
  *ensurepip*) exit {without_venv} ;;
  "-m venv "*) mkdir -p "$3/bin" && cp -- "$0" "$3/bin/python" ;;
  "-m pip install "*) exit {pip_fails} ;;
  "-m pip --version") exit 0 ;;
  *) exit 1 ;;
esac
"""


class Sandbox:
    """A repository of the launch scripts alone, in a path with a space, and a PATH with chosen Pythons."""

    def __init__(self, root: Path) -> None:
        self.repository = root / "a repository"
        self.log = root / "log"
        self.path = [root / "tools"]
        (root / "tools").mkdir()
        (self.repository / "launch").mkdir(parents=True)
        for tool in TOOLS:
            (root / "tools" / tool).symlink_to(shutil.which(tool) or pytest.fail(f"this machine has no {tool}"))
        shutil.copy(REPOSITORY / "launch" / "setup.sh", self.repository / "launch")
        for name in ("pyproject.toml", "constraints.txt"):
            (self.repository / name).write_text(name)

    def add_python(
        self, name: str, directory: str, *, too_old: int = 0, without_venv: int = 0, pip_fails: int = 0
    ) -> Path:
        """A Python in a new directory at the end of PATH; the numbers are exit codes, 0 for all well."""
        python = self.log.parent / directory / name
        python.parent.mkdir(exist_ok=True)
        text = FAKE_PYTHON.format(
            bash=BASH, log=self.log, too_old=too_old, without_venv=without_venv, pip_fails=pip_fails
        )
        python.write_text(text)
        python.chmod(0o755)
        if python.parent not in self.path:
            self.path.append(python.parent)
        return python

    def add_broken_shim(self, name: str, directory: str) -> None:
        """What a version manager leaves on PATH for a version that is not installed."""
        shim = self.log.parent / directory / name
        shim.parent.mkdir(exist_ok=True)
        shim.write_text(f"#!{BASH}\necho 'command not found' >&2\nexit 127\n")
        shim.chmod(0o755)
        self.path.append(shim.parent)

    def run(self, command: str, **environment: str) -> subprocess.CompletedProcess[str]:
        """`command` after sourcing setup.sh, from another directory."""
        return subprocess.run(
            [BASH, "-c", f'set -euo pipefail; source "{self.repository}/launch/setup.sh"; {command}'],
            env={"PATH": os.pathsep.join(map(str, self.path)), **environment},
            cwd="/",
            capture_output=True,
            text=True,
            timeout=250,
            check=False,
        )

    def installations(self) -> int:
        """How often pip was asked to install since the last call."""
        calls = self.log.read_text().splitlines() if self.log.exists() else []
        self.log.unlink(missing_ok=True)
        return sum("pip install" in call for call in calls)


@pytest.fixture
def sandbox(tmp_path: Path) -> Sandbox:
    return Sandbox(tmp_path)


@pytest.mark.parametrize("script", ["launch/setup.sh", "launch/demo.sh", "launch/test.sh", ".ci/run"])
def test_scripts_parse(script: str) -> None:
    """bash reads every script without complaint."""
    result = subprocess.run([BASH, "-n", str(REPOSITORY / script)], capture_output=True, text=True, check=False)
    assert (result.returncode, result.stderr) == (0, "")


@pytest.mark.parametrize("script", ["launch/demo.sh", "launch/test.sh", ".ci/run"])
def test_scripts_that_people_start_are_executable_and_strict(script: str) -> None:
    """They can be started by name, and stop at the first failure."""
    assert os.access(REPOSITORY / script, os.X_OK)
    assert "set -euo pipefail" in (REPOSITORY / script).read_text()


def test_python_3_11_is_preferred(sandbox: Sandbox) -> None:
    """Where there are several, 3.11 is first, wherever on PATH it is."""
    sandbox.add_python("python3.13", "one")
    sandbox.add_python("python3", "one")
    expected = sandbox.add_python("python3.11", "two")
    assert sandbox.run("find_python").stdout.strip() == str(expected)


def test_a_shim_that_does_not_run_is_passed_over(sandbox: Sandbox) -> None:
    """A python3.11 that fails does not hide a later one of the same name, nor a python3.12."""
    sandbox.add_broken_shim("python3.11", "shims")
    fallback = sandbox.add_python("python3.12", "one")
    assert sandbox.run("find_python").stdout.strip() == str(fallback)
    expected = sandbox.add_python("python3.11", "two")
    assert sandbox.run("find_python").stdout.strip() == str(expected)


def test_python_can_be_chosen(sandbox: Sandbox) -> None:
    """PYTHON overrides the search, and one that does not do is not silently replaced."""
    sandbox.add_python("python3.11", "one")
    mine = sandbox.add_python("mine", "two")
    assert sandbox.run("find_python", PYTHON=str(mine)).stdout.strip() == str(mine)
    result = sandbox.run("find_python", PYTHON="/no/such/python")
    assert result.returncode == 1
    assert "PYTHON=/no/such/python does not run" in result.stderr


def test_no_python_says_what_was_tried(sandbox: Sandbox) -> None:
    """An old Python is none; the error names what is needed."""
    sandbox.add_python("python3", "one", too_old=1)
    result = sandbox.run("setup demo || exit 7")
    assert result.returncode == 7
    assert "no Python of 3.10 or newer was found" in result.stderr
    assert not (sandbox.repository / ".venv").exists()


def test_a_python_without_venv_names_the_package(sandbox: Sandbox) -> None:
    """Debian's Python without python3-venv is told from having no Python."""
    python = sandbox.add_python("python3", "one", without_venv=1)
    result = sandbox.run("find_python")
    assert result.returncode == 1
    assert str(python) in result.stderr
    assert "python3-venv" in result.stderr


def test_the_second_run_installs_nothing(sandbox: Sandbox) -> None:
    """One installation serves until the files that it depends on change; dev serves the demo too."""
    sandbox.add_python("python3.11", "one")
    for expected in (1, 0):
        assert sandbox.run("setup demo").returncode == 0
        assert sandbox.installations() == expected
    sandbox.run("setup dev")
    assert sandbox.installations() == 1
    for name in ("pyproject.toml", "constraints.txt"):
        (sandbox.repository / name).write_text("changed")
        for expected in (1, 0):
            sandbox.run("setup dev")
            sandbox.run("setup demo")
            assert sandbox.installations() == expected


def test_a_failed_installation_is_repeated(sandbox: Sandbox) -> None:
    """Only an installation that succeeded is remembered; the message says what to do about registries."""
    sandbox.add_python("python3.11", "one", pip_fails=1)
    for _ in range(2):
        result = sandbox.run("setup demo || exit 7")
        assert result.returncode == 7
        assert "--index URL" in result.stderr
        assert sandbox.installations() == 1


def test_a_half_made_venv_is_made_anew(sandbox: Sandbox) -> None:
    """An interrupted first run leaves no trap for the second."""
    sandbox.add_python("python3.11", "one")
    (sandbox.repository / ".venv" / "bin").mkdir(parents=True)
    result = sandbox.run("setup demo; command -v python")
    assert "unfinished" in result.stderr
    assert result.stdout.strip() == str(sandbox.repository / ".venv" / "bin" / "python")


def test_a_moved_repository_is_installed_anew(sandbox: Sandbox) -> None:
    """Programs in a virtual environment hold its path, so one that moved is made anew."""
    sandbox.add_python("python3.11", "one")
    sandbox.run("setup demo")
    sandbox.installations()
    sandbox.repository = sandbox.repository.rename(sandbox.repository.with_name("moved"))
    assert "was moved; making it anew" in sandbox.run("setup demo").stderr
    assert sandbox.installations() == 1
    sandbox.run("setup demo")
    assert sandbox.installations() == 0


def test_pip_is_asked_with_the_constraints_and_the_index(sandbox: Sandbox) -> None:
    """torch's version is the constraints', and an index given on the command line reaches pip."""
    sandbox.add_python("python3.11", "one")
    sandbox.run("setup demo --extra-index-url file:///wheels")
    (install,) = [call for call in sandbox.log.read_text().splitlines() if "pip install" in call]
    assert install.endswith("--extra-index-url file:///wheels -c constraints.txt -e .[demo]")
    assert "--no-input" in install


@pytest.mark.parametrize("arguments", [["--fault", "dropout"], ["--layer", "9"], ["--fault"], ["--what"]])
def test_the_demo_refuses_what_it_does_not_know(arguments: list[str]) -> None:
    """A wrong option is told before anything is installed."""
    result = subprocess.run(
        [str(REPOSITORY / "launch" / "demo.sh"), *arguments], capture_output=True, text=True, timeout=250, check=False
    )
    assert result.returncode == 2
    assert "usage: ./launch/demo.sh" in result.stderr


@pytest.mark.parametrize("script", sorted((REPOSITORY / "launch" / "demo").glob("*.py")), ids=lambda path: path.name)
def test_the_demos_programs_know_nothing_of_grafter(script: Path) -> None:
    """No line of code mentions it: `grafter locate --attach` alone says where to look."""
    mentions = [line for line in script.read_text().splitlines() if "grafter" in line and "knows nothing" not in line]
    assert mentions == []
