"""transformers' Llama on one packed batch: all conversations of a session in one row, each with positions from 0 on.

python packed_batch.py OUT --weights FILE --sessions N --passes N

Points pair one to one, so a program that is to meet a server's passes runs the same batch as often.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from common import Seen
from dumping import keep_what_layers_pass_on
from plain_llama import make_model
from safetensors.torch import load_file
from traffic import of_session

import grafter

parser = argparse.ArgumentParser()
parser.add_argument("out", type=Path)
parser.add_argument("--weights", type=Path, required=True)
parser.add_argument("--sessions", type=int, required=True)
parser.add_argument("--passes", type=int, required=True, help="of a session")
options = parser.parse_args()
model = make_model(load_file(options.weights))
grafter.attach(model, "model.layers.?")
seen = Seen()
keep_what_layers_pass_on(model, seen)
with torch.no_grad():
    for session in range(options.sessions):
        conversations = of_session(session)
        token_ids = torch.tensor([sum((one.tokens for one in conversations), ())])
        positions = torch.cat([torch.arange(len(one.tokens)) for one in conversations])[None]
        names, lengths = zip(*[(one.name, len(one.tokens)) for one in conversations], strict=True)
        with grafter.context(tokens=grafter.Tokens.from_lengths(names, lengths)):
            for _ in range(options.passes):
                # transformers sees the packing by positions that begin again.
                model.model(token_ids, position_ids=positions)
                grafter.step()
                seen.step += 1
seen.save(options.out, 0)
