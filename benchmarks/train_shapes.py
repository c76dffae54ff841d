"""What `train.py` trains: shapes of models, rows of chats, and the work that a step of them is."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any

SMOL = {
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_hidden_layers": 30,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "vocab_size": 49152,
    "max_position_embeddings": 2048,
    "tie_word_embeddings": True,
}
"""SmolLM2-135M; the other architectures are compared at its size."""
WIDE = {"hidden_size": 384, "intermediate_size": 1024, "num_hidden_layers": 8}
LARGE = {"hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16}
SHAPES: dict[str, tuple[str, dict[str, Any]]] = {
    "25m": (
        "llama",
        {**SMOL, **WIDE, "num_attention_heads": 6, "num_key_value_heads": 2, "vocab_size": 32000},
    ),
    "135m": ("llama", SMOL),
    # Llama-3.2-1B
    "1b": (
        "llama",
        {**SMOL, **LARGE, "num_attention_heads": 32, "num_key_value_heads": 8}
        | {"vocab_size": 128256, "rope_theta": 500000.0},
    ),
    "qwen3": ("qwen3", {**SMOL, "head_dim": 64}),
    "gemma3": ("gemma3_text", {**SMOL, "head_dim": 64, "query_pre_attn_scalar": 64}),
    "phi3": ("phi3", {**SMOL, "pad_token_id": 0}),
    "mistral": ("mistral", {**SMOL, "head_dim": 64}),
    # GPT-2 and Pythia-160M, without dropout, so that both sides compute the same
    "gpt2": ("gpt2", {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}),
    "gpt_neox": (
        "gpt_neox",
        {"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12}
        | {"num_attention_heads": 12, "vocab_size": 50304, "max_position_embeddings": 2048},
    ),
}
"""name -> (model type of transformers, what its configuration has otherwise than by default)."""
SHORTEST, LONGEST, MEAN, SIGMA = 16, 1024, 200, 0.8
ASSISTANT = 0.6


def rows(count: int, vocabulary: int, seed: int = 0) -> list[tuple[list[int], list[int]]]:
    """Return `count` synthetic chats as (ids, labels), each of one to three turns.

    Lengths are lognormal with mean 200 and sigma 0.8, cut to 16..1024; the last 60% of each turn
    are the assistant's and carry labels, the rest has -100.
    """
    draw = random.Random(seed)
    made = []
    for _ in range(count):
        length = round(draw.lognormvariate(_location(), SIGMA))
        length = min(max(length, SHORTEST), LONGEST)
        ids = [draw.randrange(5, vocabulary) for _ in range(length)]
        turns = draw.randint(1, 3)
        labels = [-100] * length
        for turn in range(turns):
            start, end = length * turn // turns, length * (turn + 1) // turns
            first = end - round(ASSISTANT * (end - start))
            labels[first:end] = ids[first:end]
        made.append((ids, [-100, *labels[1:]]))
    return made


def _location() -> float:
    from math import log

    return log(MEAN) - SIGMA**2 / 2  # the mean of a lognormal is exp(mu + sigma^2 / 2)


def work(model: Any, adapter: int) -> dict[str, int]:
    """Return what `useful_flop` needs to know of a model and of its adapter's numbers."""
    from torch import nn
    from transformers.pytorch_utils import Conv1D

    head = model.get_output_embeddings()
    frozen = sum(
        module.weight.numel()
        for module in model.modules()
        if isinstance(module, nn.Linear | Conv1D) and module is not head
    )
    config = model.config
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return {
        "parameters": sum(p.numel() for p in model.parameters()),
        "frozen": frozen,
        "adapter": adapter,
        "head": head.weight.numel(),
        "attention": config.num_hidden_layers * config.num_attention_heads * width,
    }


def useful_flop(step: Sequence[tuple[list[int], list[int]]], model: dict[str, int]) -> float:
    """Return the operations that a LoRA step over these rows cannot do without.

    4 an input token and frozen weight (forward, and the gradient of the input), 6 for the
    adapter's, 4 for the head's at each label, and causal attention (6 s^2 q a layer, s the row's
    length, q the width of all heads). Padding and recomputed activations are not useful.
    """
    tokens = sum(len(ids) for ids, _ in step)
    trained = sum(label != -100 for _, labels in step for label in labels)
    squares = sum(len(ids) ** 2 for ids, _ in step)
    return (
        (4 * model["frozen"] + 6 * model["adapter"]) * tokens
        + 4 * model["head"] * trained
        + 6 * model["attention"] * squares
    )
