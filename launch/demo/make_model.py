"""Saves the demo's model: a small Llama with random weights from a fixed seed. Takes no network.

    python make_model.py DIRECTORY

A directory that already holds the model is left as it is.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM


def main(directory: Path) -> None:
    if (directory / "model.safetensors").exists():
        return
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=512,
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=4,
        num_attention_heads=8,
        num_key_value_heads=4,
    )
    # Saved beside its final place and renamed: an interrupted first run leaves no half a model behind.
    unfinished = directory.with_name(directory.name + ".unfinished")
    LlamaForCausalLM(config).save_pretrained(unfinished)
    unfinished.rename(directory)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
