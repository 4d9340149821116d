"""A server with continuous batching around transformers' Llama: paged keys and values, prefix reuse, preemption.

python continuous_batching.py OUT --weights FILE --sessions N [--fault-from N --fault-layer I]
torchrun --standalone --nproc-per-node 2 continuous_batching.py OUT ...

The model is transformers' own, with an attention function of ours, as serving engines have it. Each session serves the
same conversations from an empty cache. From the session of `--fault-from` on, a layer takes positions that are off by
one for all rows after a prefix hit.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from common import HEAD_DIM, KV_HEADS, LAYERS, Seen
from dumping import keep_what_layers_pass_on
from safetensors.torch import load_file
from scheduling import BLOCK_SIZE, BLOCKS, Chunk, Scheduler
from sharded_llama import RANK, WORLD_SIZE, load_model
from torch.nn.functional import scaled_dot_product_attention
from traffic import of_session
from transformers import AttentionInterface, LlamaForCausalLM

import grafter


class PagedCache:
    """Keys and values of this rank's heads, [slots, heads, head_dim] for each layer; a block is BLOCK_SIZE slots."""

    def __init__(self, heads: int) -> None:
        shape = (LAYERS, BLOCKS * BLOCK_SIZE, heads, HEAD_DIM)
        self.keys, self.values = torch.zeros(shape), torch.zeros(shape)

    @staticmethod
    def slots(chunk: Chunk) -> torch.Tensor:
        """Of a request's rows from the first to the chunk's last, in order."""
        slots = torch.tensor(chunk.blocks)[:, None] * BLOCK_SIZE + torch.arange(BLOCK_SIZE)
        return slots.flatten()[: chunk.start + chunk.count]


class Batch:
    """One pass: the rows of all chunks, one after the other."""

    def __init__(self, chunks: list[Chunk], cache: PagedCache) -> None:
        self.chunks, self.cache = chunks, cache
        ids = [chunk.request.tokens[chunk.start : chunk.start + chunk.count] for chunk in chunks]
        self.token_ids = torch.tensor([sum(ids, ())])
        self.positions = torch.cat([torch.arange(chunk.start, chunk.start + chunk.count) for chunk in chunks])[None]
        self.after_hit = torch.cat([torch.full((chunk.count,), int(chunk.hit > 0)) for chunk in chunks])[None]
        self.slots = [cache.slots(chunk) for chunk in chunks]
        self.ends = torch.tensor([chunk.count for chunk in chunks]).cumsum(0) - 1
        self.masks = [
            torch.arange(chunk.start + chunk.count) <= torch.arange(chunk.start, chunk.start + chunk.count)[:, None]
            for chunk in chunks
        ]

    @property
    def tokens(self) -> grafter.Tokens:
        names, counts, starts = zip(*[(chunk.name, chunk.count, chunk.start) for chunk in self.chunks], strict=True)
        return grafter.Tokens.from_lengths(names, counts, starts)


def paged_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: None,
    *,
    batch: Batch,
    scaling: float,
    **_: Any,
) -> tuple[torch.Tensor, None]:
    """query, key, value: [1, heads, rows, head_dim], of this pass. Gives [1, rows, heads, head_dim]."""
    layer: Any = module.layer_idx
    keys, values = batch.cache.keys[layer], batch.cache.values[layer]
    mixed, first = [], 0
    for chunk, slots, mask in zip(batch.chunks, batch.slots, batch.masks, strict=True):
        rows = slice(first, first + chunk.count)
        keys[slots[chunk.start :]] = key[0, :, rows].transpose(0, 1)
        values[slots[chunk.start :]] = value[0, :, rows].transpose(0, 1)
        mixed.append(
            scaled_dot_product_attention(
                query[:, :, rows], keys[slots].transpose(0, 1)[None], values[slots].transpose(0, 1)[None],
                attn_mask=mask, scale=scaling, enable_gqa=True,
            )
        )  # fmt: skip
        first += chunk.count
    return torch.cat(mixed, dim=2).transpose(1, 2).contiguous(), None


class Server:
    """Serves conversations until all have their answers; what the model itself would say is in the logits."""

    def __init__(self, model: LlamaForCausalLM) -> None:
        AttentionInterface.register("tests_paged", paged_attention)
        model.set_attn_implementation("tests_paged")
        self._model = model
        self._cache = PagedCache(heads=KV_HEADS // WORLD_SIZE)

    @torch.no_grad()
    def serve(self, scheduler: Scheduler, seen: Seen) -> None:
        while chunks := scheduler.next_pass():
            batch = Batch(chunks, self._cache)
            with grafter.context(tokens=batch.tokens):
                hidden = self._model.model(batch.token_ids, position_ids=batch.positions, batch=batch)[0]
            seen.keep("logits", self._model.lm_head(hidden[0, batch.ends]))
            scheduler.computed(chunks)
            grafter.step()
            seen.step += 1


def plant_fault(model: LlamaForCausalLM, layer_id: int) -> torch.utils.hooks.RemovableHandle:
    """Positions off by one after a prefix hit, in one layer."""

    def shift(layer: torch.nn.Module, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        batch: Batch = kwargs["batch"]
        shifted = model.model.rotary_emb(args[0], position_ids=batch.positions + batch.after_hit)
        return args, {**kwargs, "position_embeddings": shifted}

    return model.model.layers[layer_id].register_forward_pre_hook(shift, with_kwargs=True)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("out", type=Path)
    parser.add_argument("--weights", type=Path, required=True)
    parser.add_argument("--sessions", type=int, required=True)
    parser.add_argument("--fault-from", type=int)
    parser.add_argument("--fault-layer", type=int)
    options = parser.parse_args()
    model = load_model(load_file(options.weights), options.out / "checkpoint")
    grafter.set_axes(tp=(RANK, WORLD_SIZE))
    grafter.attach(model, "model.layers.?")
    seen = Seen()
    keep_what_layers_pass_on(model, seen)
    for session in range(options.sessions):
        if session == options.fault_from:
            plant_fault(model, options.fault_layer)
        Server(model).serve(Scheduler(of_session(session)), seen)
    seen.save(options.out, RANK)
    if dist.is_initialized():
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
