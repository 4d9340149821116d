"""Models of programs that never import grafter: which processes are reached, which are left alone, what it leaves."""

from __future__ import annotations

import ast
import importlib.metadata
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from grafter.rank.job_environment import STARTUP_DIRECTORY, job_environment, what_defeats_attach
from grafter.version import VERSION

HERE = Path(__file__).parents[2] / "parts"
PROGRAMS = str(HERE / "startup_programs.py")
# A program is mostly an import of torch, which takes long where others use the cores.
pytestmark = pytest.mark.timeout(300)
SETTINGS = {
    "GRAFTER_ENABLE": "1",
    "GRAFTER_ROLE": "target",
    "GRAFTER_MASTER_PORT": "1",  # nobody is there: no filter matches, so no point waits
    "GRAFTER_COMPARE_FILTER": "name == 'none'",
    "GRAFTER_ATTACH": "*",
    "OMP_NUM_THREADS": "1",
}
# What a call of Model of two layers gives.
CALL = {
    "root.in.x": 1,
    "layers.in.x": 2,
    "layers.up.in.input": 2,
    "layers.up.out": 2,
    "layers.out": 2,
    "root.out": 1,
}


def environment(**changes: str | None) -> dict[str, str]:
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("GRAFTER_")}
    merged: dict[str, str | None] = {**inherited, **SETTINGS, "PYTHONPATH": STARTUP_DIRECTORY, **changes}
    return {name: value for name, value in merged.items() if value is not None}


