"""Programs without a line of grafter, reached by `grafter run --attach` and a plan file alone.

Transformers' Llama is the baseline, on one rank; the target is another library's, on two. All decoder layers have
weights of each program's own. Of the two calls of the model, the first is compared, and in the second every decoder
layer's output becomes the baseline's.
"""

from __future__ import annotations

from argparse import Namespace
from itertools import product
from pathlib import Path

import pytest
import torch
from common import LAYERS, load_weights, token_ids
from pair import PROGRAMS, ROLES, PairRun, Program, run_programs
from plain_llama import make_model

ALONE, GRAFTED = range(2)
LAYER_IDS = list(range(LAYERS))
# On logits of about 1; what differs is the order in which sums over 128 values are taken.
TOLERANCE = 1e-5

LLAMA = Program("plain_llama.py", 1, {})
# By id: the target; where its layers are; the argument and the output that are the residual, and how that is laid out.
TARGETS = {
    "titan": (Program("plain_titan.py", 2, {}), "layers", "x", "out", "b s[tp] h"),
    "megatron": (
        Program("plain_megatron.py", 2, {}), "decoder.layers", "hidden_states", "out.0", "s b h # tp:replicated",
    ),
}  # fmt: skip

PLAN = """\
names:
  - {{path: "model.layers.{{layer_id}}", name: layer, role: baseline}}
  - {{path: "model.layers.{{layer_id}}.in.hidden_states", name: layer.in, role: baseline}}
  - {{path: "{layers}.{{layer_id}}", name: layer, role: target}}
  - {{path: "{layers}.{{layer_id}}.in.{argument}", name: layer.in, role: target}}
  - {{path: "{layers}.{{layer_id}}.{output}", name: layer.out, role: target}}
rules:
  - {{match: "layer.*", role: baseline, dims: "b s h"}}
  - {{match: "layer.*", role: target, dims: "{dims}"}}
"""


@pytest.fixture(scope="module", params=TARGETS)
def run(request: pytest.FixtureRequest, weights: Path, tmp_path_factory: pytest.TempPathFactory) -> PairRun:
    target, layers, argument, output, dims = TARGETS[request.param]
    directory = tmp_path_factory.mktemp("attached")
    plan = directory / "plan.yaml"
    plan.write_text(PLAN.format(layers=layers, argument=argument, output=output, dims=dims))
    settings = {
        "attach": "*layers.?",  # what `grafter run` makes of --attach
        "plan": str(plan),
        "b2t_filter": f"step == {GRAFTED} and name == 'layer.out'",
        "compare_filter": f"name == 'layer.in' or step == {ALONE} and name == 'layer.out'",
    }
    return run_programs({"baseline": LLAMA, "target": target}, settings, directory, weights, LAYER_IDS, steps=2)


def own_logits(weights: Path, role: str) -> torch.Tensor:
    """What a role's weights give without grafter, in transformers' Llama in this process."""
    seed = ROLES.index(role) + 1
    model = make_model(load_weights(Namespace(weights=weights, seed=seed, own_layers=LAYER_IDS)))
    with torch.no_grad():
        return model(input_ids=token_ids()).logits


def test_no_program_has_a_line_of_grafter(run: PairRun) -> None:
    for program in run.programs.values():
        imports = [line for line in (PROGRAMS / program.file).read_text().splitlines() if "import" in line]
        assert imports and not any("grafter" in line for line in imports)


def test_every_layer_is_compared_alone_and_then_grafted(run: PairRun) -> None:
    """On every rank: each layer's input and output, with its layer and the forward pass as its step, and no more."""
    for role, program in run.programs.items():
        written = "sent" if role == "baseline" else "grafted"
        expected = {
            (step, name, layer): written if (step, name) == (GRAFTED, "layer.out") else "compared"
            for step, name, layer in product((ALONE, GRAFTED), ("layer.in", "layer.out"), LAYER_IDS)
        }
        for rank in range(program.ranks):
            records = run.records[role, rank]
            reasons = {point: record.reason for point, record in records.items() if record.reason}
            assert {point: record.outcome for point, record in records.items()} == expected, reasons


def test_left_alone_each_program_computes_its_own_logits(run: PairRun, weights: Path) -> None:
    """Attached and compared, both give what their weights give without grafter, and that is not the same."""
    own = {role: own_logits(weights, role) for role in ROLES}
    assert torch.equal(run.logits("baseline", ALONE), own["baseline"])
    torch.testing.assert_close(run.logits("target", ALONE), own["target"], atol=TOLERANCE, rtol=TOLERANCE)
    assert (own["baseline"] - own["target"]).norm() > 0.3 * own["baseline"].norm()
    assert run.difference(ALONE, "layer.in", 0) == 0
    assert all(run.difference(ALONE, "layer.out", layer) > 1e-2 for layer in LAYER_IDS)


def test_with_every_layer_grafted_the_targets_logits_are_the_baselines(run: PairRun) -> None:
    """And the baseline's are bitwise what they were."""
    baseline, target = run.logits("baseline", GRAFTED), run.logits("target", GRAFTED)
    torch.testing.assert_close(target, baseline, atol=TOLERANCE, rtol=TOLERANCE)
    assert torch.equal(baseline, run.logits("baseline", ALONE))


def test_what_is_grafted_is_what_the_next_layer_gets(run: PairRun) -> None:
    for layer in LAYER_IDS:
        assert run.difference(GRAFTED, "layer.in", layer) == 0
