"""A step's gradient in float32 and in bfloat16 over one float32 base, in turns in one process.

    python benchmarks/precision.py [--shapes tiny,25m,4x576] [--rounds 7] [--json FILE]

What `train.precision: auto` has to choose between: the weights stay in float32 either way. Rows are
the synthetic chats of `train_shapes.py`, 4 to a step (16 for inlay-tiny; "short" cuts them to 30%,
"full" trains all of inlay-tiny), LoRA on all linear layers, by the fast paths of a run. Ratios are
the median of those of the rounds, of the clock and of the processor's time.
"""

from __future__ import annotations

import os

os.environ["OMP_WAIT_POLICY"] = "passive"  # of use before torch is imported only

import argparse
import json
import statistics
import time
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from train_shapes import SHAPES, rows
from transformers import AutoConfig, AutoModelForCausalLM

import inlay
from inlay.data.encode import Example
from inlay.data.rows import Source
from inlay.objectives.sft import Sft
from inlay.train.fast import fast_paths
from inlay.train.setup import trainable
from inlay.train.step import Stepper

TINY = ("tiny", "short", "full")
OTHERS = {"25m": SHAPES["25m"], "4x576": ("llama", {**SHAPES["135m"][1], "num_hidden_layers": 4})}
LORA = {"r": 16, "lora_alpha": 32, "target_modules": "all-linear", "task_type": "CAUSAL_LM"}


def main() -> None:
    """Print a line for each shape; write all where asked."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--shapes", default=",".join([*TINY, *OTHERS]))
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    found = {}
    for shape in options.shapes.split(","):
        found[shape] = told = compare(shape, options.rounds)
        print(f"{shape:6}", *(f"{key} {value:.4g}" for key, value in told.items()), flush=True)
    if options.json:
        options.json.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


def compare(shape: str, rounds: int) -> dict[str, float]:
    """Return both sides' ms, bfloat16's over float32's, and how far the losses are apart."""
    with ExitStack() as stack:
        wide, narrow = (side(shape, d, stack) for d in (torch.float32, torch.bfloat16))
        examples = chats(shape, wide.model.get_input_embeddings().weight.shape[0])
        size, pairs, apart = 16 if shape in TINY else 4, [], 0.0
        for turn in range(rounds + 1):
            step = [examples[(turn * size + i) % len(examples)] for i in range(size)]
            order = (wide, narrow) if turn % 2 else (narrow, wide)
            made = {id(one): timed(one, turn, step) for one in order}
            a, b = made[id(wide)], made[id(narrow)]
            apart = max(apart, abs(a[2] - b[2]) / a[2])
            pairs += [(a, b)] if turn else []  # the first warms up
    return {
        "float32_ms": 1000 * statistics.median(a[0] for a, _ in pairs),
        "bfloat16_ms": 1000 * statistics.median(b[0] for _, b in pairs),
        "ratio": statistics.median(b[0] / a[0] for a, b in pairs),
        "ratio_cpu": statistics.median(b[1] / a[1] for a, b in pairs),
        "losses_apart": apart,
    }


def side(shape: str, dtype: torch.dtype, stack: ExitStack) -> Stepper:
    """Return what makes steps in `dtype`, by fast paths until `stack` ends."""
    torch.manual_seed(0)
    base, tokenizer = inlay.load_base()
    if shape in OTHERS:
        kind, settings = OTHERS[shape]
        base = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **settings))
    model: Any = base.float()
    if shape != "full":
        model = inlay.get_peft_model(model, inlay.LoraConfig(**LORA))
    model.train()
    objective, row = Sft(packing=True), chats(shape, 2000)[0]
    stack.enter_context(fast_paths(model, tokenizer, objective, row, dtype))
    return Stepper(model, trainable(model), objective, tokenizer, dtype, 0)


def chats(shape: str, words: int) -> list[Example]:
    """Return 64 rows."""
    share = 0.3 if shape == "short" else 1.0
    made = []
    for i, (ids, labels) in enumerate(rows(64, words)):
        kept = max(8, int(len(ids) * share))
        made.append(Example(ids[:kept], labels[:kept], f"{i}", Source("rows", i + 1), None))
    return made


def timed(one: Stepper, turn: int, step: list[Example]) -> tuple[float, float, float]:
    """Return a step's seconds by the clock and the processor, and its loss."""
    began, used = time.perf_counter(), time.process_time()
    loss = one.gradient(turn, [step]).loss
    found = (time.perf_counter() - began, time.process_time() - used, loss)
    for parameter in one.parameters.values():
        parameter.grad = None
    return found


if __name__ == "__main__":
    main()
