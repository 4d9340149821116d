"""Two jobs whose modules have other names: their run leaves their trees, and the suggested plan makes them meet."""

from __future__ import annotations

from pathlib import Path

import torch
from jobs import Jobs, Rank, succeed
from torch import nn
from typer.testing import CliRunner

import grafter
from grafter.capture.module_tree import read_role_trees
from grafter.cli.main import app


class Ours(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.input_layernorm = nn.LayerNorm(4)
        self.mlp = nn.Sequential()
        self.mlp.add_module("up_proj", nn.Linear(4, 8))
        self.mlp.add_module("down_proj", nn.Linear(8, 4))

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return hidden_states + self.mlp(self.input_layernorm(hidden_states))


class Theirs(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.feed_forward = nn.Sequential()
        self.feed_forward.add_module("w3", nn.Linear(4, 8))
        self.feed_forward.add_module("w2", nn.Linear(8, 4))
        self.attention_norm = nn.LayerNorm(4)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, None]:
        return x + self.feed_forward(self.attention_norm(x)), None


def run_model(rank: Rank) -> None:
    """Each rank of a job has the same weights; the model is gone when the run ends."""
    torch.manual_seed(0)
    block, name = (Ours, "layers") if rank.is_baseline else (Theirs, "blocks")
    model = nn.Module()
    setattr(model, name, nn.ModuleList(block() for _ in range(2)))
    grafter.attach(model)
    hidden = torch.ones(2, 4)
    for layer in getattr(model, name):
        out = layer(hidden)
        hidden = out if isinstance(out, torch.Tensor) else out[0]


def run_pair(directory: Path, ranks: tuple[int, int], **settings: object) -> Jobs:
    with Jobs(directory, compare_filter="True", **settings) as jobs:
        jobs.start("baseline", ranks[0], run_model)
        jobs.start("target", ranks[1], run_model)
        succeed(jobs.wait())
    return jobs


def test_the_suggested_plan_makes_the_points_of_two_jobs_meet(tmp_path: Path) -> None:
    """Without it no module has a counterpart; with it every point but the tuple's rest is compared."""
    first = run_pair(tmp_path / "first", (1, 1))
    assert {record.outcome for records in first.ledgers().values() for record in records} == {"skipped"}
    plan = tmp_path / "plan.yaml"
    result = CliRunner().invoke(app, ["plan", "suggest", str(first.directory / "run"), "--out", str(plan)])
    assert result.exit_code == 0, result.output
    second = run_pair(tmp_path / "second", (1, 1), plan=plan)
    for records in second.ledgers().values():
        assert {record.outcome for record in records} == {"compared"}
        assert len(records) == 2 * 2 * 5  # of each layer, the inputs and outputs of five modules
        assert {record.tags["layer_id"] for record in records} == {0, 1}


def test_ranks_that_have_the_same_modules_write_one_tree(tmp_path: Path) -> None:
    """Of role rank 0 alone; with the tensors that came."""
    jobs = run_pair(tmp_path, (2, 1))
    role = jobs.directory / "run" / "baseline"
    assert [path.name for path in role.glob("modules*")] == ["modules.json"]
    (tree,) = read_role_trees(role)
    (block,) = [node for node in tree.modules if node.path == "layers.1"]
    assert (block.class_name, block.tensors) == ("Ours", (".in.hidden_states", ".out"))
