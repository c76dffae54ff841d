"""Tiny random models of many architectures."""

from __future__ import annotations

from typing import Any

import torch

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


def build(kind: str, attention: str, **settings: Any) -> Any:
    """Return a float32 model of `kind`; `settings` are of its configuration."""
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.for_model(kind, **{**TINY, **MODELS.get(kind, {}), **settings})
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config, attn_implementation=attention)
    return model.float().eval()
