"""A factor for each column: y = x c, x [..., n], c [n], and both gradients in one pass.

`scaled_in_place` and `gradients_of_scaled` are for a node that keeps y alone: of c that are not 0
it tells x.

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
    return _Columns.apply(x, factors) if _known(x, factors) else (x * factors).to(x.dtype)


def scaled_in_place(x: Tensor, factors: Tensor) -> Tensor:
    """Return x c in the memory of x [..., n], contiguous, without a gradient."""
    if not _known(x, factors):
        return x.copy_(x * factors)
    _call("inlay_columns", (x, factors.contiguous(), x), x)
    return x


def gradients_of_scaled(grad: Tensor, y: Tensor, factors: Tensor) -> tuple[Tensor, Tensor]:
    """Return the gradients of x and of c, for y = x c [N, n] and its gradient; no c is 0."""
    if not _known(y, factors):
        sums = (grad.to(factors.dtype) * y).sum(0)
        return (grad * factors).to(grad.dtype), sums / factors
    grad, factors = grad.contiguous(), factors.contiguous()
    out, sums = torch.empty_like(y), torch.empty_like(factors)
    _call("inlay_columns_back", (grad, y, factors, out, sums), y)
    return out, sums.div_(factors)


def _known(x: Tensor, factors: Tensor) -> bool:
    """Return whether `columns.c` computes these on this machine."""
    known = x.device.type == "cpu" and x.dtype in (torch.float32, torch.bfloat16)
    return known and factors.dtype == torch.float32 and _functions() is not None


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
