"""Steps of a plain torch loop, with and without `inlay.fast`, in turns in one process.

    python benchmarks/own_loop.py [--rounds 5] [--words 49152 6144] [--json FILE]

A Llama of 4 layers, 576 wide; LoRA of rank 16 on all linear layers; AdamW; 2 threads. With 49152
words the head is two thirds of it, with 6144 a fifth, as in a model of 30 layers. A step is four
chats: `padded` to the longest, with an attention mask, as transformers' collators make them, or
rows of `one` length, all of it trained; without a cache for keys. `fast` is the loop under
`inlay.fast` with the model's own loss, `loss` with `inlay.causal_lm_loss` besides. A ratio, the
plain time over theirs, is the median of the rounds'; `cpu` is of the processor's time, which others
hardly move.
"""

from __future__ import annotations

import os

os.environ["OMP_WAIT_POLICY"] = "passive"  # of use before torch is imported only

import argparse
import json
import statistics
import time
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from train_shapes import SMOL, rows
from transformers import LlamaConfig, LlamaForCausalLM

import inlay
from inlay import LoraConfig, get_peft_model
from inlay.cli._machine import processor

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
ROWS, LENGTH = 4, 128


def main() -> None:
    """Print a line for each dtype, kind of batch and way; write all where asked."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--words", type=int, nargs="+", default=[49152, 6144])
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(2)
    found = {}
    for words in options.words:
        for dtype in DTYPES:
            for kind, make in {"padded": padded, "one": of_one_length}.items():
                ways = compare(
                    {**make(words), "use_cache": False}, words, DTYPES[dtype], options.rounds
                )
                found[name := f"{words} {dtype} {kind}"] = ways
                for way, told in ways.items():
                    print(f"{name:22} {way:5}", *(f"{k} {v:.4g}" for k, v in told.items()))
    if options.json:
        told = {"processor": processor()[0], "threads": 2, "found": found}
        options.json.write_text(json.dumps(told, indent=1) + "\n", encoding="utf-8")


def padded(words: int) -> dict[str, Any]:
    """Return chats of many lengths with their attention mask; -100 where a label is missing."""
    chats = rows(ROWS, words)
    width = max(len(ids) for ids, _ in chats)
    filled = [
        torch.tensor([chat[i] + [value] * (width - len(chat[i])) for chat in chats])
        for i, value in enumerate((0, -100))
    ]
    mask = torch.tensor([[1] * len(ids) + [0] * (width - len(ids)) for ids, _ in chats])
    return {"input_ids": filled[0], "labels": filled[1], "attention_mask": mask}


def of_one_length(words: int) -> dict[str, Any]:
    """Return rows of 128 tokens, every one of them trained."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(5, words, (ROWS, LENGTH), generator=generator)
    return {"input_ids": ids, "labels": ids, "attention_mask": torch.ones_like(ids)}


def compare(
    batch: dict[str, Any], words: int, dtype: torch.dtype, rounds: int
) -> dict[str, dict[str, float]]:
    """Return of each way its ms a step, the plain time over its, and its last loss."""
    sides = {way: Side(batch, words, dtype, way) for way in ("plain", "fast", "loss")}
    taken: dict[str, list[tuple[float, float]]] = {way: [] for way in sides}
    for number in range(rounds + 1):
        for way, side in sides.items():
            told = side.step()
            if number:  # the first one compiles and fills caches
                taken[way].append(told)
    return {
        way: {
            "ms": 1000 * statistics.median(clock for clock, _ in told),
            "ratio": statistics.median(
                one[0] / two[0] for one, two in zip(taken["plain"], told, strict=True)
            ),
            "cpu": statistics.median(
                one[1] / two[1] for one, two in zip(taken["plain"], told, strict=True)
            ),
            "loss": sides[way].loss,
        }
        for way, told in taken.items()
    }


class Side:
    """A model and its optimizer, which goes a step at a time."""

    def __init__(self, batch: dict[str, Any], words: int, dtype: torch.dtype, way: str) -> None:
        """Make the same model for each way."""
        torch.manual_seed(0)
        shape = {**SMOL, "num_hidden_layers": 4, "vocab_size": words}
        base = LlamaForCausalLM(LlamaConfig(**shape)).to(dtype)
        self.model: Any = get_peft_model(base, LoraConfig(r=16, target_modules="all-linear"))
        self.optimizer = torch.optim.AdamW(
            [p for p in self.model.parameters() if p.requires_grad], lr=1e-3, fused=True
        )
        self.dtype, self.batch, self.loss = dtype, batch, 0.0
        if way != "plain":
            inlay.fast(self.model)
        own: Callable[[], torch.Tensor] = lambda: self.model(**batch).loss  # noqa: E731
        self.loss_of = (lambda: inlay.causal_lm_loss(self.model, batch)) if way == "loss" else own

    def step(self) -> tuple[float, float]:
        """Return the seconds of a step, by the clock and of the processor."""
        half = self.dtype != torch.float32
        start, used = time.perf_counter(), time.process_time()
        with torch.autocast("cpu", self.dtype) if half else nullcontext():
            loss = self.loss_of()
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.loss = loss.item()
        return time.perf_counter() - start, time.process_time() - used


if __name__ == "__main__":
    main()
