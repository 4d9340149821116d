"""Dumps that programs wrote, compared: a transformers Llama with a fault, in bfloat16, and generating with a cache.

All in this process; costs about 6 s of one core.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from compare_parts import compared, told

from grafter.config.settings.config import GrafterConfig
from grafter.core.points import PointContext, point_context
from grafter.core.tokens.tokens import Tokens
from grafter.rank.grafter import Grafter

transformers = pytest.importorskip("transformers")

LAYERS = 3
IDS = torch.randint(0, 64, (2, 12), generator=torch.Generator().manual_seed(1))


def llama(**settings: Any) -> Any:
    """The same random weights each time."""
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=LAYERS,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        **settings,
    )
    return transformers.LlamaForCausalLM(config).eval()


@contextmanager
def dumping(directory: Path, role: str, **settings: Any) -> Iterator[Grafter]:
    given = {"dump_filter": "True", "log_level": "warning", "run_name": "run", "dir": str(directory), **settings}
    grafter = Grafter(GrafterConfig(enable=True, role=role, **given))
    try:
        yield grafter
    finally:
        grafter.close()


def forward(directory: Path, role: str, model: Any, **settings: Any) -> None:
    with dumping(directory, role, **settings) as grafter, torch.no_grad():
        grafter.attach(model, (":LlamaDecoderLayer", ":LlamaMLP", "root"))
        model(IDS)


def test_a_wrong_epsilon_is_found_in_its_layer(tmp_path: Path) -> None:
    """The layer whose norm is wrong is the culprit; what follows has inherited it; what comes before agrees."""
    forward(tmp_path, "baseline", llama())
    faulty = llama()
    faulty.model.layers[1].post_attention_layernorm.variance_epsilon = 1e-2
    forward(tmp_path, "target", faulty)
    comparison = compared(tmp_path / "run", "*: rel <= 1e-9")
    severity = {(p.name, p.tags.get("layer_id")): p.severity for p in comparison.points if p.severity is not None}
    assert severity["model.layers.out", 1] == "culprit"
    assert severity["model.layers.out", 2] == "inherited"
    assert not any(layer == 0 for _, layer in severity)
    # The module's own input is bad already: its norm stands before it, within the layer.
    assert severity["model.layers.mlp.out", 1] == "inherited"
    # The whole model turns good inputs bad, too; the layer in it is meant.
    assert severity["root.out.logits", None] == "culprit"
    assert comparison.summary.culprits == ["'model.layers.out' (layer_id=1, step=0)"]
    first = comparison.summary.first_divergence
    assert first is not None and first.startswith("'model.layers.mlp.in.x' (layer_id=1")
    assert "turns good inputs bad is at 'model.layers.out' (layer_id=1, step=0)" in comparison.summary.sentence
    code, out, _ = told(tmp_path / "run", "--threshold", "*: rel <= 1e-9")
    assert code == 1 and "failed, culprit" in out


def test_the_same_program_twice_agrees_bitwise(tmp_path: Path) -> None:
    """Without a threshold, all points pass."""
    for role in ("baseline", "target"):
        forward(tmp_path, role, llama())
    code, out, _ = told(tmp_path / "run")
    assert code == 0 and "points are bitwise the same" in out


def test_bfloat16_against_float32_and_eager_against_sdpa(tmp_path: Path) -> None:
    """bfloat16 is within a rule for it, and not bitwise; sdpa is within one for float32."""
    forward(tmp_path / "dtype", "baseline", llama())
    forward(tmp_path / "dtype", "target", llama().bfloat16())
    rules = "root.in.*: mismatched_fraction == 0", "root.out.logits: kl <= 1e-2 and rel <= 1e-2", "*: rel <= 1e-2"
    comparison = compared(tmp_path / "dtype" / "run", *rules)
    assert comparison.summary.exit_code == 0
    logits = next(point for point in comparison.points if point.name == "root.out.logits")
    assert logits.values["kl"] is not None and 0 < logits.values["kl"] < 1e-2
    assert logits.leaves[0].measures is not None and logits.leaves[0].measures.narrow_dtype == "bfloat16"
    assert compared(tmp_path / "dtype" / "run").summary.exit_code == 1
    for role, attention in (("baseline", "eager"), ("target", "sdpa")):
        forward(tmp_path / "attention", role, llama(attn_implementation=attention))
    comparison = compared(tmp_path / "attention" / "run", "*: rel <= 1e-9 and max_abs <= 1e-4")
    assert comparison.summary.exit_code == 0, comparison.summary.sentence


def test_decoding_with_a_cache_agrees_with_one_forward_pass(tmp_path: Path) -> None:
    """Prefill of one sequence after the other and decode step by step, against one batch: paired by token."""
    model = llama()

    def logits_of(grafter: Grafter, ids: torch.Tensor, tokens: Tokens, cache: Any = None) -> Any:
        result = model(ids, past_key_values=cache, use_cache=True)
        grafter.dump("logits", result.logits, dims="b s v", tokens=tokens)
        grafter.step()
        return result.past_key_values

    def positions(start: int, count: int) -> torch.Tensor:
        return torch.arange(start, start + count).expand(1, -1)

    with torch.no_grad():
        with dumping(tmp_path, "baseline") as grafter:
            logits_of(grafter, IDS, Tokens.from_positions([0, 1], torch.arange(12).expand(2, -1)))
        with dumping(tmp_path, "target") as grafter:
            for sequence in (1, 0):
                ids = IDS[sequence : sequence + 1]
                cache = logits_of(grafter, ids[:, :9], Tokens.from_positions([sequence], positions(0, 9)))
                for place in range(9, 12):
                    step = Tokens.from_positions([sequence], positions(place, 1))
                    cache = logits_of(grafter, ids[:, place : place + 1], step, cache)
    (point,) = compared(tmp_path / "run", "*: rel <= 1e-9 and kl_v <= 1e-9").points
    assert point.tokens is not None
    assert (point.verdict, point.tokens.paired, point.tokens.points_b) == ("passed", 24, 8)


def test_generate_agrees_with_one_forward_pass(tmp_path: Path) -> None:
    """transformers' own `generate`, prompt and added tokens, against all of it at once: every layer, by token."""
    model = llama()
    forward_of = type(model).forward

    def with_tokens(grafter: Grafter) -> Any:
        def forward(**arguments: Any) -> Any:
            cache = arguments.get("past_key_values")
            start, count = (cache.get_seq_length() if cache is not None else 0), arguments["input_ids"].shape[1]
            places = torch.arange(start, start + count).expand(2, -1)
            # `grafter.context` does nothing where grafting is off, as it is in the process of a test.
            before = point_context.set(PointContext({}, {"tokens": Tokens.from_positions([0, 1], places)}))
            result = forward_of(model, **arguments)
            point_context.reset(before)
            grafter.step()
            return result

        return forward

    def dump_layers(role: str, run: Callable[[], Any]) -> Any:
        plan = tmp_path / "plan.yaml"
        plan.write_text("rules: [{match: '*', dims: 'b s h'}]")
        with dumping(tmp_path, role, plan=str(plan)) as grafter, torch.no_grad():
            attachment = grafter.attach(model, (":LlamaDecoderLayer",), inputs=False)
            model.forward = with_tokens(grafter)
            try:
                return run()
            finally:
                del model.forward
                attachment.detach()

    generated = dump_layers(
        "target", lambda: model.generate(IDS, max_new_tokens=4, do_sample=False, pad_token_id=0, eos_token_id=None)
    )
    dump_layers("baseline", lambda: model(input_ids=generated))
    points = compared(tmp_path / "run", "*: rel <= 1e-9").points
    assert [(point.name, point.tags["layer_id"], point.verdict) for point in points] == [
        ("model.layers.out", layer, "passed") for layer in range(LAYERS)
    ]
    # The token that comes last has gone through no layer when `generate` ends.
    for point in points:
        assert point.tokens is not None
        assert (point.tokens.paired, point.tokens.points_b) == (2 * (12 + 3), 4)
