"""Common names of modules. Names with the same meaning are listed together; other names are compared as text."""

from __future__ import annotations

import re
from difflib import SequenceMatcher
from functools import lru_cache

# Meaning: the names that programs use for it. A name may have several meanings (`w1`, `output`).
_MEANINGS = {
    "query": "q q_proj wq query q_lin to_q linear_q query_proj q_projection",
    "key": "k k_proj wk key k_lin to_k linear_k key_proj k_projection",
    "value": "v v_proj wv value v_lin to_v linear_v value_proj v_projection",
    "qkv": "qkv qkv_proj linear_qkv wqkv query_key_value c_attn in_proj to_qkv attn_qkv",
    "attention output": "o_proj wo out_proj linear_proj to_out c_proj proj attn_out out_lin o out",
    "attention": "self_attn attention self_attention attn selfattention sa mha",
    "cross attention": "cross_attn cross_attention encoder_attn crossattention encdecattention",
    "inner attention": "core_attention inner_attention dot_product_attention sdpa attn_fn",
    "feed-forward": "mlp feed_forward feedforward ffn ff block_sparse_moe moe sparse_moe",
    "gate": "gate_proj w1 wi_0 gate linear_gate",
    "up": "up_proj w3 fc1 linear_fc1 c_fc fc_in lin1 dense_h_to_4h wi wi_1 up linear1 linear_1",
    "gate and up": "gate_up_proj linear_fc1 w13 gate_up wi_fused fc1",
    "down": "down_proj w2 fc2 linear_fc2 c_proj fc_out lin2 dense_4h_to_h wo down linear2 linear_2",
    "norm before attention": "input_layernorm attention_norm norm1 norm_1 ln_1 ln1 attn_norm input_norm "
    "pre_attention_layernorm self_attn_layer_norm pre_attn_norm attention_layernorm",
    "norm before feed-forward": "post_attention_layernorm ffn_norm norm2 norm_2 ln_2 ln2 mlp_norm pre_mlp_layernorm "
    "post_attention_norm pre_feedforward_layernorm final_layer_norm pre_mlp_norm ff_norm feed_forward_norm",
    "final norm": "norm final_layernorm ln_f final_norm norm_f final_layer_norm ln_final last_norm",
    "query norm": "q_norm q_layernorm query_norm q_ln",
    "key norm": "k_norm k_layernorm key_norm k_ln",
    "token embedding": "embed_tokens tok_embeddings word_embeddings wte tok_emb token_embedding embed_in embeddings",
    "position embedding": "wpe position_embeddings pos_emb embed_positions position_embedding pos_embed",
    "rotary": "rotary_emb rotary_pos_emb rope rotary rotary_embedding",
    "output layer": "lm_head output output_layer head embed_out unembed lm_output",
    "layers": "layers h blocks layer block",
    "router": "router gate gating",
    "experts": "experts local_experts",
    "activation": "act_fn activation_func act activation act_func",
    "decoder": "decoder model transformer backbone",
    "embedding dropout": "embedding_dropout embd_dropout drop_emb",
}
FUSED = {"qkv": ("query", "key", "value"), "gate and up": ("gate", "up")}

# How alike two names are, from 0 to 1.
SAME, KNOWN, ALIKE, OPPOSED = 1.0, 0.95, 0.6, -1.0


def _by_name() -> dict[str, frozenset[str]]:
    found: dict[str, set[str]] = {}
    for meaning, names in _MEANINGS.items():
        for name in names.split():
            found.setdefault(name, set()).add(meaning)
    return {name: frozenset(meanings) for name, meanings in found.items()}


_MEANINGS_OF = _by_name()


@lru_cache(maxsize=65536)
def meanings_of(name: str) -> frozenset[str]:
    """The common meanings of a segment of a path; empty for a name that is not in the vocabulary."""
    return _MEANINGS_OF.get(_plain(name), frozenset())


def _plain(name: str) -> str:
    """Makes `SelfAttention`, `selfAttention` and `self_attention` one name."""
    return re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", name).lower().strip("_")


@lru_cache(maxsize=65536)
def name_likeness(a: str, b: str) -> float:
    """1 for equal names, 0.95 for two names of one meaning, -1 for known names of different meanings, else by their
    text.
    """
    if a == b:
        return SAME
    ours, theirs = meanings_of(a), meanings_of(b)
    if ours and theirs:
        return KNOWN if ours & theirs else OPPOSED
    return 0.9 * _text_likeness(_plain(a), _plain(b))


@lru_cache(maxsize=65536)
def class_likeness(a: str, b: str) -> float:
    """From 0 to 1. `LlamaRMSNorm` and `RMSNorm` are similar, and so are `Linear` and `RowParallelLinear`."""
    ours, theirs = (
        set(re.findall(r"[A-Z]+(?![a-z])|[A-Z][a-z]+|\d+", a)),
        set(re.findall(r"[A-Z]+(?![a-z])|[A-Z][a-z]+|\d+", b)),
    )
    if a == b:
        return 1.0
    if not ours or not theirs:
        return _text_likeness(a.lower(), b.lower())
    return len(ours & theirs) / min(len(ours), len(theirs))


def _text_likeness(a: str, b: str) -> float:
    return SequenceMatcher(None, a, b, autojunk=False).ratio()
