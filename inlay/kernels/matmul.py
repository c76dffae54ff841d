"""Products with a frozen matrix, by the fastest library that torch was built with.

In float32 torch hands a product on the CPU to MKL, which on processors not made by Intel takes a
slower path: there oneDNN, which torch carries too, needs half the time (docs/decisions/0012). It
adds up in another order, so that the last bits differ.
"""

from __future__ import annotations

from functools import cache
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

FEW = 4
"""Rows below which starting oneDNN takes longer than the product."""


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Return x W^T + b [N, O] of x [N, I], W [O, I] (any strides), b [O]; no gradient is noted."""
    if _by_onednn(x):
        return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
    return F.linear(x, weight, bias)


def linear_into(room: Tensor, x: Tensor, weight: Tensor) -> Tensor:
    """Return x W^T as `linear`, in `room` [N, O] where the library writes to what it is given.

    New memory costs a large product in bfloat16 a third of its time; oneDNN in float32 takes none
    that is there, and is faster all the same.
    """
    if _by_onednn(x):
        return linear(x, weight)
    return torch.mm(x, weight.T, out=room)


def product(x: Tensor, weight: Tensor) -> Tensor:
    """Return x W [N, I] of x [N, O] and W [O, I]; no gradient is noted."""
    return linear(x, weight.T)


def _by_onednn(x: Tensor) -> bool:
    return (
        x.device.type == "cpu" and x.dtype == torch.float32 and len(x) >= FEW and onednn_is_faster()
    )


@cache
def onednn_is_faster() -> bool:
    """Return whether float32 products go to oneDNN here: it is there, and the CPU is no Intel's."""
    if not torch.backends.mkldnn.is_available() or not torch.backends.mkl.is_available():
        return False
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return False
    named = [line for line in text.splitlines() if line.startswith("vendor_id")]
    return bool(named) and "GenuineIntel" not in named[0]
