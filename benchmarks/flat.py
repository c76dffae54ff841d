"""What follows a backward pass, with a run's small parameters in one tensor and each alone.

    python benchmarks/flat.py [--rounds 40] [--json FILE]

The LoRA of SmolLM2-135M: 420 factors of 4.9 M values, r = 16 on all linear layers. Timed are the
norm of the gradient, clipping, AdamW and dropping the gradients. The two sides take turns in one
process; the ratio is the median of those of the rounds. Before each, 256 MiB are written, as a
backward pass would have, so that nothing is in a cache.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import time
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # before torch; others use the machine too

import torch
from torch import nn

from inlay.cli._machine import processor
from inlay.train.flat import Flat, clip, flattened, gradients_of, norm_of
from inlay.train.optim import make_optimizer
from inlay.train.settings import TrainConfig

HIDDEN, KEYS, INNER, LAYERS, RANK = 576, 192, 1536, 30, 16
SHAPES = [
    *((HIDDEN, HIDDEN), (HIDDEN, KEYS), (HIDDEN, KEYS), (HIDDEN, HIDDEN)),
    *((HIDDEN, INNER), (HIDDEN, INNER), (INNER, HIDDEN)),
]


def main() -> None:
    """Run the sides in turns, print the figures, and write them where asked."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=40)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    machine = {"cpu": processor()[0], "threads": options.threads, "torch": torch.__version__}
    text = json.dumps({"machine": machine, "results": compare(options.rounds)}, indent=1)
    print(text)
    if options.json:
        options.json.write_text(text + "\n", encoding="utf-8")


def compare(rounds: int) -> dict[str, float]:
    """Return the milliseconds of either side, what is saved, and the ratio."""
    written = torch.zeros(2**26)
    times: dict[str, list[float]] = {"apart": [], "together": []}
    with ExitStack() as stack:
        sides = {}
        for name in times:
            model = nn.ParameterList(
                torch.randn(shape) * 0.02
                for inputs, outputs in SHAPES * LAYERS
                for shape in ((RANK, inputs), (outputs, RANK))
            )
            optimizer = make_optimizer(dict(model.named_parameters()), TrainConfig())
            flats = stack.enter_context(flattened(optimizer, model)) if name == "together" else ()
            sides[name] = (model, optimizer, flats)
        for _ in range(rounds):
            for name, (model, optimizer, flats) in sides.items():
                for parameter in model:
                    parameter.grad = torch.full_like(parameter, 1e-3)
                written.add_(1.0)
                began = time.perf_counter()
                follow(model, optimizer, flats)
                times[name].append(1000 * (time.perf_counter() - began))
    pairs = list(zip(*times.values(), strict=True))[1:]  # the state was made in the first round
    saved = statistics.median(apart - together for apart, together in pairs)
    ratio = statistics.median(together / apart for apart, together in pairs)
    medians = {
        f"{name}_ms": round(statistics.median(found[1:]), 2) for name, found in times.items()
    }
    return {**medians, "saved_ms": round(saved, 2), "ratio": round(ratio, 3)}


def follow(model: nn.Module, optimizer: torch.optim.Optimizer, flats: Sequence[Flat]) -> None:
    """Do what a step of a run does after its backward pass."""
    gradients = gradients_of(model.parameters(), flats)
    norm = norm_of(gradients)
    clip(gradients, 1.0, norm)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)


if __name__ == "__main__":
    main()
