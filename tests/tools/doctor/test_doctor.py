"""`grafter doctor` alone: each check of a machine, well and with a fault that is really there where one can be made."""

from __future__ import annotations

import io
import json
import os
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from typer.testing import CliRunner

from grafter.cli.doctor_page import Page, as_json, describe
from grafter.cli.main import app
from grafter.errors import JoinError
from grafter.tools.doctor import machine, network
from grafter.tools.doctor.finding import Finding, fault, has_fault, ok, warning
from grafter.tools.doctor.machine import check_environment
from grafter.tools.doctor.network import check_sharing
from grafter.wire.store_client import HostedStore


@pytest.fixture(scope="module")
def healthy(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Finding]:
    """All findings about this machine, which is well."""
    with pytest.MonkeyPatch.context() as patch:
        for name in list(os.environ):
            if name.startswith(("GRAFTER_", "DUMPER_GRAFTER_")):
                patch.delenv(name)
        findings = list(machine.check_machine(tmp_path_factory.mktemp("doctor") / "not yet" / "out"))
    return {finding.check: finding for finding in findings}


# The machine as it is.


def test_a_machine_that_runs_these_tests_has_no_fault(healthy: dict[str, Finding]) -> None:
    """Every check gives one finding, and nothing that the rest of the tests need is a fault."""
    assert list(healthy) == [
        *("Python", "torch", "packages", "CUDA", "start-up module"),
        *("system", "processor", "memory", "disk", "/proc", "clock", "open files"),
        *("shared memory", "store", "gloo", "own name", "GRAFTER_* variables", "launcher variables"),
    ]
    assert not has_fault(healthy.values())


@pytest.mark.parametrize("check", ["shared memory", "store", "gloo", "/proc", "start-up module", "packages", "torch"])
def test_what_these_tests_use_is_found_well(healthy: dict[str, Finding], check: str) -> None:
    """What was really tried here worked."""
    assert healthy[check].level == "ok", healthy[check]


def test_the_machine_is_left_as_it_was(tmp_path: Path) -> None:
    """The trial of the disk leaves neither a file nor the directory that it is about."""
    assert machine.check_disk(tmp_path / "out").level == "ok"
    assert list(tmp_path.iterdir()) == []


def test_a_check_that_falls_over_is_a_finding(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """What a check did not foresee ends neither the others nor the program."""
    monkeypatch.setattr(machine, "check_memory", lambda free: 1 / 0)
    monkeypatch.setattr(network, "check_network", lambda master: iter([ok("network", "reached")]))
    findings = list(machine.check_machine(tmp_path))
    assert any("ZeroDivisionError" in finding.text and finding.level == "fault" for finding in findings)
    assert "reached" in [finding.text for finding in findings]


# Software.


@pytest.mark.parametrize(
    ("version", "level"), [((3, 9, 18), "fault"), ((3, 10, 1), "ok"), ((3, 11, 7), "ok"), ((3, 14, 0), "ok")]
)
def test_python_by_its_version(version: tuple[int, ...], level: str) -> None:
    """Older than the package asks for is a fault."""
    assert machine.check_python(version).level == level


@pytest.mark.parametrize(
    ("version", "level"),
    [("2.5.1", "fault"), ("2.6.0", "ok"), ("2.13.0+cpu", "ok"), ("2.14.0.dev1", "warning"), ("odd", "fault")],
)
def test_torch_by_its_version(version: str, level: str) -> None:
    """Tested ones are well, newer ones unknown, older ones refused."""
    assert machine.check_torch(version).level == level


def test_a_package_that_is_missing_is_named() -> None:
    """The fault names what is not installed."""
    found = machine.check_packages(["typer", "no-such-package-of-grafter"])
    assert (found.level, found.text) == ("fault", "not installed: no-such-package-of-grafter")


@pytest.mark.parametrize("option", ["-I", "-E", "-S"])
def test_a_python_that_ignores_the_path_is_told(option: str) -> None:
    """The start-up module is asked for in a real Python, and its absence is what `--attach` would suffer from."""
    found = machine.check_startup([sys.executable, option], os.environ)
    assert found.level == "warning"
    assert "-I, -E or -S" in found.advice


def test_a_start_up_module_that_is_hidden_runs_all_the_same(tmp_path: Path) -> None:
    """One of the user's is named; one that fails is told with its last line."""
    (tmp_path / "sitecustomize.py").write_text("")
    inherited = {**os.environ, "PYTHONPATH": str(tmp_path)}
    found = machine.check_startup([sys.executable], inherited)
    assert found.level == "ok"
    assert str(tmp_path / "sitecustomize.py") in found.text
    (tmp_path / "sitecustomize.py").write_text("import no_such_module_of_mine")
    found = machine.check_startup([sys.executable], inherited)
    assert found.level == "warning"
    assert "no_such_module_of_mine" in found.text


def test_a_python_that_is_not_there_is_a_fault() -> None:
    """The start itself may fail."""
    assert machine.check_startup(["/no/such/python"], os.environ).level == "fault"


# The system.


def test_a_disk_that_takes_nothing_is_a_fault(tmp_path: Path) -> None:
    """Under a real limit of 4 KiB a file, neither the trial of the disk nor a shared block of memory can be made."""
    code = (
        "import resource, sys, pathlib\n"
        "from grafter.tools.doctor import machine, network\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))\n"
        "for found in (machine.check_disk(pathlib.Path(sys.argv[1])), network.check_sharing()):\n"
        "    print(found.level, found.text)\n"
    )
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, check=True)
    disk, sharing = done.stdout.splitlines()
    assert disk == f"fault nothing can be written under {tmp_path}: File too large"
    assert sharing.startswith("warning tensors cannot be shared between processes: 64 MiB cannot be reserved")


