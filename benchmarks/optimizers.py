"""What a step of each AdamW costs beside torch's fused one, over the LoRA of a 7B Llama shape.

    python benchmarks/optimizers.py [--rounds 24] [--json FILE]

448 tensors of 40.0 M values: r = 16 on all linear layers. The sides take turns in one process; a
ratio is the median of those of the rounds, in time by the clock and in time of the processor, which
a machine that others use at the same time changes less. `plain` is adamw_8bit by plain torch, the
compiled kernel's twin; paged, on the CPU, is the cost of copying two pages to and fro.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import time
from contextlib import nullcontext
from pathlib import Path
from typing import Any
from unittest import mock

os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # before torch; others use the machine too

import torch
from torch import nn

from inlay.cli._machine import processor
from inlay.kernels import adam8bit
from inlay.train.optim import make_optimizer, optimizer_tensors
from inlay.train.settings import TrainConfig

FIRST = "adamw"
SIDES = (FIRST, "adamw_8bit", "plain", "paged_adamw", "paged_adamw_8bit")
HIDDEN, INNER, LAYERS, RANK = 4096, 11008, 32, 16
SHAPES = [(HIDDEN, HIDDEN)] * 4 + [(HIDDEN, INNER)] * 2 + [(INNER, HIDDEN)]


def main() -> None:
    """Run the sides in turns, print the figures, and write them where asked."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=24)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    machine = {"cpu": processor()[0], "threads": options.threads, "torch": torch.__version__}
    results = {
        str(dtype).removeprefix("torch."): compare(dtype, options.rounds)
        for dtype in (torch.float32, torch.bfloat16)
    }
    text = json.dumps({"machine": machine, "results": results}, indent=1)
    print(text)
    if options.json:
        options.json.write_text(text + "\n", encoding="utf-8")


def compare(dtype: torch.dtype, rounds: int) -> dict[str, dict[str, float]]:
    """Return what is told of each side, over parameters of this dtype."""
    sides = {name: side(name, dtype) for name in SIDES}
    times: dict[str, dict[int, tuple[float, float]]] = {name: {} for name in sides}
    for turn in range(rounds):
        for name, (_, optimizer) in sides.items():
            # the twin takes seconds, and is so far off that a few turns tell
            if name != "plain" or turn % 6 == 0:
                times[name][turn] = timed(name, optimizer)
    for found in times.values():
        del found[0]  # the state was made in it
    return {name: told(name, *sides[name], times) for name in sides}


def side(name: str, dtype: torch.dtype) -> tuple[dict[str, nn.Parameter], torch.optim.Optimizer]:
    """Return parameters with gradients, and the optimizer of that name over them."""
    generator = torch.Generator().manual_seed(0)
    made = {}
    for layer in range(LAYERS):
        for i, (inputs, outputs) in enumerate(SHAPES):
            for which, shape in (("a", (RANK, inputs)), ("b", (outputs, RANK))):
                parameter = nn.Parameter(torch.randn(shape, generator=generator).to(dtype))
                parameter.grad = (torch.randn(shape, generator=generator) * 1e-3).to(dtype)
                made[f"{layer}.{i}.{which}"] = parameter
    optimizer: Any = "adamw_8bit" if name == "plain" else name
    return made, make_optimizer(made, TrainConfig(optimizer=optimizer))


def timed(name: str, optimizer: torch.optim.Optimizer) -> tuple[float, float]:
    """Return the seconds of one step, by the clock and of the processor."""
    plain = mock.patch.object(adam8bit, "_is_compiled", return_value=False)
    with plain if name == "plain" else nullcontext():
        clock, processor = time.perf_counter(), time.process_time()
        optimizer.step()
        return time.perf_counter() - clock, time.process_time() - processor


def told(
    name: str,
    made: dict[str, nn.Parameter],
    optimizer: torch.optim.Optimizer,
    times: dict[str, dict[int, tuple[float, float]]],
) -> dict[str, float]:
    """Return what is told of a side: bytes of state, and times beside those of the same turns."""
    values = sum(parameter.numel() for parameter in made.values())
    held = sum(tensor.nbytes for tensor in optimizer_tensors(optimizer, made).values())
    found = {"bytes_a_value": round(held / values, 3)}
    for i, kind in enumerate(("clock", "processor")):
        ours = {turn: both[i] for turn, both in times[name].items()}
        ratios = [seconds / times[FIRST][turn][i] for turn, seconds in ours.items()]
        found[f"{kind}_ms"] = round(1000 * statistics.median(ours.values()), 1)
        found[f"{kind}_ratio"] = round(statistics.median(ratios), 2)
    return found


if __name__ == "__main__":
    main()
