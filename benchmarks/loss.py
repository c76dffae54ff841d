"""The head and its loss, forward and backward, four ways in turns: time, and memory each way alone.

    python benchmarks/loss.py [--rounds 7] [--threads 2] [--json FILE]

The shape is that of a 135M model and of one step of chats: 863 tokens of 576 numbers, 575 of them
trained, 49152 words. "all rows" is transformers' loss, "labels" that of the trained rows alone,
"TRL" its chunked head over all tokens, as it computes on a CPU, and "inlay" the kernel. A ratio is
the median of those of the rounds; `cpu` is of the processor's time, which others hardly move.
"""

from __future__ import annotations

import os

os.environ["OMP_WAIT_POLICY"] = "passive"  # of use before torch is imported only

import argparse
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from inlay.kernels.linear_cross_entropy import linear_cross_entropy

TOKENS, LABELS, HIDDEN, WORDS = 863, 575, 576, 49152
DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}
WAYS = ("all rows", "labels", "TRL", "inlay")


def main() -> None:
    """Print a line for each dtype and way; write all where asked."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--alone", nargs=2, metavar=("WAY", "DTYPE"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    if options.alone:
        print(peak(*options.alone))
        return
    found = {name: compare(name, options.rounds) for name in DTYPES}
    for name, ways in found.items():
        for way, told in ways.items():
            print(name, f"{way:9}", *(f"{key} {value:.4g}" for key, value in told.items()))
    if options.json:
        options.json.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


def compare(dtype: str, rounds: int) -> dict[str, dict[str, float]]:
    """Return of each way ms, its time over inlay's, MiB, and how far loss and gradient are off."""
    sides = ways(DTYPES[dtype])
    exact, slope = sides["labels"]()
    clock: dict[str, list[float]] = {way: [] for way in WAYS}
    cpu: dict[str, list[float]] = {way: [] for way in WAYS}
    told: dict[str, dict[str, float]] = {}
    for turn in range(rounds + 1):
        for way in WAYS if turn % 2 else reversed(WAYS):
            began, worked = time.perf_counter(), time.process_time()
            loss, grad = sides[way]()
            if turn:  # the first warms up
                clock[way].append(time.perf_counter() - began)
                cpu[way].append(time.process_time() - worked)
            apart = float((grad - slope).float().norm() / slope.float().norm())
            told[way] = {"loss_apart": abs(loss - exact) / exact, "gradient_apart": apart}
    for way in WAYS:
        for name, times in (("ratio", clock), ("cpu_ratio", cpu)):
            pairs = zip(times[way], times["inlay"], strict=True)
            told[way][name] = statistics.median(a / b for a, b in pairs)
        told[way]["ms"] = 1000 * statistics.median(clock[way])
        command = [sys.executable, __file__, "--alone", way, dtype]
        told[way]["mib"] = float(subprocess.run(command, capture_output=True, text=True).stdout)
    return told


def peak(way: str, dtype: str) -> float:
    """Return the MiB that a way takes at most above what was there before it."""
    side = ways(DTYPES[dtype])[way]
    torch.ones(64, 64, dtype=DTYPES[dtype]) @ torch.ones(64, 64, dtype=DTYPES[dtype])
    Path("/proc/self/clear_refs").write_text("5")  # forget the peak of what made the tensors
    before = _peak_kib()
    side()
    return (_peak_kib() - before) / 1024


def _peak_kib() -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM"))


def ways(dtype: torch.dtype) -> dict[str, Callable[[], tuple[float, Tensor]]]:
    """Return functions that make the mean loss and the gradient of the trained rows."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.empty(WORDS, HIDDEN).normal_(0, 0.05, generator=generator).to(dtype)
    hidden = torch.empty(TOKENS, HIDDEN).normal_(generator=generator).to(dtype)
    at = torch.randperm(TOKENS, generator=generator)[:LABELS].sort().values
    targets = torch.randint(0, WORDS, (LABELS,), generator=generator)
    every = torch.zeros(TOKENS, dtype=torch.long).index_put((at,), targets)

    def one(loss: Callable[[Tensor], Any], rows: Tensor) -> tuple[float, Tensor]:
        given = rows.detach().requires_grad_()
        total = loss(given) / LABELS
        total.backward()
        assert given.grad is not None
        return total.item(), given.grad if len(rows) == LABELS else given.grad[at]

    def plain(rows: Tensor, chosen: Tensor | slice) -> Tensor:
        logits = F.linear(rows, weight).float()[chosen]
        return F.cross_entropy(logits, targets, reduction="sum")

    def theirs(rows: Tensor) -> Tensor:
        from trl.kernels.chunked_logprob import ChunkedLogProbFunction

        return -ChunkedLogProbFunction.apply(rows, weight, None, every, 1.0, 32768)[0][at].sum()

    return {
        "all rows": lambda: one(lambda h: plain(h, at), hidden),
        "labels": lambda: one(lambda h: plain(h, slice(None)), hidden[at]),
        "TRL": lambda: one(theirs, hidden),
        "inlay": lambda: one(lambda h: linear_cross_entropy(h, weight, targets), hidden[at]),
    }


if __name__ == "__main__":
    main()
