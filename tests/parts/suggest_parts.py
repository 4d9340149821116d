"""Trees and plans for the tests of `grafter plan suggest`."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from grafter.analysis.plan_suggest.matching import match_trees
from grafter.analysis.plan_suggest.pairs import Confidence, Suggestion
from grafter.analysis.plan_suggest.wording import plan_text
from grafter.capture.module_tree import ModuleNode, ModuleTree, Weight
from grafter.capture.naming import Naming
from grafter.capture.selection import select_modules
from grafter.config.names import NameRule
from grafter.config.settings.config import GrafterConfig
from grafter.config.settings.plan_file import PlanFile, read_plan_file

SIZES = {
    "vocab_size": 64,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
# transformers' Llama in the words of torchtitan, and in those of Megatron where nothing is fused.
TITAN_NAMES = {
    "embed_tokens": "tok_embeddings",
    "self_attn": "attention",
    "q_proj": "wq",
    "k_proj": "wk",
    "v_proj": "wv",
    "o_proj": "wo",
    "mlp": "feed_forward",
    "gate_proj": "w1",
    "up_proj": "w3",
    "down_proj": "w2",
    "input_layernorm": "attention_norm",
    "post_attention_layernorm": "ffn_norm",
    "lm_head": "output",
}
MEGATRON_NAMES = {
    "embed_tokens": "word_embeddings",
    "self_attn": "self_attention",
    "o_proj": "linear_proj",
    "down_proj": "linear_fc2",
    "post_attention_layernorm": "pre_mlp_layernorm",
    "norm": "final_layernorm",
    "lm_head": "output_layer",
    "model": "decoder",
}


def llama() -> torch.nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    with torch.device("meta"):
        return LlamaForCausalLM(LlamaConfig(**SIZES))


def mixtral() -> torch.nn.Module:
    from transformers import MixtralConfig, MixtralForCausalLM

    with torch.device("meta"):
        return MixtralForCausalLM(MixtralConfig(num_local_experts=2, **SIZES))


def renamed(tree: ModuleTree, names: Mapping[str, str]) -> ModuleTree:
    """The tree with other words in its paths."""
    return changed(tree, path=lambda path: ".".join(names.get(segment, segment) for segment in path.split(".")))


def changed(
    tree: ModuleTree,
    *,
    path: Callable[[str], str] = lambda path: path,
    shape: Callable[[str, tuple[int, ...]], tuple[int, ...]] = lambda path, shape: shape,
) -> ModuleTree:
    """The tree with other paths, or with other shapes (told by the path before)."""
    return ModuleTree(
        modules=tuple(
            node.model_copy(
                update={
                    "path": path(node.path),
                    "weights": {
                        name: weight.model_copy(update={"shape": shape(node.path, weight.shape)})
                        for name, weight in node.weights.items()
                    },
                }
            )
            for node in tree.modules
        )
    )


def divided(tree: ModuleTree, ranks: int, dims: Mapping[str, int]) -> ModuleTree:
    """One rank's part under tensor parallelism: by a word of a path, the dim that is divided."""

    def part(path: str, shape: tuple[int, ...]) -> tuple[int, ...]:
        dim = next((dims[segment] for segment in reversed(path.split(".")) if segment in dims), None)
        return tuple(size // ranks if number == dim else size for number, size in enumerate(shape))

    return changed(tree, shape=part)


def node(path: str, *shape: int, kind: str = "", arguments: tuple[str, ...] = (), tensors: tuple[str, ...] = ()) -> Any:
    """A module; with a weight of that shape where one is given."""
    kind = kind or ("Linear" if shape else "Block")
    weights = {"weight": Weight(shape=shape, dtype="float32")} if shape else {}
    return ModuleNode(
        path=path,
        class_name=kind,
        weights=weights,
        arguments=arguments,
        tensors=tensors,
        can_be_called=kind != "ModuleList",
    )


def tree(*nodes: ModuleNode) -> ModuleTree:
    return ModuleTree(modules=(ModuleNode(path="", class_name="Model"), *nodes))


def found_pairs(suggestion: Suggestion, least: Confidence = Confidence.low) -> dict[str, str]:
    """Baseline's path -> target's, of pairs that are that sure at least."""
    return {n.baseline_path: n.target_path for n in suggestion.pairs if n.pair.confidence >= least}


def confidence_of(suggestion: Suggestion, baseline_path: str) -> str:
    (named,) = [named for named in suggestion.pairs if named.baseline_path == baseline_path]
    return named.pair.confidence.name


def left_of(suggestion: Suggestion, side: str) -> dict[str, str]:
    return {left.path: left.reason for left in suggestion.left if left.side == side}


def pattern(path: str) -> str:
    """A path with `{layer_id}` for its number."""
    return re.sub(r"(^|\.)\d+(?=\.|$)", r"\1{layer_id}", path, count=1)


def suggested_plan(baseline: ModuleTree, target: ModuleTree, directory: Path) -> PlanFile:
    path = directory / "plan.yaml"
    path.write_text(plan_text(match_trees(baseline, target)))
    return read_plan_file(path, GrafterConfig.model_fields)


def module_names(model: torch.nn.Module, rules: tuple[NameRule, ...], role: str) -> dict[str, str]:
    """By the path of each module that has points: the key under which it is announced."""
    naming = Naming(rules, role)
    return {path: naming.of_module(model, path).key for path, _ in select_modules(model, ())}