def test_an_output_directory_that_is_a_file_is_a_fault(tmp_path: Path) -> None:
    """It is told before a run would end with it."""
    (tmp_path / "out").write_text("")
    assert machine.check_disk(tmp_path / "out").level == "fault"


def test_little_disk_is_a_warning(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The bound is what this machine has, and a byte."""
    monkeypatch.setattr(machine, "_LEAST_FREE_DISK_BYTES", 1 << 62)
    assert machine.check_disk(tmp_path).level == "warning"


@pytest.mark.parametrize(
    ("found", "level"),
    [
        (machine.check_platform("linux"), "ok"),
        (machine.check_platform("darwin"), "fault"),
        (machine.check_cores(1), "warning"),
        (machine.check_cores(2), "ok"),
        (machine.check_memory(1 << 20), "warning"),
        (machine.check_memory(None), "warning"),
        (machine.check_memory(1 << 36), "ok"),
        (machine.check_open_files(256), "warning"),
        (machine.check_open_files(1024), "ok"),
        (machine.check_open_files(-1), "ok"),
        (machine.check_clock(time.time(), machine.package_time()), "ok"),
        (machine.check_clock(0.0, machine.package_time()), "warning"),
    ],
)
def test_what_is_judged_by_a_number(found: Finding, level: str) -> None:
    """Bounds are where the words say they are."""
    assert found.level == level


def test_proc_that_is_not_mounted_is_a_warning(monkeypatch: pytest.MonkeyPatch) -> None:
    """As in a container that hides it."""
    monkeypatch.setattr(machine, "process_state", lambda pid: ("", 0))
    found = machine.check_proc()
    assert found.level == "warning"
    assert "60 s" in found.advice


def test_a_system_without_memfd_falls_back(monkeypatch: pytest.MonkeyPatch) -> None:
    """It is no fault: gloo takes its place."""
    assert check_sharing().level == "ok"
    monkeypatch.delattr(os, "memfd_create")
    found = check_sharing()
    assert found.level == "warning"
    assert "memfd_create" in found.text
    assert "gloo" in found.advice


# The network.


def test_a_store_that_is_reached_is_well() -> None:
    """Found, connected to and asked."""
    store = HostedStore()
    try:
        (found,) = network.check_master("localhost", store.port)
    finally:
        store.close()
    assert found.level == "ok"
    assert "127.0.0.1, looked up in" in found.text


def test_a_store_that_is_not_there_is_a_fault() -> None:
    """A closed port, and a name without an address, each with its own advice."""
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        port = unused.getsockname()[1]
        (refused,) = network.check_master("127.0.0.1", port)
    assert (refused.level, refused.text) == ("fault", "not reached: Connection refused")
    assert f"--host-store {port}" in refused.advice
    (nameless,) = network.check_master("no-such-host.invalid", 29400)
    assert nameless.level == "fault"
    assert "has no address" in nameless.text


def test_something_else_that_listens_is_no_store(monkeypatch: pytest.MonkeyPatch) -> None:
    """A port that accepts and says nothing is told apart from a store."""
    monkeypatch.setattr(network, "_CONNECT_SECONDS", 1.0)
    with socket.create_server(("127.0.0.1", 0)) as listener:
        (found,) = network.check_master("127.0.0.1", listener.getsockname()[1])
    assert found.level == "fault"
    assert found.text.startswith("something listens there, but it is not a store")


def test_a_store_that_cannot_be_hosted_is_a_fault(monkeypatch: pytest.MonkeyPatch) -> None:
    """The reason is the store's own; the gloo group, which needs one, says so, too."""

    def refuse(address: str, port: int) -> Any:
        raise JoinError("cannot host the rendezvous store: no loopback")

    monkeypatch.setattr("grafter.wire.store_client.serve", refuse)
    assert "no loopback" in network.check_store().text
    assert [network.check_store().level, network.check_gloo().level] == ["fault", "fault"]


def test_a_gloo_group_that_never_comes_about_is_a_fault(monkeypatch: pytest.MonkeyPatch) -> None:
    """The check ends all the same, after its own patience."""
    monkeypatch.setattr(network, "_PATIENCE_SECONDS", 0.05)
    monkeypatch.setattr(network, "_try_gloo", lambda: time.sleep(1))
    found = network.check_gloo()
    assert found.level == "fault"
    assert "no answer within" in found.text


def test_a_name_without_an_address_or_slow_to_look_up_is_a_warning(monkeypatch: pytest.MonkeyPatch) -> None:
    """Both are seen as stalls of torch."""
    assert network.check_own_name("no-such-host.invalid").level == "warning"
    assert network.check_own_name("localhost").level == "ok"
    monkeypatch.setattr(network, "_SLOW_LOOKUP_SECONDS", -1.0)
    assert "/etc/hosts" in network.check_own_name("localhost").advice


# The environment.


@pytest.mark.parametrize(
    ("environ", "levels", "word"),
    [
        ({}, ["ok", "ok"], "none set"),
        ({"GRAFTER_TIMEOUT": "60", "PATH": "/bin"}, ["ok", "ok"], "GRAFTER_TIMEOUT"),
        ({"GRAFTER_TIMEUOT": "60"}, ["fault", "ok"], "did you mean GRAFTER_TIMEOUT?"),
        ({"GRAFTER_TIMEOUT": "soon"}, ["fault", "ok"], "it must be a number"),
        ({"GRAFTER_COMPARE_FILTER": "name ="}, ["fault", "ok"], "GRAFTER_COMPARE_FILTER"),
        ({"GRAFTER_ENABLE": "1"}, ["warning", "ok"], "waits for another job"),
        ({"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "x"}, ["ok", "warning"], "MASTER_ADDR, RANK, WORLD_SIZE"),
        ({"TORCHELASTIC_RUN_ID": "x"}, ["ok", "warning"], "TORCHELASTIC_RUN_ID"),
    ],
)
def test_variables_that_mislead_are_told(environ: dict[str, str], levels: list[str], word: str) -> None:
    """Misspelt and illegal settings are faults, what a launcher left behind is a warning."""
    findings = list(check_environment(environ))
    assert [finding.level for finding in findings] == levels
    assert word in " ".join(finding.text for finding in findings)


# The page and the command.


def test_a_finding_that_is_not_well_says_what_to_do() -> None:
    """No warning and no fault without advice."""
    with pytest.raises(AssertionError, match="says what to do"):
        warning("clock", "it is wrong", "")


def test_a_pipe_gets_whole_lines_and_a_terminal_wrapped_ones() -> None:
    """In a pipe a finding is one line and its advice another, without escape sequences."""
    long = fault("disk", "full " * 40, "Free some.")
    piped, shown = io.StringIO(), io.StringIO()
    Page(Console(file=piped, width=60, color_system=None)).show(long)
    assert piped.getvalue().splitlines() == [
        f"fault    {'disk'.ljust(22)}  {'full ' * 40}",
        f"{' ' * 33}-> Free some.",
    ]
    Page(Console(file=shown, width=60, force_terminal=True)).show(long)
    assert len(shown.getvalue().splitlines()) > 3
    assert "\x1b[" in shown.getvalue()


def test_the_last_sentence_counts() -> None:
    """It says whether there is something to do."""
    assert describe([ok("a", "b")]) == "No fault and no warning."
    assert describe([warning("a", "b", "c")]) == "No fault; 1 warning."
    assert describe([fault("a", "b", "c")] * 2).startswith("2 faults, 0 warnings")
    assert json.loads(as_json([fault("a", "b", "c")]))["fault"] is True


def test_the_command_prints_json_and_exits_by_its_faults(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Exit code 0 without a fault, 1 with one; stdout is JSON alone."""
    found = [ok("disk", "there is room")]
    monkeypatch.setattr(machine, "check_machine", lambda out, master: iter(found))
    result = CliRunner().invoke(app, ["doctor", "--json", "--out", str(tmp_path)])
    assert result.exit_code == 0
    assert json.loads(result.stdout)["findings"][0]["check"] == "disk"
    found.append(fault("clock", "it stands still", "Wind it up."))
    result = CliRunner().invoke(app, ["doctor", "--baseline", "true", "--compare", "1", "--out", str(tmp_path)])
    assert result.exit_code == 1
    assert "the commands were not run" in result.stdout
    assert "-> Wind it up." in result.stdout


@pytest.mark.parametrize(
    ("arguments", "word"),
    [
        (["--attach", "*"], "--baseline CMD"),
        (["--master", "here"], "HOST:PORT"),
        (["--baseline", "no-such-program-here"], "PATH"),
        (["--baseline", "true", "--compare", "name ="], "compare"),
        (["--baseline", "true", "--attach", "x", "--set", "attach=y"], "given twice"),
    ],
)
def test_wrong_usage_is_told(monkeypatch: pytest.MonkeyPatch, arguments: list[str], word: str) -> None:
    """Exit code 2, before anything is started."""
    monkeypatch.setattr(machine, "check_machine", lambda out, master: iter(()))
    result = CliRunner().invoke(app, ["doctor", *arguments])
    assert result.exit_code == 2
    assert word in result.stderr
