"""attach and dump_model between two jobs: what is compared and grafted, who takes part, and what is told."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from attach_parts import Tower, facts_of, some_input
from jobs import Jobs, Rank, succeed, two_jobs
from torch import nn

import grafter


def seed_of(rank: Rank) -> int:
    return 0 if rank.is_baseline else 1


def summary_of(directory: Path, role: str, role_rank: int = 0) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((directory / "run" / role / f"rank{role_rank}.summary.json").read_text())
    return found


def outcomes(jobs: Jobs, role: str, role_rank: int = 0) -> list[tuple[str, Any, str]]:
    return [(r.name, r.tags.get("layer_id"), r.outcome) for r in jobs.ledgers()[role, role_rank]]


def run_tower(rank: Rank) -> list[list[float]]:
    """Both jobs have the same input and other weights."""
    model = Tower(2, seed=seed_of(rank))
    grafter.attach(model, *rank.arguments)
    with torch.no_grad():
        return model(some_input()).tolist()


def test_every_point_of_both_models_is_compared(tmp_path: Path) -> None:
    """Inputs and outputs of all modules meet by name and layer; nothing is changed by it."""
    with two_jobs(tmp_path, run_tower, run_tower, compare_filter="True") as jobs:
        baseline, target = succeed(jobs.wait())
    with torch.no_grad():
        assert [baseline, target] == [Tower(2, seed=seed)(some_input()).tolist() for seed in (0, 1)]
    names = ["in.hidden", "norm.in.input", "norm.out", "up.in.input", "up.out", "out.0"]
    points = [(f"layers.{name}", layer, "compared") for layer in range(2) for name in names]
    whole = [("root.in.hidden", None), *[p[:2] for p in points], ("head.in.input", None), ("head.out", None)]
    assert outcomes(jobs, "target") == [(*p, "compared") for p in [*whole, ("root.out", None)]]
    differing = {r.name for r in jobs.ledgers()["target", 0] if r.difference is not None and r.difference.rel}
    assert "root.in.hidden" not in differing and "layers.up.out" in differing and "root.out" in differing


@pytest.mark.parametrize(
    ("filter_text", "same"), [("name == 'layers.out.0'", False), ("name in ('layers.out.0', 'head.out')", True)]
)
def test_a_grafted_output_reaches_the_rest_of_the_model(tmp_path: Path, filter_text: str, same: bool) -> None:
    """The baseline's layer outputs go through the target's own head, unless that is grafted, too."""
    with two_jobs(tmp_path, run_tower, run_tower, b2t_filter=filter_text) as jobs:
        baseline, target = succeed(jobs.wait())
    assert (target == baseline) is same
    reference, own = Tower(2, seed=0), Tower(2, seed=1)
    own.layers = reference.layers
    with torch.no_grad():
        expected = reference(some_input()) if same else own(some_input())
    assert target == expected.tolist()


def test_a_grafted_input_reaches_the_module(tmp_path: Path) -> None:
    with two_jobs(tmp_path, run_tower, run_tower, b2t_filter="name == 'head.in.input'") as jobs:
        _, target = succeed(jobs.wait())
    reference, own = Tower(2, seed=0), Tower(2, seed=1)
    own.layers = reference.layers
    with torch.no_grad():
        assert target == own(some_input()).tolist()


# How a graft is written.


def run_aliases(rank: Rank) -> dict[str, Any]:
    """Modules whose output is their input."""
    model = nn.ModuleDict({"identity": nn.Identity(), "relu": nn.ReLU(inplace=True)})
    grafter.attach(model, inputs=False)
    value = 1.0 if rank.is_baseline else 2.0
    found = {}
    for name, module in model.items():
        given = torch.full((2,), value)
        found[name] = (given, module(given))
    return {name: (given.tolist(), out.tolist(), given is out) for name, (given, out) in found.items()}


@pytest.mark.parametrize("how", ["default", "environment", "rule"])
def test_the_input_is_not_overwritten_unless_that_is_asked_for(tmp_path: Path, how: str) -> None:
    """attach hands on what came; GRAFTER_WRITE=in_place writes it into the module's own tensor, and a rule wins."""
    settings: dict[str, Any] = {"b2t_filter": "True"}
    if how != "default":
        settings["write"] = "in_place"
    if how == "rule":
        plan = tmp_path / "plan.yaml"
        plan.write_text("rules: [{match: identity.out, write: return}]\n")
        settings["plan"] = plan
    with two_jobs(tmp_path, run_aliases, run_aliases, **settings) as jobs:
        _, target = succeed(jobs.wait())
    kept, written = ([2.0, 2.0], [1.0, 1.0], False), ([1.0, 1.0], [1.0, 1.0], True)
    assert target["identity"] == (written if how == "environment" else kept)
    assert target["relu"] == (kept if how == "default" else written)


