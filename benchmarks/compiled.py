"""The layers of a training step by torch.compile (`train.compile`), beside the run's fast paths.

    python benchmarks/compiled.py [--shapes llama,full,gpt2] [--rounds 9] [--json FILE]

Four layers of 576 numbers, 800 to 863 packed tokens in four rows, forward and backward of the body
alone, in turns in one process: "fast" is what a run computes, "compiled" the same with its layers
compiled. A ratio is the median of those of the rounds, of the clock and of the processor's time.
"full" is a Llama that trains whole; the others have LoRA on all their linear layers.
"""

from __future__ import annotations

import os

os.environ["OMP_WAIT_POLICY"] = "passive"  # of use before torch is imported only

import argparse
import json
import statistics
import time
from contextlib import AbstractContextManager, ExitStack
from pathlib import Path
from typing import Any

import torch
from train_shapes import SMOL
from transformers import AutoConfig, AutoModelForCausalLM

import inlay
from inlay.model.fast import fast_paths
from inlay.train.compiled import compiled

SMALL = {**SMOL, "num_hidden_layers": 4, "vocab_size": 2048}
GPT2 = {"n_embd": 576, "n_layer": 4, "n_head": 9, "vocab_size": 2048, "n_positions": 2048}
NEOX = {**SMALL, "intermediate_size": 2304, "tie_word_embeddings": False}
SHAPES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", SMALL),
    "full": ("llama", SMALL),
    "gemma3": ("gemma3_text", {**SMALL, "head_dim": 64, "query_pre_attn_scalar": 64}),
    "gpt_neox": ("gpt_neox", NEOX),
    "gpt2": ("gpt2", {**GPT2, "resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}),
}
LORA = {"r": 16, "lora_alpha": 32, "target_modules": "all-linear", "task_type": "CAUSAL_LM"}
STEPS = [[318, 405, 30, 110], [200, 150, 300, 150], [318, 100, 250, 140], [60, 500, 190, 77]]
"""Lengths of the rows of each step."""


def main() -> None:
    """Print a line for each shape and dtype; write all where asked."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--shapes", default=",".join(SHAPES))
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    found = {}
    for shape in options.shapes.split(","):
        for dtype in (torch.bfloat16, torch.float32):
            name = f"{shape} {str(dtype).removeprefix('torch.')}"
            found[name] = told = compare(shape, dtype, options.rounds)
            print(f"{name:18}", *(f"{key} {value:.4g}" for key, value in told.items()), flush=True)
    if options.json:
        options.json.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


def compare(shape: str, dtype: torch.dtype, rounds: int) -> dict[str, float]:
    """Return both sides' ms, the compiled one's time over the other's, and what the start takes."""
    with ExitStack() as stack:
        fast, other = Side(shape, dtype), Side(shape, dtype)
        stack.enter_context(fast_paths(fast.model, fast.run))
        stack.enter_context(compiled(other.model, by_rows=True))
        first = {side: side.step(STEPS[0])[0] for side in (fast, other)}
        for lengths in STEPS[1:]:
            fast.step(lengths), other.step(lengths)
        pairs = []
        for turn in range(rounds):
            order = (fast, other) if turn % 2 else (other, fast)
            made = {side: side.step(STEPS[turn % len(STEPS)]) for side in order}
            pairs.append((made[fast], made[other]))
    return {
        "fast_ms": 1000 * statistics.median(a[0] for a, _ in pairs),
        "compiled_ms": 1000 * statistics.median(b[0] for _, b in pairs),
        "ratio": statistics.median(b[0] / a[0] for a, b in pairs),
        "ratio_cpu": statistics.median(b[1] / a[1] for a, b in pairs),
        "first_step_s": first[other] - first[fast],
    }


class Side:
    """A model that trains, and what it computes in."""

    def __init__(self, shape: str, dtype: torch.dtype) -> None:
        kind, settings = SHAPES[shape]
        torch.manual_seed(0)
        model: Any = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **settings))
        self.body = model.base_model
        if shape != "full":
            model = inlay.get_peft_model(model.to(dtype), inlay.LoraConfig(**LORA))
        self.model, self.dtype = model.train(), dtype

    def run(self, lengths: tuple[int, ...] = (8, 8)) -> torch.Tensor:
        """Return the hidden states [1, T, 576] of packed rows of these lengths."""
        generator = torch.Generator().manual_seed(sum(lengths))
        ids = torch.randint(5, 2000, (1, sum(lengths)), generator=generator)
        anew = torch.cat([torch.arange(n) for n in lengths])[None]
        with self.autocast():
            hidden: torch.Tensor = self.body(
                input_ids=ids, position_ids=anew, use_cache=False
            ).last_hidden_state
        return hidden

    def autocast(self) -> AbstractContextManager[Any]:
        """Return the context of the forward pass."""
        return torch.autocast("cpu", torch.bfloat16, enabled=self.dtype == torch.bfloat16)

    def step(self, lengths: Any) -> tuple[float, float]:
        """Return the seconds of a forward and backward pass, by the clock and the processor."""
        began, used = time.perf_counter(), time.process_time()
        self.run(lengths).float().square().mean().backward()
        self.model.zero_grad()
        return time.perf_counter() - began, time.process_time() - used


if __name__ == "__main__":
    main()
