"""The softmax of `linear_cross_entropy` on a GPU, in Triton, as `cross_entropy.c` on the CPU.

Rows of logits z [rows, n] -> log softmax(z)[target], and in place of each row its gradient:

    factor (1[v = target] - softmax(z)[v]) (1 - (z[v] / cap)^2)          a cap of 0: without it

One program a row: the largest logit and the sum are kept together as it is read (Milakov and
Gimelshein, arXiv:1805.02867), so that a row is read twice and written once.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

PIECE = 4096
"""Logits that a program has in its registers at a time."""
_LOWEST = tl.constexpr(torch.finfo(torch.float32).min)


def log_softmax(z: Tensor, targets: Tensor, factors: Tensor | None, cap: float | None) -> Tensor:
    """Return log softmax(z)[targets], float32 [rows]; with factors, z becomes the gradient.

    z [rows, n] contiguous in float32, bfloat16 or float16; targets int64; factors float32 [rows].
    Where a target is not in 0 .. n - 1 it is not a number.
    """
    found = torch.empty(len(z), dtype=torch.float32, device=z.device)
    factors = None if factors is None else factors.contiguous()
    piece = min(PIECE, triton.next_power_of_2(z.shape[1]))
    with torch.cuda.device_of(z):
        _log_softmaxes[(len(z),)](
            *(z, targets.contiguous(), factors, found, z.shape[1], 1.0 / cap if cap else 0.0),
            CAPPED=bool(cap),
            PIECE=piece,
            num_warps=8,
        )
    return found


@triton.jit
def _log_softmaxes(
    z, targets, factors, found, n, inverse, CAPPED: tl.constexpr, PIECE: tl.constexpr
):
    """Write a row's log-probability, and where there are factors its gradient."""
    row = tl.program_id(0).to(tl.int64)  # 64 bits: rows times n may be beyond 2^31
    z += row * n
    target = tl.load(targets + row)
    there = (target >= 0) & (target < n)
    given = tl.load(z + target, mask=there, other=float("nan")).to(tl.float32)
    # finite, so that logits of -inf before any other add nothing
    most, total = tl.full((), _LOWEST, tl.float32), tl.full((), 0.0, tl.float32)
    for first in range(0, n, PIECE):
        at = first + tl.arange(0, PIECE)
        x = tl.load(z + at, mask=at < n, other=float("-inf")).to(tl.float32)
        larger = tl.maximum(most, tl.max(x, 0))
        total = total * tl.exp(most - larger) + tl.sum(tl.exp(x - larger), 0)
        most = larger
    log_sum = most + tl.log(total)
    tl.store(found + row, given - log_sum)
    if factors is not None:
        factor = tl.load(factors + row)
        for first in range(0, n, PIECE):
            at = first + tl.arange(0, PIECE)
            x = tl.load(z + at, mask=at < n, other=0.0).to(tl.float32)
            slope = tl.where(at == target, 1.0, 0.0) - tl.exp(x - log_sum)
            if CAPPED:
                slope *= 1.0 - (x * inverse) * (x * inverse)
            tl.store(z + at, (factor * slope).to(z.dtype.element_ty), mask=at < n)
