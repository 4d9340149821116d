"""transformers' Llama in one process, as somebody has it who never heard of grafting.

python plain_llama.py OUT --weights FILE --seed N [--own-layers I ...] [--steps N]
"""

import torch
from common import (
    HEADS,
    HIDDEN,
    INTERMEDIATE,
    KV_HEADS,
    LAYERS,
    NORM_EPS,
    ROPE_THETA,
    VOCAB,
    Seen,
    load_weights,
    parse_arguments,
    token_ids,
)
from transformers import LlamaConfig, LlamaForCausalLM

CONFIG = LlamaConfig(
    vocab_size=VOCAB,
    hidden_size=HIDDEN,
    intermediate_size=INTERMEDIATE,
    num_hidden_layers=LAYERS,
    num_attention_heads=HEADS,
    num_key_value_heads=KV_HEADS,
    rms_norm_eps=NORM_EPS,
    rope_parameters={"rope_type": "default", "rope_theta": ROPE_THETA},
    use_cache=False,
)


def make_model(weights: dict[str, torch.Tensor]) -> LlamaForCausalLM:
    model = LlamaForCausalLM(CONFIG)
    model.load_state_dict(weights)
    return model.eval()


if __name__ == "__main__":
    options = parse_arguments()
    model = make_model(load_weights(options))
    seen = Seen()
    with torch.no_grad():
        for seen.step in range(options.steps):
            seen.keep("logits", model(input_ids=token_ids()).logits)
    seen.save(options.out, 0)
