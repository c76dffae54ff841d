"""The small random bases that methods are compared on with PEFT, and what goes into them."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

SMALL = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
}


def llama(**changes: Any) -> Any:
    """Return a decoder of linear layers without biases, and RMSNorm."""
    from transformers import LlamaConfig, LlamaForCausalLM

    return LlamaForCausalLM(LlamaConfig(**{**SMALL, "num_key_value_heads": 2, **changes}))


def gpt2() -> Any:
    """Return a decoder of transformers' Conv1D, with biases and LayerNorm."""
    from transformers import GPT2Config, GPT2LMHeadModel

    return GPT2LMHeadModel(
        GPT2Config(vocab_size=64, n_positions=32, n_embd=32, n_layer=2, n_head=4)
    )


def bert() -> Any:
    """Return an encoder with a classification head, with biases and LayerNorm."""
    from transformers import BertConfig, BertForSequenceClassification

    return BertForSequenceClassification(BertConfig(**SMALL))


def t5() -> Any:
    """Return an encoder-decoder."""
    from transformers import T5Config, T5ForConditionalGeneration

    return T5ForConditionalGeneration(
        T5Config(d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4, vocab_size=64)
    )


EXPERTS = {**SMALL, "num_key_value_heads": 2, "num_experts_per_tok": 2}


def mixtral() -> Any:
    """Return a decoder whose MLPs are mixtures of three experts, in stacks [E, O, I]."""
    from transformers import MixtralConfig, MixtralForCausalLM

    return MixtralForCausalLM(MixtralConfig(**EXPERTS, num_local_experts=3))


def gpt_oss() -> Any:
    """Return a decoder of mixtures whose stacks are [E, I, O], with biases."""
    from transformers import GptOssConfig, GptOssForCausalLM

    return GptOssForCausalLM(GptOssConfig(**EXPERTS, head_dim=8, num_local_experts=3))


def vit() -> Any:
    """Return a vision encoder whose patches are a Conv2d named `projection`."""
    from transformers import ViTConfig, ViTForImageClassification

    sizes = {k: v for k, v in SMALL.items() if k != "vocab_size"}
    return ViTForImageClassification(ViTConfig(image_size=16, patch_size=4, **sizes))


def build(make: Callable[[], Any]) -> Any:
    """Return the base, in float32 and the same every time, with no weight left at a constant."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = make().float().eval()
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.ndim == 1:  # norms start at ones and biases at zeros
                    parameter.add_(0.1 * torch.randn_like(parameter))
    return model


@torch.no_grad()
def output(model: Any, **said: Any) -> torch.Tensor:
    """Return the logits of two rows; `said` is what the call says besides."""
    kind = model.config.model_type
    ids = torch.arange(3, 23).reshape(2, 10)
    if kind == "vit":
        pixels = torch.linspace(-1, 1, 2 * 3 * 16 * 16).reshape(2, 3, 16, 16)
        return model(pixel_values=pixels, **said).logits
    if kind == "t5":
        return model(input_ids=ids, decoder_input_ids=ids.flip(1), **said).logits
    return model(input_ids=ids, **said).logits


def randomize(model: Any, scale: float = 0.1) -> None:
    """Move everything that is trained off its start."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(scale * torch.randn(parameter.shape, generator=generator))


def settings_of_methods() -> dict[str, Any]:
    """Return the modules of `settings/` by the method they are of."""
    files = sorted((Path(__file__).parent / "settings").glob("*.py"))
    return {f.stem: importlib.import_module(f"tests.methods.settings.{f.stem}") for f in files}
