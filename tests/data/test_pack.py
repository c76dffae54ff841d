"""Packed rows do not see each other: for each kind of attention, and each way to compute it."""

from __future__ import annotations

import pytest
import torch

from inlay.data.collate import collate
from inlay.data.encode import Example
from inlay.data.pack import pack
from inlay.data.rows import Source

TINY = {
    "vocab_size": 128,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "pad_token_id": 0,
}
# windows of 4 are shorter than the rows, so that what a window lets in shows too
MODELS = {
    "llama": {},
    "mistral": {"sliding_window": 4},
    "qwen2": {"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 2},
    "qwen3": {"head_dim": 8},
    "gemma2": {"head_dim": 8, "sliding_window": 4},
    "gemma3_text": {"head_dim": 8, "sliding_window": 4},
    "phi3": {},
    "gpt2": {},
    "gpt_neox": {},
    "mixtral": {"num_local_experts": 4},
}


class Tokenizer:
    pad_token_id = eos_token_id = 0


def build(kind, attention):
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.for_model(kind, **{**TINY, **MODELS[kind]})
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config, attn_implementation=attention)
    return model.float().eval()


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("kind", MODELS)
def test_packed_and_padded_logits_are_those_of_each_row_alone(kind, attention):
    if (kind, attention) == ("gemma2", "sdpa"):
        pytest.skip("transformers has no sdpa for Gemma 2, whose scores are capped")
    model = build(kind, attention)
    generator = torch.Generator().manual_seed(1)
    rows = []
    for line, length in enumerate((7, 2, 12, 9), 1):
        ids = torch.randint(1, 128, (length,), generator=generator).tolist()
        rows.append(Example(ids, [-100, *ids[1:]], f"{line}", Source("rows.jsonl", line)))
    with torch.no_grad():
        packed = model(**pack(rows, 30).inputs(), use_cache=False).logits[0]
        padded = model(**collate(rows, Tokenizer).inputs(), use_cache=False).logits
        at = 0
        for i, row in enumerate(rows):
            length = len(row.input_ids)
            alone = model(torch.tensor([row.input_ids]), use_cache=False).logits[0]
            torch.testing.assert_close(packed[at : at + length], alone, rtol=1e-5, atol=2e-6)
            torch.testing.assert_close(padded[i, :length], alone, rtol=1e-5, atol=2e-6)
            at += length
