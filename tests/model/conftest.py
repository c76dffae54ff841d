"""One minute random model of each architecture, and an input for it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

SMALL = {
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "vocab_size": 40,
    "max_position_embeddings": 32,
}
WINDOWED = {**SMALL, "head_dim": 8, "sliding_window": 8}
EXPERTS = {**WINDOWED, "num_local_experts": 3, "num_experts_per_tok": 2}
GPT = {"n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 32, "vocab_size": 40}
VISION = {
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": 8,
    "patch_size": 4,
}

# name -> (class of the configuration, class of the model, settings, an explicit list of targets)
ARCHITECTURES: dict[str, tuple[str, str, dict[str, Any], list[str]]] = {
    "llama": ("LlamaConfig", "LlamaForCausalLM", SMALL, ["o_proj", "down_proj"]),
    "mistral": ("MistralConfig", "MistralForCausalLM", WINDOWED, ["k_proj", "up_proj"]),
    "qwen2": ("Qwen2Config", "Qwen2ForCausalLM", SMALL, ["q_proj", "gate_proj"]),
    "qwen3": ("Qwen3Config", "Qwen3ForCausalLM", WINDOWED, ["q_proj", "o_proj", "lm_head"]),
    "gemma2": ("Gemma2Config", "Gemma2ForCausalLM", WINDOWED, ["o_proj", "embed_tokens"]),
    "gemma3": ("Gemma3TextConfig", "Gemma3ForCausalLM", WINDOWED, ["embed_tokens", "down_proj"]),
    "phi3": ("Phi3Config", "Phi3ForCausalLM", {**SMALL, "pad_token_id": 0}, ["gate_up_proj"]),
    "gpt2": ("GPT2Config", "GPT2LMHeadModel", GPT, ["c_fc", "c_proj", "wte"]),
    "gpt_neox": ("GPTNeoXConfig", "GPTNeoXForCausalLM", SMALL, ["dense", "dense_4h_to_h"]),
    "opt": (
        "OPTConfig",
        "OPTForCausalLM",
        {**SMALL, "ffn_dim": 24, "word_embed_proj_dim": 16},
        ["fc1", "out_proj"],
    ),
    "falcon": ("FalconConfig", "FalconForCausalLM", SMALL, ["dense", "dense_h_to_4h"]),
    "mixtral": ("MixtralConfig", "MixtralForCausalLM", EXPERTS, ["k_proj", "o_proj"]),
    "qwen3_moe": (
        "Qwen3MoeConfig",
        "Qwen3MoeForCausalLM",
        {**WINDOWED, "num_experts": 3, "num_experts_per_tok": 2, "moe_intermediate_size": 16},
        ["q_proj", "k_proj", "v_proj", "o_proj"],
    ),
    "t5": (
        "T5Config",
        "T5ForConditionalGeneration",
        {"d_model": 16, "d_kv": 8, "d_ff": 24, "num_layers": 2, "num_heads": 2, "vocab_size": 40},
        ["k", "wo"],
    ),
    "bert": ("BertConfig", "BertForSequenceClassification", SMALL, ["key", "dense"]),
    "vit": ("ViTConfig", "ViTForImageClassification", VISION, ["fc1", "projection"]),
    "clip": (
        "CLIPConfig",
        "CLIPModel",
        {
            "text_config": {**SMALL, "eos_token_id": 39},
            "vision_config": VISION,
            "projection_dim": 16,
        },
        ["out_proj", "fc1", "patch_embedding"],
    ),
}


def inputs(name: str) -> dict[str, torch.Tensor]:
    """Return what the architecture's forward takes: two rows."""
    generator = torch.Generator().manual_seed(5)
    ids = torch.randint(3, 39, (2, 6), generator=generator)
    pixels = torch.randn(2, 3, 8, 8, generator=generator)
    if name == "vit":
        return {"pixel_values": pixels}
    if name == "clip":
        return {"input_ids": ids, "pixel_values": pixels, "attention_mask": torch.ones_like(ids)}
    if name == "t5":
        return {"input_ids": ids, "decoder_input_ids": ids.flip(1)}
    return {"input_ids": ids}


@pytest.fixture(scope="session")
def architecture() -> Callable[[str], Any]:
    """Return `build(name)`: a fresh random model, the same every time."""

    def build(name: str) -> Any:
        import transformers

        config_class, model_class, settings, _ = ARCHITECTURES[name]
        config = getattr(transformers, config_class)(**settings)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            return getattr(transformers, model_class)(config).float().eval()

    return build


def output(model: Any, name: str) -> torch.Tensor:
    """Return the model's logits on the architecture's input."""
    with torch.no_grad():
        out = model(**inputs(name))
    return out.logits_per_image if name == "clip" else out.logits