class AddsToItsInput(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.mul_(3)


def run_changing_module(rank: Rank) -> Any:
    model = nn.ModuleDict({"m": AddsToItsInput()})
    grafter.attach(model, outputs=False)
    with torch.no_grad():
        return model["m"](torch.full((2,), 1.0 if rank.is_baseline else 2.0)).tolist()


def test_an_input_is_taken_before_the_module_can_change_it(tmp_path: Path) -> None:
    """The baseline's 1 comes, which both then multiply; taken later, a 3 would."""
    with two_jobs(tmp_path, run_changing_module, run_changing_module, b2t_filter="True") as jobs:
        assert succeed(jobs.wait()) == [[3.0, 3.0]] * 2


def train(rank: Rank) -> dict[str, Any]:
    """loss = (head(tanh(w))) with the grafted value between."""
    model = nn.ModuleDict({"act": nn.Tanh(), "head": nn.Linear(1, 1, bias=False)})
    nn.init.constant_(model["head"].weight, 2.0)
    grafter.attach(model, "act", inputs=False)
    w = torch.full((1, 1), 0.5 if rank.is_baseline else 0.0, requires_grad=True)
    model["head"](model["act"](w)).sum().backward()
    return {"w": float(w.grad), "head": float(model["head"].weight.grad)}  # type: ignore[arg-type]


def test_the_gradient_of_a_grafted_output_is_exact(tmp_path: Path) -> None:
    """tanh differentiates at its own input, the head at the value that came."""
    with two_jobs(tmp_path, train, train, b2t_filter="True") as jobs:
        baseline, target = succeed(jobs.wait())
    came = torch.tensor(0.5).tanh()
    assert target["w"] == pytest.approx(2.0)  # 2 * (1 - tanh(0)^2)
    assert target["head"] == pytest.approx(float(came))
    assert baseline["w"] == pytest.approx(2 * (1 - float(came) ** 2))


def run_and_detach(rank: Rank) -> Any:
    model = Tower(2, seed=seed_of(rank))
    before = facts_of(model)
    attachment = grafter.attach(model)
    assert attachment is not None
    with torch.no_grad():
        during = model.forward(some_input())
        attachment.detach()
        after = model(some_input())
    return during.tolist(), after.tolist(), facts_of(model) == before


def test_forward_called_directly_is_grafted_and_detaching_ends_it(tmp_path: Path) -> None:
    with two_jobs(tmp_path, run_and_detach, run_and_detach, b2t_filter="name == 'root.out'") as jobs:
        baseline, target = succeed(jobs.wait())
    assert target[0] == baseline[0]
    with torch.no_grad():
        assert target[1:] == (Tower(2, seed=1)(some_input()).tolist(), True)


def run_two_models(rank: Rank) -> list[str]:
    """Two models, attached in another order by each job."""
    models = {"a": nn.ModuleDict({"a": nn.Linear(4, 4)}), "b": nn.ModuleDict({"b": nn.Linear(4, 4)})}
    for name in "ab" if rank.is_baseline else "ba":
        grafter.attach(models[name])
    for name in "ab":
        models[name][name](some_input())
    return []


def test_all_that_is_attached_before_the_first_point_is_announced(tmp_path: Path) -> None:
    """The order in which two models are attached does not matter, nor is any of them taken for missing."""
    with two_jobs(tmp_path, run_two_models, run_two_models, compare_filter="True") as jobs:
        succeed(jobs.wait())
    assert outcomes(jobs, "target") == [(f"{n}.{p}", None, "compared") for n in "ab" for p in ("in.input", "out")]
    assert summary_of(tmp_path, "target")["modules_only_here"] == []


def run_twice(rank: Rank) -> None:
    shared = nn.Linear(4, 4)
    model = nn.ModuleDict({"first": shared, "second": shared})
    grafter.attach(model, inputs=False)
    for _ in range(2):
        model["first"](some_input())
        model["second"](some_input())
        grafter.step()


def test_a_module_called_several_times_counts_its_occurrences(tmp_path: Path) -> None:
    """One that has two paths is known by its first. The count starts again at each step."""
    with two_jobs(tmp_path, run_twice, run_twice, compare_filter="True") as jobs:
        succeed(jobs.wait())
    records = jobs.ledgers()["target", 0]
    assert [(r.name, r.step, r.occurrence) for r in records] == [("first.out", s, n) for s in (0, 1) for n in (0, 1)]


# Names.


class Other(nn.Module):
    """Tower under other names, with a module that Tower does not have, and without its head."""

    def __init__(self) -> None:
        super().__init__()
        tower = Tower(2)
        self.decoder = nn.ModuleDict({"blocks": tower.layers})
        self.extra = nn.Identity()

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        hidden = self.extra(hidden)
        for block in self.decoder["blocks"]:  # type: ignore[union-attr]
            hidden, _ = block(hidden)
        return hidden


def run_one_of_two(rank: Rank) -> None:
    model = Tower(2) if rank.is_baseline else Other()
    grafter.attach(model, "!root", inputs=False)
    model(some_input())


NAMES = """
names:
  - {path: "layers.{layer_id}", name: layer, role: baseline}
  - {path: "layers.{layer_id}.{part}", name: "layer.{part}", role: baseline}
  - {path: "decoder.blocks.{layer_id}", name: layer, role: target}
  - {path: "decoder.blocks.{layer_id}.{part}", name: "layer.{part}", role: target}
"""


def test_names_that_one_side_has_are_told_and_skipped(tmp_path: Path) -> None:
    """The plan file gives both programs one name; what only one has is known at the start, and nobody waits for it."""
    plan = tmp_path / "plan.yaml"
    plan.write_text(NAMES)
    with two_jobs(tmp_path, run_one_of_two, run_one_of_two, compare_filter="True", plan=plan, timeout=250) as jobs:
        succeed(jobs.wait())
    met = [(f"layer.{part}", layer, "compared") for layer in (0, 1) for part in ("norm.out", "up.out", "out.0")]
    assert outcomes(jobs, "baseline") == [*met, ("head.out", None, "skipped")]
    assert outcomes(jobs, "target") == [("extra.out", None, "skipped"), *met]
    assert jobs.ledgers()["baseline", 0][-1].reason == "no rank of the target has a module of this name"
    assert summary_of(tmp_path, "baseline")["modules_only_here"] == ["head []"]
    assert summary_of(tmp_path, "target")["modules_only_here"] == ["extra []"]


TENSOR_NAMES = """
names:
  - {path: "layers.{layer_id}.out.0", name: hidden, role: baseline}
  - {path: "decoder.blocks.{layer_id}.out.0", name: hidden, role: target}
"""


def test_an_entry_for_one_tensor_of_a_module_is_enough(tmp_path: Path) -> None:
    """Their modules have other names in each job, and their other tensors meet nobody."""
    plan = tmp_path / "plan.yaml"
    plan.write_text(TENSOR_NAMES)
    with two_jobs(tmp_path, run_one_of_two, run_one_of_two, compare_filter="True", plan=plan, timeout=250) as jobs:
        succeed(jobs.wait())
    for role in ("baseline", "target"):
        told = outcomes(jobs, role)
        assert [point for point in told if point[2] != "skipped"] == [("hidden", layer, "compared") for layer in (0, 1)]
        assert len(told) > 2


def run_part(rank: Rank) -> None:
    model = Tower(2)
    attached = grafter.attach(model, "layers.*:Block", "head")
    assert attached is not None
    model.layers[0](some_input())


def test_hooks_that_never_fired_are_in_the_summary(tmp_path: Path) -> None:
    with two_jobs(tmp_path, run_part, run_part, compare_filter="True") as jobs:
        succeed(jobs.wait())
    assert summary_of(tmp_path, "target")["hooks_never_fired"] == ["layers.1", "head"]


def never_call(rank: Rank) -> None:
    grafter.attach(Tower(1))
    if rank.is_baseline:
        grafter.dump("x", torch.zeros(2))


def test_a_rank_whose_model_is_never_called_joins_and_leaves(tmp_path: Path) -> None:
    """The other job hears that it left, and does not wait for it to come."""
    with two_jobs(tmp_path, never_call, never_call, compare_filter="True", join_timeout=60) as jobs:
        baseline, target = jobs.wait()
    assert baseline.error_kind == "PairingError" and "target rank 0 has left" in str(baseline.error)
    assert target.error_kind is None


# Pipeline stages.


def run_stage(rank: Rank) -> Any:
    """The baseline has both layers on its one rank; each target rank has one, which it numbers from 0."""
    if rank.is_baseline:
        model: Any = Tower(2)
        grafter.attach(model, "layers.*:Block", "head")
        with torch.no_grad():
            return model(some_input()).tolist()
    whole = Tower(2, seed=1)
    stage: Any = nn.Module()
    stage.layers = nn.ModuleList([whole.layers[rank.role_rank]])
    stage.layers[0].layer_number = rank.role_rank + 1
    if rank.role_rank == 1:
        stage.head = whole.head
    grafter.attach(stage, "layers.*:Block", "head")
    with torch.no_grad():
        hidden, _ = stage.layers[0](some_input())
        return stage.head(hidden).tolist() if rank.role_rank == 1 else hidden.tolist()


def test_a_pipeline_stages_points_are_those_of_its_ranks(tmp_path: Path) -> None:
    """Ranks without the module are no participants and wait for nothing; layers have the number of the whole model."""
    with two_jobs(tmp_path, run_stage, run_stage, ranks=(1, 2), b2t_filter="name != 'layers.in.hidden'") as jobs:
        baseline, _, second = succeed(jobs.wait())
    assert second == baseline
    assert outcomes(jobs, "target", 0) == [("layers.out.0", 0, "grafted")]
    assert outcomes(jobs, "target", 1) == [
        ("layers.out.0", 1, "grafted"),
        ("head.in.input", None, "grafted"),
        ("head.out", None, "grafted"),
    ]
    by_layer = {
        r.tags.get("layer_id"): r.participants for r in jobs.ledgers()["baseline", 0] if r.name == "layers.out.0"
    }
    assert by_layer == {0: {"baseline": [0], "target": [0]}, 1: {"baseline": [0], "target": [1]}}


# Weights.


class Tied(nn.Module):
    def __init__(self, seed: int, tie: bool) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.embed = nn.Embedding(5, 4)
        self.body = Tower(1, seed=seed)
        self.norm = nn.BatchNorm1d(2)
        self.norm.running_mean.fill_(float(seed))  # type: ignore[union-attr]
        self.out = nn.Linear(4, 5, bias=False)
        if tie:
            self.out.weight = self.embed.weight
        self.register_buffer("scratch", torch.full((2,), float(seed)), persistent=False)


def dump_weights(rank: Rank) -> dict[str, Any]:
    model = Tied(seed_of(rank), tie=rank.arguments[0 if rank.is_baseline else 1])
    if not rank.is_baseline:
        model = torch.compile(model) if rank.arguments[2] else model  # type: ignore[assignment]
    count = grafter.dump_model(model)
    inner = getattr(model, "_orig_mod", model)
    tied = inner.out.weight is inner.embed.weight
    return {
        "count": count,
        "tied": tied,
        "scratch": inner.scratch.tolist(),
        "leaf": all(p.is_leaf and p.requires_grad for p in inner.parameters()),
        "weights": {name: tensor.tolist() for name, tensor in inner.state_dict().items()},
    }


@pytest.mark.parametrize(("ties", "settings"), [
    ((True, True), {}),
    ((True, False), {}),
    ((False, False), {"write": "return"}),
    ((True, True), {"gradient": "cut"}),
])  # fmt: skip
def test_both_jobs_start_from_the_same_weights(tmp_path: Path, ties: tuple[bool, bool], settings: Any) -> None:
    """Parameters and persistent buffers, integers included; tied in one job and not in the other; whatever is set for
    the writing of activations. A buffer that is not persistent is nobody's weight."""
    with Jobs(tmp_path, compiler=True, b2t_filter="True", **settings) as jobs:
        for role in ("baseline", "target"):
            jobs.start(role, 1, dump_weights, *ties, True)
        baseline, target = succeed(jobs.wait())
    assert target["weights"] == baseline["weights"]
    assert baseline["count"] == target["count"] == len(baseline["weights"])
    assert (baseline["tied"], target["tied"]) == ties and target["leaf"]
    assert target["scratch"] == [1.0, 1.0]
    assert {outcome for _, _, outcome in outcomes(jobs, "target")} == {"grafted"}


def test_a_rule_that_returns_values_still_fills_the_weights(tmp_path: Path) -> None:
    """A rule for all names, meant for activations, does not lose a weight."""
    plan = tmp_path / "plan.yaml"
    plan.write_text('rules: [{match: "*", write: return}]\n')
    with Jobs(tmp_path, b2t_filter="True", plan=plan) as jobs:
        for role in ("baseline", "target"):
            jobs.start(role, 1, dump_weights, False, False, False)
        baseline, target = succeed(jobs.wait())
    assert target["weights"] == baseline["weights"] and target["leaf"]


def dump_shards(rank: Rank) -> Any:
    """The target's two ranks have half of the rows, and of the columns, of the baseline's weights."""
    torch.manual_seed(seed_of(rank))
    model: Any = nn.ModuleDict({"up": nn.Linear(4, 6), "down": nn.Linear(6, 4)})
    if not rank.is_baseline:
        grafter.set_axes(tp=(rank.role_rank, 2))
        model = nn.ModuleDict({"up": nn.Linear(4, 3), "down": nn.Linear(3, 4)})
    grafter.dump_model(model)
    return {name: tensor.tolist() for name, tensor in model.state_dict().items()}


DIMS = """
rules:
  - {match: up.weight, dims: "o[tp] i"}
  - {match: up.bias, dims: "o[tp]"}
  - {match: down.weight, dims: "o i[tp]"}
  - {match: down.bias, dims: "o # tp:replicated"}
"""


def test_weights_cross_layouts_by_the_dims_of_the_plan_file(tmp_path: Path) -> None:
    plan = tmp_path / "plan.yaml"
    plan.write_text(DIMS)
    with two_jobs(tmp_path, dump_shards, dump_shards, ranks=(1, 2), b2t_filter="True", plan=plan) as jobs:
        whole, first, second = succeed(jobs.wait())
    assert first["up.weight"] + second["up.weight"] == whole["up.weight"]
    assert first["up.bias"] + second["up.bias"] == whole["up.bias"]
    halves = zip(first["down.weight"], second["down.weight"], strict=True)
    assert [left + right for left, right in halves] == whole["down.weight"]
    assert first["down.bias"] == second["down.bias"] == whole["down.bias"]


def dump_fsdp(rank: Rank) -> Any:
    """The target shards its weights with FSDP2; then both run."""
    model = Tower(2, seed=seed_of(rank))
    if not rank.is_baseline:
        import torch.distributed as dist
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import fully_shard

        dist.init_process_group(
            "gloo", init_method=f"file://{rank.arguments[0]}", rank=rank.role_rank, world_size=rank.world_size
        )
        mesh = init_device_mesh("cpu", (2,), mesh_dim_names=("dp",))
        for layer in model.layers:
            fully_shard(layer, mesh=mesh)
        fully_shard(model, mesh=mesh)
    grafter.dump_model(model)
    with torch.no_grad():
        out = model(some_input()).tolist()
    if not rank.is_baseline:
        torch.distributed.destroy_process_group()
    return out


def test_weights_cross_into_dtensors(tmp_path: Path) -> None:
    """FSDP2's parameters say themselves how they are sharded; then the outputs are equal."""
    with Jobs(tmp_path, compiler=True, b2t_filter="True") as jobs:
        jobs.start("baseline", 1, dump_fsdp)
        jobs.start("target", 2, dump_fsdp, tmp_path / "rendezvous")
        baseline, first, second = succeed(jobs.wait())
    assert first == second == baseline


def dump_stage(rank: Rank) -> Any:
    """Each target rank has one layer of the two; the ranks that share a weight are given."""
    if rank.is_baseline:
        model: Any = Tower(2)
        for number in range(2):
            with grafter.context(stage=number):
                grafter.dump_model(model.layers[number])
        return [layer.up.weight.tolist() for layer in model.layers]
    layer = Tower(2, seed=1).layers[rank.role_rank]
    with grafter.context(stage=rank.role_rank, ranks=[rank.role_rank]):
        grafter.dump_model(layer)
    return layer.up.weight.tolist()


def test_a_pipeline_stages_weights_take_the_ranks_of_a_context(tmp_path: Path) -> None:
    with two_jobs(tmp_path, dump_stage, dump_stage, ranks=(1, 2), b2t_filter="True") as jobs:
        baseline, first, second = succeed(jobs.wait())
    assert baseline == [first, second]
