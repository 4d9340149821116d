"""`grafter doctor` over real commands, and its witness in real processes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from grafter.cli.main import app
from grafter.tools.doctor import machine
from grafter.tools.doctor.examination import Examination
from grafter.tools.doctor.finding import Finding
from grafter.tools.doctor.notes import first_change, read_notes
from grafter.tools.doctor.repeats import judge_determinism
from grafter.tools.doctor.trials import EVERY_POINT, WITNESS_DIRECTORY, Laboratory

# Never mentions grafter. Words after the file's name change it.
PROGRAM = """
import os, sys
import torch

faults = sys.argv[1:]


class Net(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = torch.nn.Embedding(16, 8)
        self.drop = torch.nn.Dropout(0.5)
        if "extra" in faults:
            self.extra = torch.nn.Linear(8, 8)
        self.head = torch.nn.Linear(8, 4)

    def forward(self, input_ids):
        hidden = self.drop(self.embed(input_ids))
        return self.head(self.extra(hidden) if "extra" in faults else hidden)


torch.manual_seed(0)
net = Net()
net.train("dropout" in faults)
if "unseeded" in faults:
    torch.seed()
if "feels watched" in faults and os.environ["GRAFTER_ENABLE"] == "1":
    net.head.weight.data *= 2
# torch's optimizers import its compiler, which costs as much again as this program.
optimizer = torch.optim.SGD(net.parameters(), lr=0.1) if "optimizer" in faults else None
for step in range(2):
    net(torch.arange(6).reshape(2, 3)).square().mean().backward()
    if optimizer is not None:
        optimizer.step()
    else:
        with torch.no_grad():
            for parameter in net.parameters():
                parameter -= 0.1 * parameter.grad
    net.zero_grad()
"""


@pytest.fixture(autouse=True)
def one_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "1")


@pytest.fixture
def program(tmp_path: Path) -> str:
    (tmp_path / "program.py").write_text(PROGRAM)
    return str(tmp_path / "program.py")


def examine(tmp_path: Path, *, filters: dict[str, str] | None = None, **commands: str) -> dict[str, list[Finding]]:
    examination = Examination(
        commands, out=tmp_path / "out", settings={"attach": "*"}, filters=filters or {}, tell=lambda text: None
    )
    found: dict[str, list[Finding]] = {}
    for finding in examination.findings():
        found.setdefault(finding.check, []).append(finding)
    return found


@pytest.mark.timeout(400)
def test_a_pair_is_examined_from_end_to_end(program: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A baseline that is well is called so; a target with four faults has each of them named."""
    monkeypatch.setattr(machine, "check_machine", lambda out, master: iter(()))
    arguments = ["--baseline", f"{sys.executable} {program}", "--attach", "*", "--json", "--out", str(tmp_path / "out")]
    arguments += ["--target", f"{sys.executable} {program} dropout extra 'feels watched'", "--compare", "nam == 'x'"]
    result = CliRunner().invoke(app, ["doctor", *arguments])
    assert result.exit_code == 1, result.output
    found: dict[str, list[dict[str, str]]] = {}
    for finding in json.loads(result.stdout)["findings"]:
        found.setdefault(finding["check"], []).append(finding)
    for check in ("runs", "repeatable", "observer effect", "self-graft"):
        assert found[f"baseline: {check}"][0]["level"] == "ok", found[f"baseline: {check}"]
    assert "2 model calls, 3 weights at the end, random states" in found["baseline: observer effect"][0]["text"]
    assert found["target: repeatable"][0]["level"] == "ok"
    assert found["target: observer effect"][0]["level"] == "fault"
    assert "weight head.weight of the first call differs" in found["target: observer effect"][0]["text"]
    assert found["dropout"][0]["text"] == "active on only one side: target: drop"
    assert found["inputs"][0]["text"] == "equal at the first call: input_ids"
    assert "only in the target: extra.in.input, extra.out" in found["names"][0]["text"]
    assert "a filter never matched: compare: nam == 'x'" in found["filter"][0]["text"]


@pytest.mark.timeout(200)
def test_a_program_that_is_not_deterministic_is_told_with_its_cause(program: str, tmp_path: Path) -> None:
    """The first point that is not the same, in the order of steps, and dropout as the cause."""
    command = [sys.executable, program, "dropout", "unseeded", "optimizer"]
    trial = Laboratory(tmp_path / "out", {"attach": "*"}).run("x", command, command, {"compare_filter": EVERY_POINT})
    found, repeatable = judge_determinism("baseline", trial)
    assert not repeatable
    assert found.level == "fault"
    assert "differ in two copies, first drop.out at step 0" in found.text
    assert found.advice.startswith("Dropout is active in drop")


@pytest.mark.timeout(200)
@pytest.mark.parametrize(
    ("command", "check", "word"),
    [
        ("{python} -c 1/0", "command: runs", "ZeroDivisionError"),
        ("{python} -I {program}", "command: command", "python -I"),
        ("sh -c '{python} -E -c pass'", "command: reach", "all of its Pythons ignore PYTHONPATH"),
        ("{python} -c 'import torch'", "command: reach", "calls no torch model"),
    ],
)
def test_a_command_that_grafter_cannot_reach_is_told_why(
    program: str, tmp_path: Path, command: str, check: str, word: str
) -> None:
    """Each cause has its own words, and the examination ends there."""
    found = examine(tmp_path, baseline=command.format(python=sys.executable, program=program))
    assert [finding.level for finding in found[check]] == ["fault"]
    assert word in found[check][0].text
    assert check in list(found)[-1:]
    assert not (tmp_path / "out").exists()


# The witness.

COMPILED = """
import torch

class Net(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = torch.nn.Linear(4, 4)
        self.drop = torch.nn.Dropout(0.5)

    def forward(self, x):
        return self.drop(self.linear(x)) * 2

torch.manual_seed(1)
net, own = Net(), Net()
net.linear.register_forward_hook(lambda module, args, out: out * 2)
whole = torch.compile(net, backend="eager", fullgraph=True)
own.compile(backend="eager", fullgraph=True)
print(whole(torch.ones(2, 4)).sum().item(), own(torch.ones(2, 4)).sum().item(), torch.rand(()).item())
"""


def run_python(code: str, notes: Path | None, path: str = "") -> str:
    environ = {**os.environ, "PYTHONPATH": path, "GRAFTER_ROLE": "baseline"}
    if notes is not None:
        notes.mkdir(parents=True)
        environ |= {"PYTHONPATH": os.pathsep.join([str(WITNESS_DIRECTORY), path]), "_GRAFTER_WITNESS": str(notes)}
    done = subprocess.run([sys.executable, "-c", code], env=environ, capture_output=True, text=True, check=True)
    assert done.stderr == ""
    return done.stdout


@pytest.mark.timeout(200)
def test_the_witness_is_not_noticed(tmp_path: Path) -> None:
    """Compiled code is whole with it, draws the same random numbers, and a start-up module behind it is run."""
    (tmp_path / "sitecustomize.py").write_text("print('mine')")
    alone = run_python(COMPILED, None, str(tmp_path))
    assert alone.startswith("mine")
    watched = [run_python(COMPILED, tmp_path / name, str(tmp_path)) for name in ("a", "b")]
    assert watched == [alone, alone]
    one, other = (read_notes(tmp_path / name)["baseline"] for name in ("a", "b"))
    (process,) = one.processes
    assert process.trouble == []
    assert (one.uses_grafter, process.rank, process.first["dropout"]) == (False, 0, ["drop"])
    assert process.first["inputs"]["x"]["shape"] == [2, 4]
    assert set(process.end["weights"] if process.end else ()) == {"linear.weight", "linear.bias"}
    assert first_change(one, other) is None


def test_tensors_of_every_kind_have_digests() -> None:
    """Equal values have equal ones whatever the strides; whole numbers by value; what differs in a bit differs."""
    import torch

    from grafter.tools.doctor.witness import _grafter_witness as witness

    def digest(tensor: Any) -> str:
        found: str = witness._describe(tensor)["digest"]
        return found

    base = torch.arange(6.0).reshape(2, 3)
    assert digest(base) == digest(base.t().contiguous().t())
    assert digest(base) != digest(base + torch.finfo(torch.float32).eps)
    assert digest(base) != digest(base.reshape(3, 2))
    assert digest(torch.tensor([1, 2])) == digest(torch.tensor([1, 2], dtype=torch.int32))
    for dtype in (torch.bfloat16, torch.float8_e4m3fn, torch.complex64, torch.bool):
        assert digest(torch.ones(3).to(dtype)) != digest(torch.zeros(3).to(dtype))
    assert digest(torch.empty(0)) == digest(torch.empty(0))
    assert "digest" not in witness._describe(torch.empty(3, device="meta"))
