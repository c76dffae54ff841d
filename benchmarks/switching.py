"""How long switching the active adapter takes on a model of 200 hosts, beside PEFT on the same.

    python benchmarks/switching.py [--json FILE]

Two LoRA adapters of rank 8 on the four attention projections of 50 layers; the time of one switch
is the median of 2,000 (PEFT: 100), alternating between the two. "inference": loaded without
gradients. "trainable": only the selected adapter's parameters require gradients, as PEFT's
set_adapter has it.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path

import torch

from inlay.cli._machine import processor

TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj"]
LAYERS = 50


def model() -> torch.nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = {"hidden_size": 64, "intermediate_size": 64, "vocab_size": 64}
    return LlamaForCausalLM(LlamaConfig(num_hidden_layers=LAYERS, num_attention_heads=4, **sizes))


def median(switch: Callable[[str], object], rounds: int) -> float:
    """Return the median time of a switch in microseconds."""
    times = []
    for i in range(rounds):
        name = "ab"[i % 2]
        start = time.perf_counter()
        switch(name)
        times.append(time.perf_counter() - start)
    return statistics.median(times[rounds // 10 :]) * 1e6


def inlay(*, trainable: bool) -> float:
    from inlay.methods.lora import LoraConfig
    from inlay.model.roster import Roster

    roster = Roster(model())
    for name in "ab":
        roster.add(name, LoraConfig(target_modules=TARGETS), trainable=trainable)
    assert len(roster.hosts) == 4 * LAYERS
    return median(lambda name: roster.select((name,)), 2_000)


def peft(*, trainable: bool) -> float:
    from peft import LoraConfig, get_peft_model

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        adapted = get_peft_model(model(), LoraConfig(target_modules=TARGETS), adapter_name="a")
        adapted.add_adapter("b", LoraConfig(target_modules=TARGETS))
    return median(lambda name: adapted.set_adapter(name, inference_mode=not trainable), 100)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path, help="write the figures here too")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    rows = {}
    for name, trainable in (("inference", False), ("trainable", True)):
        ours, theirs = inlay(trainable=trainable), peft(trainable=trainable)
        rows[name] = {
            "inlay_us": round(ours, 2),
            "peft_us": round(theirs, 1),
            "ratio": round(theirs / ours),
        }
        print(f"{name:10} inlay {ours:9.2f} us   PEFT {theirs:10.1f} us   {theirs / ours:8.0f} x")
    if arguments.json:
        import peft as oracle

        where = {
            "cpu": processor()[0],
            "python": platform.python_version(),
            "torch": torch.__version__,
            "peft": oracle.__version__,
            "hosts": 4 * LAYERS,
        }
        arguments.json.write_text(json.dumps({**where, **rows}, indent=2) + "\n")


if __name__ == "__main__":
    sys.exit(main())
