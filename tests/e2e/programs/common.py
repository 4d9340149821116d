"""What the programs here agree on, as the users of one model do: its sizes, a checkpoint, the token ids.

The checkpoint is one safetensors file with the names that transformers gives to Llama's weights. Each program loads it
in its own way and sharding, but for its own decoder layers (`--own-layers`), which it makes from its own `--seed`.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch.distributed.tensor import DTensor

VOCAB, HIDDEN, INTERMEDIATE, LAYERS, HEADS, KV_HEADS = 512, 128, 256, 4, 8, 4
HEAD_DIM = HIDDEN // HEADS
BATCH, SEQUENCE = 2, 32
NORM_EPS, ROPE_THETA = 1e-5, 10000.0


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    parser.add_argument("out", type=Path)
    parser.add_argument("--weights", type=Path, required=True, help="the checkpoint that all programs share")
    parser.add_argument("--seed", type=int, required=True, help="of this program's own layers")
    parser.add_argument("--own-layers", type=int, nargs="*", default=[])
    parser.add_argument("--steps", type=int, default=1)
    return parser.parse_args()


def make_weights(seed: int) -> dict[str, torch.Tensor]:
    """All weights, float32, from `seed`; on a scale at which every layer changes the residual a lot."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator) / shape[-1] ** 0.5

    def norm() -> torch.Tensor:
        return 1 + 0.2 * torch.randn(HIDDEN, generator=generator)

    weights = {"model.embed_tokens.weight": normal(VOCAB, HIDDEN) * HIDDEN**0.5}
    for i in range(LAYERS):
        layer = {
            "input_layernorm": norm(),
            "self_attn.q_proj": normal(HEADS * HEAD_DIM, HIDDEN),
            "self_attn.k_proj": normal(KV_HEADS * HEAD_DIM, HIDDEN),
            "self_attn.v_proj": normal(KV_HEADS * HEAD_DIM, HIDDEN),
            "self_attn.o_proj": normal(HIDDEN, HEADS * HEAD_DIM),
            "post_attention_layernorm": norm(),
            "mlp.gate_proj": normal(INTERMEDIATE, HIDDEN),
            "mlp.up_proj": normal(INTERMEDIATE, HIDDEN),
            "mlp.down_proj": normal(HIDDEN, INTERMEDIATE),
        }
        weights.update({f"model.layers.{i}.{name}.weight": value for name, value in layer.items()})
    return {**weights, "model.norm.weight": norm(), "lm_head.weight": normal(VOCAB, HIDDEN)}


def load_weights(options: argparse.Namespace) -> dict[str, torch.Tensor]:
    """The shared checkpoint, with this program's own layers in place of those of the checkpoint."""
    own = make_weights(options.seed)
    prefixes = tuple(f"model.layers.{i}." for i in options.own_layers)
    return load_file(options.weights) | {name: value for name, value in own.items() if name.startswith(prefixes)}


def token_ids() -> torch.Tensor:
    return torch.arange(BATCH * SEQUENCE).reshape(BATCH, SEQUENCE) * 37 % VOCAB


class Seen:
    """What this rank had in hand: each point's value after `dump` gave it back, and the logits, step by step."""

    def __init__(self) -> None:
        self.step = 0
        self._tensors: dict[str, torch.Tensor] = {}
        self._kinds: dict[str, str] = {}

    def keep(self, name: str, value: torch.Tensor, kind: str = "") -> None:
        """A copy, since some models go on to work in the same memory. `kind`: of what class the point's value was."""
        local: torch.Tensor = value.to_local() if isinstance(value, DTensor) else value
        self._tensors[f"{self.step}.{name}"] = local.detach().clone(memory_format=torch.contiguous_format)
        self._kinds[name] = kind

    def save(self, directory: Path, role_rank: int) -> None:
        """As `rank<r>.safetensors`, with names such as `0.layer_in.3` (step, point, layer) and `0.logits`."""
        directory.mkdir(parents=True, exist_ok=True)
        save_file(self._tensors, directory / f"rank{role_rank}.safetensors", {"kinds": json.dumps(self._kinds)})
