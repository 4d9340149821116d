"""`grafter plan suggest` on the models of three libraries, against pairs written by hand.

A module is listed by hand where the other program has one that computes the same tensor. Megatron's is rank 0 of two.
"""

from __future__ import annotations

import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
from pair import PROGRAMS

from grafter.analysis.plan_suggest.plan_text import plan_text
from grafter.analysis.plan_suggest.suggestion import Confidence
from grafter.analysis.plan_suggest.tree_matching import match_trees
from grafter.capture.module_tree import ModuleTree, read_trees
from grafter.config.settings.config import GrafterConfig
from grafter.config.settings.plan_file import read_plan_file

HERE, TITAN, MEGATRON = "model.layers.{layer_id}", "layers.{layer_id}", "decoder.layers.{layer_id}"

LLAMA_TO_TITAN = {
    "": "",
    "model.embed_tokens": "tok_embeddings",
    "model.norm": "norm",
    "lm_head": "output",
    HERE: TITAN,
    **{f"{HERE}.self_attn.{name}_proj": f"{TITAN}.attention.w{name}" for name in "qkvo"},
    f"{HERE}.self_attn": f"{TITAN}.attention",
    f"{HERE}.mlp": f"{TITAN}.feed_forward",
    f"{HERE}.mlp.gate_proj": f"{TITAN}.feed_forward.w1",
    f"{HERE}.mlp.up_proj": f"{TITAN}.feed_forward.w3",
    f"{HERE}.mlp.down_proj": f"{TITAN}.feed_forward.w2",
    f"{HERE}.input_layernorm": f"{TITAN}.attention_norm",
    f"{HERE}.post_attention_layernorm": f"{TITAN}.ffn_norm",
}
# The output of `model` and that of `decoder` are the normed hidden states; what goes in is not the same.
MIXTRAL_TO_MEGATRON = {
    "": "",
    "model": "decoder",
    "model.embed_tokens": "embedding.word_embeddings",
    "model.norm": "decoder.final_layernorm",
    "lm_head": "output_layer",
    HERE: MEGATRON,
    f"{HERE}.self_attn": f"{MEGATRON}.self_attention",
    f"{HERE}.self_attn.o_proj": f"{MEGATRON}.self_attention.linear_proj",
    f"{HERE}.input_layernorm": f"{MEGATRON}.input_layernorm",
    f"{HERE}.post_attention_layernorm": f"{MEGATRON}.pre_mlp_layernorm",
    f"{HERE}.mlp": f"{MEGATRON}.mlp",
    f"{HERE}.mlp.gate": f"{MEGATRON}.mlp.router",
    f"{HERE}.mlp.experts": f"{MEGATRON}.mlp.experts",
}
LLAMA_TO_MEGATRON = {
    **{ours: theirs for ours, theirs in MIXTRAL_TO_MEGATRON.items() if "gate" not in ours and "experts" not in ours},
    f"{HERE}.mlp.down_proj": f"{MEGATRON}.mlp.linear_fc2",
    "model.rotary_emb": "rotary_pos_emb",
}
TITAN_TO_MEGATRON = {
    **{theirs: LLAMA_TO_MEGATRON[ours] for ours, theirs in LLAMA_TO_TITAN.items() if ours in LLAMA_TO_MEGATRON},
    f"{TITAN}.attention.inner_attention": f"{MEGATRON}.self_attention.core_attention",
}
LLAMA_TO_MIXTRAL = {
    ours: ours for ours in (*(one for one in LLAMA_TO_TITAN if ".mlp." not in one), "model", "model.rotary_emb")
}


@dataclass(frozen=True)
class Pair:
    baseline: str
    target: str
    by_hand: dict[str, str]
    # What is by hand and not found.
    missed: frozenset[str] = frozenset()


PAIRS = [
    Pair("llama", "titan", LLAMA_TO_TITAN),
    Pair("llama", "megatron", LLAMA_TO_MEGATRON, frozenset({"model.rotary_emb"})),
    Pair("titan", "megatron", TITAN_TO_MEGATRON),
    Pair("llama", "mixtral", LLAMA_TO_MIXTRAL),
    # One program has all experts in two weights, the other each in modules of its own.
    Pair("mixtral", "megatron_moe", MIXTRAL_TO_MEGATRON, frozenset({f"{HERE}.mlp.experts"})),
]


@pytest.fixture(scope="module")
def module_trees(tmp_path_factory: pytest.TempPathFactory) -> dict[str, ModuleTree]:
    directory = tmp_path_factory.mktemp("trees")
    subprocess.run([sys.executable, str(PROGRAMS / "module_trees.py"), str(directory)], check=True, timeout=110)
    return {path.stem: read_trees(path)[0] for path in directory.glob("*.json")}


@pytest.mark.parametrize("turned", [False, True], ids=["", "turned"])
@pytest.mark.parametrize("pair", PAIRS, ids=lambda pair: f"{pair.baseline}-{pair.target}")
def test_the_pairs_are_those_written_by_hand(pair: Pair, turned: bool, module_trees: dict[str, ModuleTree]) -> None:
    """None is wrong, but for one of low confidence; all others are found, except for those said to be missed."""
    ours, theirs = module_trees[pair.baseline], module_trees[pair.target]
    suggestion = match_trees(theirs, ours) if turned else match_trees(ours, theirs)
    found = {}
    for named in suggestion.pairs:
        paths = (named.baseline_path, named.target_path)
        if named.pair.confidence > Confidence.low:
            found[paths[turned]] = paths[not turned]
    assert found == {ours: theirs for ours, theirs in pair.by_hand.items() if ours not in pair.missed}


@pytest.mark.parametrize("pair", PAIRS, ids=lambda pair: f"{pair.baseline}-{pair.target}")
def test_the_plan_is_read(pair: Pair, module_trees: dict[str, ModuleTree], tmp_path: Path) -> None:
    (tmp_path / "plan.yaml").write_text(plan_text(match_trees(module_trees[pair.baseline], module_trees[pair.target])))
    plan = read_plan_file(tmp_path / "plan.yaml", GrafterConfig.model_fields)
    assert bool(plan.names) == (pair.target != "mixtral")
    assert bool(plan.rules) == pair.target.startswith("megatron")
