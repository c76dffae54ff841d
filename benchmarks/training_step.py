"""A LoRA training step beside PEFT's, in one process: time, and what each holds in memory.

    python benchmarks/training_step.py [--steps 30] [--rounds 5] [--json FILE]

Both sides get the same base, the same start and the same batch, and take turns, so that a busy
machine slows both. "inlay" is the library alone in PEFT's place, in the same plain loop. A ratio
below 1 means that inlay needs less.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from pathlib import Path
from typing import Any

import peft
import torch
from transformers import LlamaConfig, LlamaForCausalLM

import inlay
from inlay.cli._machine import processor

SHAPES = {
    "2.5M (inlay-tiny)": None,
    "26M": {"hidden_size": 512, "intermediate_size": 1376, "num_hidden_layers": 8},
}
LORA = {"r": 16, "lora_alpha": 32, "target_modules": "all-linear", "task_type": "CAUSAL_LM"}
ROWS, LENGTH = 4, 128


def main() -> None:
    """Print a table of ratios, and write the figures where asked."""
    options = arguments()
    torch.set_num_threads(options.threads)
    results = [compare(name, options.steps, options.rounds) for name in SHAPES]
    for result in results:
        times = f"{result['inlay_ms']:7.1f} ms, PEFT {result['peft_ms']:7.1f} ms"
        sizes = f"{result['inlay_mib']:6.1f} MiB, PEFT {result['peft_mib']:6.1f} MiB"
        print(f"{result['base']:18} a step: inlay {times}, ratio {result['ratio']:.3f}")
        print(f"{'':18} kept for backward: inlay {sizes}, ratio {result['memory_ratio']:.3f}")
        print(f"{'':18} largest difference of the losses {result['apart']:.1e}")
    if options.json:
        machine = {
            "cpu": processor()[0],
            "threads": options.threads,
            "torch": torch.__version__,
            "peft": peft.__version__,
        }
        text = json.dumps({"machine": machine, "results": results}, indent=1)
        options.json.write_text(text + "\n", encoding="utf-8")


def compare(name: str, steps: int, rounds: int) -> dict[str, Any]:
    """Return the median milliseconds a step of each side over `rounds` turns, and their ratio."""
    theirs = peft.get_peft_model(base(name), peft.LoraConfig(**LORA))
    ours = inlay.get_peft_model(base(name), inlay.LoraConfig(**LORA))
    start = {n: t.clone() for n, t in peft.get_peft_model_state_dict(theirs).items()}
    inlay.set_peft_model_state_dict(ours, start)
    sides = {"inlay": Side(ours), "peft": Side(theirs)}
    times: dict[str, list[float]] = {"inlay": [], "peft": []}
    for turn in range(rounds + 1):
        order = list(sides) if turn % 2 else list(reversed(sides))
        for side in order:
            found = sides[side].run(steps)
            if turn:  # the first warms up
                times[side].append(found)
    mine, other = (1000 * statistics.median(times[side]) for side in ("inlay", "peft"))
    pairs = zip(times["inlay"], times["peft"], strict=True)
    losses = zip(sides["inlay"].losses, sides["peft"].losses, strict=True)
    mib, other_mib = (sides[side].kept_mib() for side in ("inlay", "peft"))
    return {
        "base": name,
        "inlay_ms": mine,
        "peft_ms": other,
        "ratio": statistics.median(a / b for a, b in pairs),
        "inlay_mib": mib,
        "peft_mib": other_mib,
        "memory_ratio": mib / other_mib,
        "apart": max(abs(a - b) for a, b in losses),
    }


class Side:
    """A model with its optimizer, its batch, and the losses so far."""

    def __init__(self, model: Any) -> None:
        self.model = model.train()
        self.trained = [p for p in model.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(self.trained, lr=1e-4)
        generator = torch.Generator().manual_seed(0)
        self.ids = torch.randint(5, 2000, (ROWS, LENGTH), generator=generator)
        self.losses: list[float] = []

    def run(self, steps: int) -> float:
        """Return the seconds a step, over `steps` of them."""
        began = time.perf_counter()
        for _ in range(steps):
            loss = self.model(input_ids=self.ids, labels=self.ids).loss
            loss.backward()
            self.optimizer.step()
            self.optimizer.zero_grad()
            self.losses.append(loss.item())
        return (time.perf_counter() - began) / steps

    def kept_mib(self) -> float:
        """Return the MiB that a forward pass keeps for the backward pass, weights not counted."""
        weights = {t.untyped_storage().data_ptr() for t in self.model.state_dict().values()}
        kept: dict[int, int] = {}

        def note(tensor: torch.Tensor) -> torch.Tensor:
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in weights:
                kept[storage.data_ptr()] = storage.nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
            self.model(input_ids=self.ids, labels=self.ids)
        return sum(kept.values()) / 2**20


def base(name: str) -> Any:
    """Return the base of that name, the same at each call."""
    shape = SHAPES[name]
    if shape is None:
        return inlay.load_base()[0]
    torch.manual_seed(0)
    return LlamaForCausalLM(
        LlamaConfig(vocab_size=2560, num_attention_heads=8, num_key_value_heads=4, **shape)
    )


def arguments() -> argparse.Namespace:
    """Return the command line's options."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--json", type=Path)
    return parser.parse_args()


if __name__ == "__main__":
    main()
