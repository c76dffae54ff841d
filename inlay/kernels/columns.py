"""A factor for each column: y = x c, x [..., n], c [n], and both gradients in one pass.

On the CPU `columns.c` computes it, in float32 and bfloat16; elsewhere plain torch does.
"""

from __future__ import annotations

import ctypes
from functools import cache
from typing import Any

import torch
from torch import Tensor

from inlay.kernels.native import library


def times_columns(x: Tensor, factors: Tensor) -> Tensor:
    """Return x c [..., n], in the dtype of x; c [n] in float32 is not rounded to it before."""
    known = x.device.type == "cpu" and x.dtype in (torch.float32, torch.bfloat16)
    if not known or factors.dtype != torch.float32 or _functions() is None:
        return (x * factors).to(x.dtype)
    return _Columns.apply(x, factors)


class _Columns(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, factors: Tensor) -> Tensor:
        x, factors = x.contiguous(), factors.contiguous()
        out = torch.empty_like(x)
        _call("inlay_columns", (x, factors, out), x)
        ctx.save_for_backward(x, factors)
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        x, factors = ctx.saved_tensors
        grad, out, sums = grads[0].contiguous(), torch.empty_like(x), torch.empty_like(factors)
        _call("inlay_columns_back", (grad, x, factors, out, sums), x)
        return out, sums


def _call(name: str, tensors: tuple[Tensor, ...], x: Tensor) -> None:
    n = x.shape[-1]
    half, threads = int(x.dtype == torch.bfloat16), torch.get_num_threads()
    getattr(_functions(), name)(*(t.data_ptr() for t in tensors), x.numel() // n, n, half, threads)


@cache
def _functions() -> Any:
    found = library("columns")
    if found is None:
        return None
    rest = [ctypes.c_int64, ctypes.c_int64, ctypes.c_int, ctypes.c_int]
    for name, tensors in (("inlay_columns", 3), ("inlay_columns_back", 5)):
        function = getattr(found, name)
        function.argtypes, function.restype = [*[ctypes.c_void_p] * tensors, *rest], None
    return found
