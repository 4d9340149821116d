"""attach on models that people run: transformers' Llama and Mixtral, generating, compiled, with other weights on each
side."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from attach_parts import attach
from jobs import Jobs, Rank, succeed, two_jobs

import grafter

VOCABULARY = 64


def make_llama(seed: int, layers: int = 2) -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=32, intermediate_size=48, num_hidden_layers=layers, num_attention_heads=4,
        num_key_value_heads=2, attn_implementation="eager",
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


def make_mixtral(seed: int) -> Any:
    from transformers import MixtralConfig, MixtralForCausalLM

    torch.manual_seed(seed)
    config = MixtralConfig(
        vocab_size=VOCABULARY, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, num_local_experts=4, num_experts_per_tok=2, attn_implementation="eager",
    )  # fmt: skip
    return MixtralForCausalLM(config).eval()


MAKERS = {"Llama": make_llama, "Mixtral": make_mixtral}


def prompt() -> torch.Tensor:
    return torch.arange(10).reshape(2, 5) % VOCABULARY


def run_forward(rank: Rank) -> Any:
    model = MAKERS[rank.arguments[0]](0 if rank.is_baseline else 1)
    attachment = grafter.attach(model, *rank.arguments[1:])
    assert attachment is not None
    with torch.no_grad():
        logits = model(prompt()).logits
    return logits.tolist(), attachment.never_fired(), attachment.hook_count


@pytest.mark.parametrize("maker", MAKERS)
def test_grafting_every_output_makes_the_targets_logits_the_baselines(tmp_path: Path, maker: str) -> None:
    """All modules of all layers, with other weights: the routers' and experts' tensors, too."""
    with Jobs(tmp_path, b2t_filter="True") as jobs:
        for role in ("baseline", "target"):
            jobs.start(role, 1, run_forward, maker)
        (baseline, unreached, hooks), (target, _, _) = succeed(jobs.wait())
    assert target == baseline
    assert unreached == [] and hooks > 30
    records = jobs.ledgers()["target", 0]
    assert {r.outcome for r in records} == {"grafted"}
    names = {r.name for r in records}
    assert {"root.in.input_ids", "root.out.logits", "model.layers.in.hidden_states", "model.layers.out"} <= names
    assert {r.tags["layer_id"] for r in records if r.name == "model.layers.out"} == {0, 1}


def test_a_mixtures_router_is_found_by_class(tmp_path: Path) -> None:
    with Jobs(tmp_path, compare_filter="True") as jobs:
        for role in ("baseline", "target"):
            jobs.start(role, 1, run_forward, "Mixtral", ":*Router")
        succeed(jobs.wait())
    found = {(r.name.removeprefix("model.layers.mlp."), r.tags["layer_id"]) for r in jobs.ledgers()["target", 0]}
    assert {("gate.in.hidden_states", 0), ("gate.out.0", 0), ("gate.out.1", 0), ("gate.out.2", 1)} <= found


def generate(rank: Rank) -> Any:
    model = make_llama(0 if rank.is_baseline else 1)
    grafter.attach(model, "lm_head", "model.layers.*:LlamaDecoderLayer", inputs=False)
    steps = []

    def end_step(module: Any, args: Any, output: Any) -> None:
        steps.append(list(output.logits.shape))
        grafter.step()

    model.register_forward_hook(end_step)
    with torch.no_grad():
        tokens = model.generate(prompt(), max_new_tokens=4, do_sample=False, pad_token_id=0, eos_token_id=None)
    return tokens.tolist(), steps


def test_generating_grafts_prefill_and_decode(tmp_path: Path) -> None:
    """Each step has its own shapes; with the head's output grafted, the target says what the baseline says."""
    with two_jobs(tmp_path, generate, generate, b2t_filter="name == 'lm_head.out'") as jobs:
        (baseline, steps), (target, _) = succeed(jobs.wait())
    assert target == baseline and len(target[0]) == 5 + 4
    assert steps == [[2, 1, VOCABULARY]] * 4
    records = jobs.ledgers()["target", 0]
    assert [(r.name, r.step, r.outcome) for r in records] == [("lm_head.out", step, "grafted") for step in range(4)]


def test_generating_compares_layers_of_other_shapes_each_step(tmp_path: Path) -> None:
    settings = {"compare_filter": "name == 'model.layers.out'", "b2t_filter": "name == 'lm_head.out'"}
    with two_jobs(tmp_path, generate, generate, **settings) as jobs:
        succeed(jobs.wait())
    shapes = [
        (r.step, r.tags["layer_id"], list(r.leaves[0].shape))
        for r in jobs.ledgers()["target", 0]
        if r.name == "model.layers.out"
    ]
    assert shapes == [(step, layer, [2, 5 if step == 0 else 1, 32]) for step in range(4) for layer in (0, 1)]


def run_compiled(rank: Rank) -> Any:
    """The target is compiled, and has run before attach; the weights are the baseline's."""
    model = make_llama(0)
    if not rank.is_baseline:
        model.compile(backend="aot_eager")
        with torch.no_grad():
            model(prompt(), use_cache=False)
    attachment = grafter.attach(model, "root", "model.embed_tokens", "model.layers.*:LlamaDecoderLayer", inputs=False)
    assert attachment is not None
    with torch.no_grad():
        for _ in range(2):
            model(prompt(), use_cache=False)
            grafter.step()
    return attachment.never_fired()


def test_a_compiled_model_agrees_with_the_eager_one(tmp_path: Path) -> None:
    """Every hook fires at every step, and what it compares differs by rounding alone."""
    with two_jobs(tmp_path, run_compiled, run_compiled, compare_filter="True") as jobs:
        assert succeed(jobs.wait()) == [[], []]
    records = jobs.ledgers()["target", 0]
    points = [("model.embed_tokens.out", None), ("model.layers.out", 0), ("model.layers.out", 1)]
    expected = [(*point, step) for step in range(2) for point in [*points, ("root.out.logits", None)]]
    assert [(r.name, r.tags.get("layer_id"), r.step) for r in records] == expected
    assert all(r.outcome == "compared" and r.difference.rel < 1e-12 for r in records)


def start_from_one(rank: Rank) -> Any:
    model = make_mixtral(0 if rank.is_baseline else 1)
    grafter.dump_model(model)
    with torch.no_grad():
        return model(prompt()).logits.tolist()


def test_two_models_start_from_the_same_weights(tmp_path: Path) -> None:
    with two_jobs(tmp_path, start_from_one, start_from_one, b2t_filter="True") as jobs:
        baseline, target = succeed(jobs.wait())
    assert target == baseline


def test_the_number_of_hooks_is_two_for_each_module() -> None:
    """A Llama of two layers: embedding, rotary embedding, 13 modules a layer, norm, head and the inner model."""
    model = make_llama(0)
    attachment, _ = attach(model)
    modules_in_a_layer = len(list(model.model.layers[0].modules()))
    assert attachment.hook_count == 2 * (5 + 2 * modules_in_a_layer)
    attachment.detach()
    attachment, _ = attach(model, "model.layers.*:LlamaMLP")
    assert attachment.hook_count == 4
    attachment.detach()
