"""Real jobs under torchrun: two on one host, through `grafter run` and by hand, and one beside plain python."""

from __future__ import annotations

import io
import os
import re
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from grafter.store.ledger import read_run
from grafter.tools.launch.launcher import PairResult, run_pair

ROOT = Path(__file__).parents[3]
CONCATENATE = ROOT / "transforms" / "concatenate.py"
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2"]

# A user's program: it knows nothing of the other job, and uses its own process group between points.
PROGRAM = """
import os
import sys
import torch
import torch.distributed as dist
import grafter

value, size = float(sys.argv[1]), int(sys.argv[2])
dist.init_process_group("gloo")
for step in range(2):
    x = torch.full((size,), value + dist.get_rank())
    grafter.dump("x", x, layer_id=3)
    total = x.sum()
    dist.all_reduce(total)
    os.write(1, f"rank {dist.get_rank()} step {step}: x={x.tolist()} total={total.item()}\\n".encode())
    grafter.step()
dist.destroy_process_group()
"""
PLAIN = """
import os
import torch
import grafter

for step in range(2):
    x = torch.zeros(4)
    grafter.dump("x", x, layer_id=3)
    os.write(1, f"plain step {step}: x={x.tolist()}\\n".encode())
    grafter.step()
"""


@pytest.fixture
def programs(tmp_path: Path) -> Path:
    (tmp_path / "program.py").write_text(PROGRAM)
    (tmp_path / "plain.py").write_text(PLAIN)
    return tmp_path


@pytest.fixture(autouse=True)
def clean_environment(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    for name in list(os.environ):
        if name.startswith(("GRAFTER_", "DUMPER_GRAFTER_")):
            monkeypatch.delenv(name)
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    # Two threads of OpenMP a rank would only wait for each other here.
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    yield


def outcomes(out: Path) -> dict[tuple[str, int], list[str]]:
    (run,) = [path for path in out.iterdir() if path.is_dir()]
    return {(role, rank): [record.outcome for record in records] for role, rank, records in read_run(run)}


def run(baseline: list[str], target: list[str], out: Path, **settings: str) -> tuple[PairResult, str]:
    output = io.StringIO()
    settings = {"b2t_filter": "name == 'x'", "timeout": "60", "join_timeout": "90", "log_level": "warning", **settings}
    result = run_pair(baseline, target, settings=settings, out=out, output=output)
    assert result.exit_codes == {"baseline": 0, "target": 0}, output.getvalue()
    return result, output.getvalue()


def printed(output: str, role: str) -> set[str]:
    """What ranks printed, whatever torchrun puts before it (`[default0]:`)."""
    return set(re.findall(rf"^\[{role}\] .*?((?:rank|plain) .*)$", output, re.MULTILINE))


def test_two_torchruns_on_one_host_graft_rank_to_rank(programs: Path) -> None:
    """Two commands that would both take port 29500 are kept apart; rank k of one serves rank k of the other."""
    program, out = str(programs / "program.py"), programs / "out"
    _, output = run([*TORCHRUN, program, "1", "4"], [*TORCHRUN, program, "100", "4"], out)
    expected = {f"rank {r} step {s}: x={[1.0 + r] * 4} total=12.0" for r in (0, 1) for s in (0, 1)}
    assert printed(output, "baseline") == expected
    assert printed(output, "target") == expected
    assert outcomes(out) == {
        **{("baseline", rank): ["sent"] * 2 for rank in (0, 1)},
        **{("target", rank): ["grafted"] * 2 for rank in (0, 1)},
    }


def test_torchrun_beside_plain_python_with_a_transform(programs: Path) -> None:
    """Two shards of two elements are put together for one process that has all four."""
    program, plain, out = str(programs / "program.py"), str(programs / "plain.py"), programs / "out"
    transform = f"{CONCATENATE}:transform"
    _, output = run([*TORCHRUN, program, "1", "2"], [sys.executable, plain], out, transform_path=transform)
    assert printed(output, "target") == {f"plain step {s}: x=[1.0, 1.0, 2.0, 2.0]" for s in (0, 1)}
    assert outcomes(out)["target", 0] == ["grafted"] * 2


def reserved_port() -> tuple[socket.socket, int]:
    """A port that nobody else gets while the socket lives (bound, no listener); baseline rank 0 may listen on it."""
    reserved = socket.socket()
    reserved.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    reserved.bind(("127.0.0.1", 0))
    return reserved, reserved.getsockname()[1]


def test_two_torchruns_started_by_hand_meet_at_baseline_rank_0(programs: Path) -> None:
    """Without `grafter run`, environment variables alone: baseline rank 0 hosts the store, though torchrun sets
    TORCHELASTIC_USE_AGENT_STORE, under which torch's own rendezvous would host none."""
    program, out = str(programs / "program.py"), programs / "out"
    reserved, port = reserved_port()
    processes = []
    try:
        for role, value in (("baseline", "1"), ("target", "100")):
            environ = {
                **os.environ,
                "GRAFTER_ENABLE": "1",
                "GRAFTER_ROLE": role,
                "GRAFTER_B2T_FILTER": "name == 'x'",
                "GRAFTER_MASTER_PORT": str(port),
                "GRAFTER_DIR": str(out),
                "GRAFTER_JOIN_TIMEOUT": "90",
                "GRAFTER_LOG_LEVEL": "warning",
            }
            command = [*TORCHRUN, "--standalone", program, value, "4"]
            processes.append(
                subprocess.Popen(command, env=environ, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
            )
        texts = [process.communicate(timeout=250)[0] for process in processes]
    finally:
        reserved.close()
        for process in processes:
            process.kill()
            process.wait()
    assert [process.returncode for process in processes] == [0, 0], "\n".join(texts)
    for rank in (0, 1):
        assert f"rank {rank} step 1: x={[1.0 + rank] * 4} total=12.0" in texts[1], texts[1]
    assert outcomes(out)["target", 1] == ["grafted"] * 2
