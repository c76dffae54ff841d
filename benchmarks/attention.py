"""Attention of packed rows, forward and backward, beside torch's on the CPU, all in turns.

    python benchmarks/attention.py [--rounds 15] [--threads 2] [--json FILE]

Beside `inlay.kernels.attention` stand scaled_dot_product_attention a row at a time, without a mask,
and once for the padded batch with one, as a model calls it. Each round times all three, and a ratio
is the median of those of the rounds. `cpu` is of the processor's time in place of the clock's: what
others do on the machine hardly moves it.
"""

from __future__ import annotations

import os

os.environ["OMP_WAIT_POLICY"] = "passive"  # of use before torch is imported only

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from inlay.cli._machine import processor
from inlay.kernels.attention import Rows, attention, available, eager

SHAPES = {"135m": (9, 3, 64), "1b": (32, 8, 64), "8b": (32, 8, 128)}
LENGTHS = {"chat": (318, 405, 30, 110), "short": (60,) * 16, "long": (1024,)}


def main() -> None:
    """Print a line for each shape, rows and dtype; write all where asked."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    assert available(), "no compiler made attention.c"
    results = []
    for shape in SHAPES:
        for rows in LENGTHS:
            for dtype in (torch.bfloat16, torch.float32):
                results.append(compare(shape, rows, dtype, options.rounds))
                print(json.dumps(results[-1]), flush=True)
    if options.json:
        machine = {"cpu": processor()[0], "torch": torch.__version__}
        told = {"machine": machine, "threads": options.threads, "results": results}
        options.json.write_text(json.dumps(told, indent=1) + "\n", encoding="utf-8")


def compare(shape: str, name: str, dtype: torch.dtype, rounds: int) -> dict[str, Any]:
    """Return milliseconds of a forward and backward pass by each, and the ratios over inlay's."""
    (heads, kv_heads, width), lengths = SHAPES[shape], LENGTHS[name]
    sizes = [(sum(lengths), h, width) for h in (heads, kv_heads, kv_heads)]
    given = [torch.randn(size).to(dtype).requires_grad_() for size in sizes]
    grad, rows = torch.randn(sizes[0]).to(dtype), Rows.of(lengths)
    scale = width**-0.5
    sides: dict[str, Callable[[], Tensor]] = {
        "inlay": lambda: attention(*given, rows, scale=scale),
        "by_row": lambda: eager(*given, rows, scale=scale),
        "padded": padded(given, rows, scale),
    }
    for compute in sides.values():
        both(compute, given, grad)
    seen = [{n: both(compute, given, grad) for n, compute in sides.items()} for _ in range(rounds)]
    found: dict[str, Any] = {"shape": shape, "rows": name, "dtype": str(dtype)[6:]}
    for side in sides:
        found[f"{side}_ms"] = round(statistics.median(r[side][0] for r in seen) * 1e3, 2)
    for side in ("by_row", "padded"):
        for kind, what in enumerate(("", "_cpu")):
            ratios = [one[side][kind] / one["inlay"][kind] for one in seen]
            found[f"{side}_over_inlay{what}"] = round(statistics.median(ratios), 2)
    # two products forward and five backward, of the scores that are not masked
    work = sum(n * (n + 1) // 2 for n in lengths) * heads * width * 2 * 7
    busy = statistics.median(one["inlay"][1] for one in seen)
    found["inlay_gflops_a_core"] = round(work / busy / 1e9, 1)
    return found


def padded(given: list[Tensor], rows: Rows, scale: float) -> Callable[[], Tensor]:
    """Return what computes the rows padded to the longest, under a mask made beforehand."""
    count, longest = len(rows.spans), rows.longest
    inside = torch.zeros(count, longest, dtype=torch.bool)
    for i, (first, last) in enumerate(rows.spans):
        inside[i, : last - first] = True
    causal = torch.ones(longest, longest, dtype=torch.bool).tril()
    mask = causal & inside[:, None, None, :]
    batches = []
    for t in given:
        batch = t.new_zeros(count, longest, *t.shape[1:]).detach()
        batch[inside] = t.detach()
        batches.append(batch.transpose(1, 2).requires_grad_())
    group = given[0].shape[1] // given[1].shape[1]

    def compute() -> Tensor:
        q, k, v = batches
        k, v = (t.repeat_interleave(group, 1) for t in (k, v))  # as a model does under a mask
        out = scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale)
        return out.transpose(1, 2)[inside]

    return compute


def both(compute: Callable[[], Tensor], given: list[Tensor], grad: Tensor) -> tuple[float, float]:
    """Return seconds, of the clock and of the processor, of a forward and backward pass."""
    for t in given:
        t.grad = None
    clock, busy = time.perf_counter(), time.process_time()
    compute().backward(grad)
    return time.perf_counter() - clock, time.process_time() - busy


if __name__ == "__main__":
    main()
