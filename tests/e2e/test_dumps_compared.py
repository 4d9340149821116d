"""What real programs dump is compared, whatever their shardings: one layer of the target has other weights."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from pair import LLAMA, LLAMA_TP, MEGATRON, Program, run_programs
from typer.testing import CliRunner

from grafter.cli.main import app

RULE = ("--threshold", "*: rel <= 1e-12")
FAULTY_LAYER = 2


@pytest.mark.parametrize("target", [LLAMA_TP, MEGATRON], ids=["llama-tp", "megatron"])
def test_the_first_divergence_is_where_the_weights_differ(target: Program, weights: Path, tmp_path: Path) -> None:
    """One rank's tensors against shards, also with dims in another order and fused ones: all before the layer agree."""
    programs = {"baseline": LLAMA, "target": target}
    run = run_programs(programs, {"dump_filter": "True"}, tmp_path, weights, [FAULTY_LAYER], steps=1)
    # Both have layers of their own, made from other seeds.
    result = CliRunner().invoke(app, ["compare", str(run.run_directory), *RULE, "--json"])
    lines = [json.loads(line) for line in result.stdout.splitlines()]
    points = {
        (line["name"], line["tags"]["layer_id"]): line["verdict"] for line in lines if line.get("kind") == "point"
    }
    assert result.exit_code == 1, result.output
    assert len(points) == 8 * 4
    failed = {(name, layer) for (name, layer), verdict in points.items() if verdict != "passed"}
    assert failed == {(name, layer) for name, layer in points if layer > FAULTY_LAYER} | {
        (name, FAULTY_LAYER) for name, _ in points if name != "layer_in"
    }
    first = lines[-1]["first_divergence"]
    assert ("layer_id=2" in first and "'q'" in first) or "'k'" in first or "'v'" in first, first