def run(*words: str, **changes: str | None) -> str:
    done = subprocess.run(
        [sys.executable, *words], env=environment(**changes), capture_output=True, text=True, timeout=280, cwd=HERE
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def program(*words: str, **changes: str | None) -> Any:
    return json.loads(run(PROGRAMS, *words, **changes).splitlines()[-1])


# One model or more, in one process.
IN_ONE_PROCESS = (
    "two_models",
    "attaches_late",
    "chunks",
    "copies",
    "made_anew",
    "in_a_list",
    "held_by_nothing",
    "grown",
    "part_called_alone",
    "built_with_a_call",
    "loss_first",
    "forward_alone",
    "compiled",
    "counts_itself",
    "training",
    "training:optimizer",
    "training:forward",
    "training:manual",
)


@pytest.fixture(scope="module")
def forked() -> dict[str, Any]:
    """What each program of `IN_ONE_PROCESS` found, by name; of one that failed, nothing."""
    done = subprocess.run(
        [sys.executable, PROGRAMS, "each", *IN_ONE_PROCESS],
        env=environment(),
        stdout=subprocess.PIPE,
        text=True,
        timeout=280,
        cwd=HERE,
    )
    return {name: result for line in done.stdout.splitlines() for name, result in json.loads(line).items()}


def times(counts: dict[str, int], factor: int) -> dict[str, int]:
    return {name: factor * count for name, count in counts.items()}


def under(prefix: str, counts: dict[str, int]) -> dict[str, int]:
    return {f"{prefix}.{name}": count for name, count in counts.items()}


# --- one process ---------------------------------------------------------------------------------------------------


def test_a_program_is_reached_and_torch_has_no_global_hook_afterwards() -> None:
    """Each call's points come, each outermost call without gradients is a step, and calls cost nothing global."""
    result = program("plain")
    assert result["points"] == times(CALL, 3)
    assert result["step"] == 2
    assert result["hooks"] == 0
    assert not result["armed"]
    assert result["torch"][:2] == ["Module._wrapped_call_impl", False]


@pytest.mark.parametrize("off", ["GRAFTER_ENABLE", "GRAFTER_ATTACH"])
def test_off_leaves_torch_as_it_is(off: str) -> None:
    """Without either setting torch is not touched, though the start-up module ran."""
    result = program("plain", **{off: None})
    assert result["torch"] == ["Module._wrapped_call_impl", False, False, 0]
    assert result["points"] is None


def test_a_program_that_makes_no_module_is_never_armed() -> None:
    """What is imported of grafter is little, and neither pydantic nor the Grafter is among it."""
    result = program("no_module")
    assert not result["armed"]
    assert result["torch"][:2] == ["Module._wrapped_call_impl", False]
    assert not result["pydantic"]
    assert "grafter.rank.grafter" not in result["grafter"]


def test_a_python_without_torch_imports_nothing_of_grafter() -> None:
    """The start-up module alone runs, whatever is asked for."""
    code = "import sys; print([name for name in sys.modules if name.startswith(('grafter', 'torch', 'pydantic'))])"
    assert run("-c", code) == "[]\n"


def test_models_beside_the_first_have_their_class_or_variable_in_front_of_their_names(forked: dict[str, Any]) -> None:
    """Those that are there at the first call are attached with it, a later one at its own; a second one of a class is
    called by the variable that holds it, not by a number, which would be that of its call."""
    reward = {"head.in.input": 1, "head.out": 1, "root.in.x": 1, "root.out": 1}
    assert forked["two_models"]["points"] == {**CALL, **under("Reward", reward), **under("late", reward)}


def test_a_model_that_the_program_attaches_by_itself_has_each_point_once(forked: dict[str, Any]) -> None:
    """From then on it has the points that the program asks for; other models stay attached."""
    own = {"layers.in.x": 2 + 3, "layers.out": 2 + 3}
    reward = {"head.in.input": 1, "head.out": 1, "root.in.x": 1, "root.out": 1}
    assert forked["attaches_late"]["points"] == {**CALL, **own, **under("Reward", reward)}


def test_chunks_of_one_model_share_its_names(forked: dict[str, Any]) -> None:
    assert forked["chunks"]["points"] == times(CALL, 2)


def test_a_deep_copy_computes_with_its_own_weights_and_has_names_of_its_own(forked: dict[str, Any]) -> None:
    result = forked["copies"]
    assert result["outputs"][0] > 0
    assert result["outputs"][1] == 0
    assert result["points"] == {**times(CALL, 2), **under("average", CALL)}


def test_a_model_that_is_made_anew_keeps_the_names_of_the_one_before(forked: dict[str, Any]) -> None:
    """Also where another of its class lives on, and the models that are gone are freed."""
    result = forked["made_anew"]
    assert result["points"] == {**times(CALL, 3), **under("kept", times(CALL, 3))}
    assert result["alive"] == 1


def test_models_in_a_list_are_called_by_their_places(forked: dict[str, Any]) -> None:
    assert forked["in_a_list"]["points"] == {**CALL, **under("models.1", CALL), **under("models.2", CALL)}


def test_a_further_model_of_a_class_that_no_variable_holds_has_no_points(forked: dict[str, Any]) -> None:
    """Nothing says which of the other job's models it is."""
    assert forked["held_by_nothing"]["points"] == CALL


def test_modules_that_a_model_gets_later_have_points_too(forked: dict[str, Any]) -> None:
    layer = ("layers.in.x", "layers.up.in.input", "layers.up.out", "layers.out")
    assert forked["grown"]["points"] == {**times(CALL, 2), **dict.fromkeys(layer, 5)}


def test_a_part_that_is_called_by_itself_has_the_names_of_the_whole(forked: dict[str, Any]) -> None:
    expected = {name: count if name.startswith("root") else count + 1 for name, count in CALL.items()}
    assert forked["part_called_alone"]["points"] == expected


def test_a_call_while_a_model_is_being_built_is_none(forked: dict[str, Any]) -> None:
    """The whole is attached, at its first call, and with its own names."""
    points = forked["built_with_a_call"]["points"]
    assert points["root.out"] == points["body.out"] == points["head.out"] == 1


def test_what_has_no_parameters_is_no_model(forked: dict[str, Any]) -> None:
    """A loss that is called first attaches nothing and joins no run."""
    result = forked["loss_first"]
    assert result["before"] is None
    assert result["points"] == CALL


def test_a_model_called_through_forward_is_reached(forked: dict[str, Any]) -> None:
    """Its parts from the first call on, its own inputs and output from the second."""
    points = forked["forward_alone"]["points"]
    assert points["layers.out"] == 4
    assert points["root.out"] == points["root.in.x"] == 1


def test_a_model_that_compiled_code_calls_first_is_reached(forked: dict[str, Any]) -> None:
    """And the compiler has torch's own function again, not the one that awaited the call."""
    result = forked["compiled"]
    # Of what no filter can match, compiled code keeps nothing that would count.
    assert result["points"] == times(CALL, 0)
    assert result["step"] == 2
    assert result["torch"][:2] == ["Module._wrapped_call_impl", False]


# --- steps ---------------------------------------------------------------------------------------------------------


def test_an_optimizers_step_ends_a_step_and_so_does_a_call_without_gradients(forked: dict[str, Any]) -> None:
    """Microbatches share one; what comes after the optimizer is in the next."""
    assert forked["training"] == [0, 0, 1, 2, 2, 3]


@pytest.mark.parametrize(
    ("mode", "steps"),
    [("optimizer", [0, 0, 1, 1, 1, 2]), ("forward", [0, 1, 2, 3, 4, 5]), ("manual", [0, 0, 0, 0, 0, 0])],
)
def test_what_ends_a_step_can_be_chosen(forked: dict[str, Any], mode: str, steps: list[int]) -> None:
    assert forked[f"training:{mode}"] == steps


def test_a_program_that_counts_its_steps_is_left_to_it(forked: dict[str, Any]) -> None:
    """Of 3 iterations of 2 calls, grafter.step() counts 3."""
    assert forked["counts_itself"]["step"] in (3, 4)


# --- other processes -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["spawn", "fork", "forkserver"])
def test_children_that_call_a_model_are_reached(method: str) -> None:
    """A parent that calls none stays out of it."""
    result = program("in_child", method)
    assert result["child"]["points"] == CALL
    assert result["parent"]["points"] is None


@pytest.mark.parametrize("method", ["spawn", "fork"])
def test_children_of_a_rank_are_helpers(method: str) -> None:
    """They have no points and no hooks, and the rank keeps its own."""
    result = program("child_of_rank", method)
    assert result["parent"]["points"] == times(CALL, 2)
    assert result["child"]["hooks left"] == 0
    assert not result["child"]["armed"]
    if method == "spawn":
        assert result["child"]["points"] is None
    else:
        assert result["child"]["points"] == CALL  # inherited from before the fork, and no more


def test_a_data_loaders_worker_joins_nothing() -> None:
    result = program("data_loader")
    assert result["left alone"] == [1.0, 1.0]
    assert result["points"] is None


def test_ranks_of_torchrun_are_reached_and_its_agent_is_not() -> None:
    words = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", PROGRAMS, "plain"]
    lines = [json.loads(line) for line in re.findall(r"\{.*?\}\}?(?=\n|\{|$)", run(*words))]
    assert sorted(line["rank"] for line in lines) == [0, 1]
    assert all(line["points"] == times(CALL, 3) for line in lines)


# --- how Python is started -----------------------------------------------------------------------------------------


def test_a_module_started_by_name_is_reached() -> None:
    assert json.loads(run("-m", "startup_programs", "plain"))["points"] == times(CALL, 3)


def test_the_sitecustomize_that_is_hidden_runs_once_and_what_it_raises_is_told(tmp_path: Path) -> None:
    """As `sitecustomize`, from the place where it is, with the program reached all the same."""
    (tmp_path / "sitecustomize.py").write_text("import sys\nsys.hidden = getattr(sys, 'hidden', []) + [__file__]\n")
    path = os.pathsep.join([STARTUP_DIRECTORY, str(tmp_path)])
    code = "import sys, sitecustomize; print(sys.hidden == [sitecustomize.__file__])"
    assert run("-c", code, PYTHONPATH=path) == "True\n"
    (tmp_path / "sitecustomize.py").write_text("raise ValueError('mine')\n")
    done = subprocess.run(
        [sys.executable, PROGRAMS, "plain"],
        env=environment(PYTHONPATH=path),
        capture_output=True,
        text=True,
        timeout=250,
    )
    assert "ValueError: mine" in done.stderr
    assert json.loads(done.stdout)["points"] == times(CALL, 3)


def test_a_job_keeps_the_users_pythonpath_behind_ours() -> None:
    def path(inherited: dict[str, str], settings: dict[str, str]) -> str | None:
        made = job_environment(inherited, "target", settings, master=("127.0.0.1", 1), directory=None, run_name=None)
        return made.get("PYTHONPATH")

    assert path({}, {}) is None
    assert path({"PYTHONPATH": "/a:/b"}, {}) == "/a:/b"
    assert path({}, {"attach": "*"}) == STARTUP_DIRECTORY
    assert path({"PYTHONPATH": "/a:/b"}, {"attach": "*"}) == f"{STARTUP_DIRECTORY}:/a:/b"
    assert path({"PYTHONPATH": "/a", "GRAFTER_ATTACH": "*"}, {}) == f"{STARTUP_DIRECTORY}:/a"
    assert path({"PYTHONPATH": "/a", "GRAFTER_ATTACH": "*"}, {"attach": ""}) == "/a"


@pytest.mark.parametrize(
    ("command", "defeated"),
    [
        ("python -I a.py", "-I"),
        ("python3.11 -uE a.py", "-E"),
        ("/usr/bin/python -W error -S -m a", None),
        ("python -S -m a", "-S"),
        ("python -u a.py -I", None),
        ("python -m a -S", None),
        ("python -c SIE", None),
        ("python -XI a.py", None),
        ("env A=1 python -I a.py", "-I"),
        ("env PYTHONPATH=x python a.py", "PYTHONPATH=x"),
        ("env -i python a.py", "env -i"),
        ("torchrun -I a.py", None),
        ("env", None),
    ],
)
def test_commands_that_keep_the_start_up_module_away_are_seen(command: str, defeated: str | None) -> None:
    found = what_defeats_attach(command.split())
    assert (defeated in found) if defeated is not None and found is not None else (found is None and defeated is None)


# --- whole runs ----------------------------------------------------------------------------------------------------

SIMPLE = """
import sys, torch
torch.manual_seed(0)
model = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.Tanh(), torch.nn.Linear(4, 4))
if sys.argv[1] == "wrong":
    model[2].weight.data[0, 0] += 1
with torch.no_grad():
    while True:
        model(torch.ones(1, 4))
        if sys.argv[2] != "forever":
            break
"""


def graft(tmp_path: Path, *options: str, **changes: str) -> subprocess.Popen[str]:
    kept = {name: value for name, value in os.environ.items() if not name.startswith("GRAFTER_")}
    return subprocess.Popen(
        [sys.executable, "-m", "grafter.cli.main", "run", "--out", str(tmp_path / "out"), *options],
        env={**kept, "OMP_NUM_THREADS": "1", **changes},
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip


def commands(tmp_path: Path, python: str = sys.executable, last: str = "once") -> list[str]:
    (tmp_path / "simple.py").write_text(SIMPLE)
    script = str(tmp_path / "simple.py")
    return ["--baseline", f"{sys.executable} {script} right {last}", "--target", f"{python} {script} wrong {last}"]


def test_a_pair_that_never_heard_of_grafter_is_compared_module_by_module(tmp_path: Path) -> None:
    """`--attach` may be given several times, and the plan file may say it instead."""
    (tmp_path / "plan.yaml").write_text('attach: ":Linear"\ncompare_filter: name.endswith(".out")\n')
    for options in (
        ["--attach", "0", "--attach", "2", "--compare", "name.endswith('.out')"],
        ["--plan", str(tmp_path / "plan.yaml")],
    ):
        job = graft(tmp_path, *commands(tmp_path), *options)
        output, _ = job.communicate(timeout=280)
        assert job.returncode == 0, output
        assert "2 compared" in output
        assert len(re.findall(r"compare compared", output)) == 2


def test_a_job_that_is_not_reached_is_named_with_the_reason(tmp_path: Path) -> None:
    job = graft(tmp_path, *commands(tmp_path, f"{sys.executable} -I"), "--attach", "*", "--compare", "True")
    output, _ = job.communicate(timeout=280)
    assert job.returncode == 1
    assert "--attach will not reach the target job: its command has python -I" in output
    assert "--attach reached no model in the target job" in output
    assert "reached no model in the baseline" not in output


def test_a_python_without_grafter_is_reached(tmp_path: Path) -> None:
    """Where the job's Python has the dependencies alone, it gets the package that `grafter run` is of."""
    python = python_without_grafter(tmp_path / "bare")
    known = subprocess.run([python, "-c", "import grafter"], capture_output=True, text=True, cwd=tmp_path, timeout=280)
    assert "ModuleNotFoundError" in known.stderr
    job = graft(tmp_path, *commands(tmp_path, python), "--attach", "2", "--compare", "name.endswith('.out')")
    output, _ = job.communicate(timeout=280)
    assert job.returncode == 0, output
    assert "1 compared" in output


def python_without_grafter(directory: Path) -> str:
    """An environment with what this one has but for grafter."""
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", directory], check=True, timeout=280)
    (own,) = {Path(path) for path in sys.path if Path(path, "torch").is_dir()}
    (its,) = directory.glob("lib/python*/site-packages")
    for entry in own.iterdir():
        if "grafter" not in entry.name:
            (its / entry.name).symlink_to(entry)
    return str(directory / "bin" / "python")


def test_the_version_needs_no_installation() -> None:
    """It is that of the package that runs, and what is installed says the same."""
    assert importlib.metadata.version("grafter") == VERSION


PLANNED = """
import torch
model = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.Tanh())
IMPORT
with torch.no_grad():
    for _ in range(3):
        model(torch.ones(1, 4))
        CALL
import os, sys
own = getattr(sys.modules.get("grafter._process"), "grafter", None)
print(dict(own._unmatched) if own is not None else None, flush=True)
os._exit(0)
"""


@pytest.mark.parametrize(
    ("imports", "call", "path", "points"),
    [
        ("import grafter", "grafter.step()", None, {"0.out": 2, "0.in.input": 2}),
        ("import grafter; grafter.step()", "pass", None, {"0.out": 3, "0.in.input": 3}),
        ("pass", "pass", STARTUP_DIRECTORY, {"0.out": 3, "0.in.input": 3}),
        ("import grafter; grafter.attach(model, '1')", "pass", None, {"1.out": 3, "1.in.input": 3}),
    ],
)
def test_a_plan_file_alone_attaches(
    tmp_path: Path, imports: str, call: str, path: str | None, points: dict[str, int]
) -> None:
    """From the program's first call of grafter on, or from its start where the start-up module is on the path. A
    program that attaches by itself has the points that it asks for."""
    (tmp_path / "plan.yaml").write_text('attach: "0"\n')
    (tmp_path / "program.py").write_text(PLANNED.replace("IMPORT", imports).replace("CALL", call))
    changes = {"GRAFTER_ATTACH": None, "GRAFTER_PLAN": str(tmp_path / "plan.yaml"), "PYTHONPATH": path}
    # The number of the module is its layer's.
    expected = {f"root.{name.partition('.')[2]}": count for name, count in points.items()}
    assert ast.literal_eval(run(str(tmp_path / "program.py"), **changes).splitlines()[-1]) == expected


def test_ctrl_c_leaves_no_process_of_programs_that_never_end(tmp_path: Path) -> None:
    job = graft(tmp_path, *commands(tmp_path, last="forever"), "--attach", "*", "--compare", "True")
    assert job.stdout is not None
    deadline = time.monotonic() + 250
    while not list(tmp_path.glob("out/*/target/rank0.ledger.jsonl")) and time.monotonic() < deadline:
        time.sleep(0.05)
    job.send_signal(signal.SIGINT)
    job.communicate(timeout=250)
    assert job.returncode == 130
    left = [path for path in Path("/proc").glob("[0-9]*/cmdline") if str(tmp_path) in _read(path)]
    assert left == []


def _read(path: Path) -> str:
    try:
        return path.read_text(errors="replace")
    except OSError:
        return ""
