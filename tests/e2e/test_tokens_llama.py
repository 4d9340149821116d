"""A transformers Llama on one packed batch against the same model with a KV cache: rows of its layers meet by token.

The target prefills a prompt once, and then runs each request's rest on a copy of that cache, padded on the left: what
an engine does after a prefix hit. Only those rows are there, at later positions, in a batch `b s`.
"""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from jobs import Jobs, Rank, succeed

import grafter

LAYERS, HIDDEN = 3, 64
PREFIX = [7, 3, 9, 1, 5]
REQUESTS = {"short": [11, 12], "long": [21, 22, 23, 24], "one": [31]}


def make_model() -> Any:
    import transformers

    transformers.logging.set_verbosity_error()
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=64, hidden_size=HIDDEN, intermediate_size=128, num_hidden_layers=LAYERS, num_attention_heads=4,
        num_key_value_heads=2, attn_implementation="eager",
    )  # fmt: skip
    return transformers.LlamaForCausalLM(config).eval()


@torch.no_grad()
def train_packed(rank: Rank) -> None:
    """All requests in one row of a batch; each token sees those of its own request before it."""
    model = make_model()
    grafter.attach(model, "model.layers.*")
    ids, places, owners = [], [], []
    for name, rest in REQUESTS.items():
        ids += PREFIX + rest
        places += range(len(PREFIX) + len(rest))
        owners += [name] * (len(PREFIX) + len(rest))
    owner = torch.tensor([list(REQUESTS).index(name) for name in owners])
    sees = (owner[:, None] == owner[None]) & torch.ones(len(ids), len(ids)).tril().bool()
    mask = torch.where(sees, 0.0, torch.finfo(torch.float32).min)[None, None]
    tokens = grafter.Tokens.from_positions([owners], [places])
    with grafter.context(tokens=tokens):
        model.model(torch.tensor([ids]), attention_mask=mask, position_ids=torch.tensor([places]), use_cache=False)


@torch.no_grad()
def serve_after_a_prefix_hit(rank: Rank) -> None:
    """`shift`: how far positions are off after the hit, which is the fault."""
    shift = rank.arguments[0]
    model = make_model()
    prefix = model.model(torch.tensor([PREFIX]), use_cache=True).past_key_values
    grafter.attach(model, "model.layers.*")
    names = ["long", "one", "short"]
    width = max(len(REQUESTS[name]) for name in names)
    prefix = copy.deepcopy(prefix)
    prefix.batch_repeat_interleave(len(names))
    ids, places, told, seen = [], [], [], []
    for name in names:
        padding = [0] * (width - len(REQUESTS[name]))
        own = list(range(len(PREFIX), len(PREFIX) + len(REQUESTS[name])))
        ids.append(padding + REQUESTS[name])
        places.append(padding + [place + shift for place in own])
        told.append([-1] * len(padding) + own)
        seen.append([1] * len(PREFIX) + padding + [1] * len(own))
    tokens = grafter.Tokens.from_positions(names, told)
    with grafter.context(tokens=tokens):
        model.model(
            torch.tensor(ids), attention_mask=torch.tensor(seen), position_ids=torch.tensor(places),
            past_key_values=prefix, use_cache=True,
        )  # fmt: skip


@pytest.mark.parametrize("shift", [0, 1])
def test_rows_after_a_prefix_hit_are_those_of_the_packed_batch(tmp_path: Path, shift: int) -> None:
    """Right, they agree to the last digits; with positions off by one, all that the first attention makes differs."""
    rule = '{match: "*", dims: "b s h"}'
    plan = tmp_path / "plan.yaml"
    plan.write_text(f"rules: [{rule}]\n")
    wanted = "name in ('model.layers.self_attn.out.0', 'model.layers.out', 'model.layers.input_layernorm.out')"
    with Jobs(tmp_path, compare_filter=wanted, plan=plan) as jobs:
        jobs.start("baseline", 1, train_packed)
        jobs.start("target", 1, serve_after_a_prefix_hit, shift)
        succeed(jobs.wait())
        records = jobs.ledgers()["target", 0]
    assert len(records) == 3 * LAYERS and {record.outcome for record in records} == {"compared"}
    for record in records:
        assert (record.tokens.matched, record.tokens.only_here) == (7, 0)
        assert record.tokens.only_there_tokens == [f"{name}:0..4" for name in REQUESTS]
    of_layer = {(record.name, record.tags["layer_id"]): record.difference.rel for record in records}
    for (name, layer), rel in of_layer.items():
        came_before = layer == 0 and name.endswith("input_layernorm.out")
        assert rel < 1e-11 if not shift or came_before else rel > 1e-9, (name, layer, rel)
