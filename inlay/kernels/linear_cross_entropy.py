"""A head and the softmax over it, together: the logits of a few rows at a time, never of all.

    z_n = f(h_n W^T + b)     f(z) = cap tanh(scale z / cap)     log_probs_n = log softmax(z_n)[t_n]

h [N, H] hidden states, W [V, H], b [V], t [N] targets. Where the head is frozen, the gradient of
each log_probs_n by h_n is made in the forward pass, while its logits are there: that is all the
backward pass needs (Liger, arXiv:2410.10989). Where the head trains, the logits are made again.
The product is in the dtype of h, the softmax in float32. The rows' logits share one buffer.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from typing import Any, cast

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from inlay.kernels import gpu, matmul
from inlay.kernels.native import library
from inlay.kernels.scratch import SCRATCH

BUFFER = 64 << 20
"""Bytes of the logits that are there at a time."""
MOST_FLOAT32 = 160
"""Rows of them at most in float32, where a product takes new memory: it is as fast with fewer."""


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    bias: Tensor | None = None,
    factors: Tensor | None = None,
    scale: float = 1.0,
    cap: float | None = None,
) -> Tensor:
    """Return sum_n -factors_n log_probs_n, a float32 scalar; factors [N], left out = 1."""
    found = linear_log_probs(hidden, weight, targets, bias=bias, scale=scale, cap=cap)
    return -(found if factors is None else found * factors.to(found)).sum()


def linear_log_probs(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    bias: Tensor | None = None,
    scale: float = 1.0,
    cap: float | None = None,
) -> Tensor:
    """Return log softmax(f(h_n W^T + b))[t_n], float32 [N].

    Gradients go to hidden, weight and bias. Raises IndexError where a target is not in 0 .. V - 1.
    """
    _check_targets(targets, len(weight))
    head = Head(weight, bias, scale, cap)
    wanted = [t.requires_grad for t in (hidden, weight, bias) if t is not None]
    with torch.autocast(hidden.device.type, enabled=False):
        if torch.is_grad_enabled() and any(wanted):
            found: Tensor = _LogProbs.apply(hidden, weight, bias, targets, head)
            return found
        return _forward(head, hidden, targets, gradient=False)[0]


@dataclass(frozen=True)
class Head:
    """What makes logits of hidden states."""

    weight: Tensor
    bias: Tensor | None
    scale: float
    cap: float | None

    def room(self, rows: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Return the weight in `dtype` and room for logits [rows, V], both until the next call."""
        n, device = len(self.weight), self.weight.device
        cast = self.weight.numel() if self.weight.dtype != dtype else 0
        if device.type == "cpu":
            taken = SCRATCH.take(dtype, cast + rows * n)
        else:  # an accelerator's allocator keeps freed memory
            taken = torch.empty(cast + rows * n, dtype=dtype, device=device)
        weight = taken[:cast].view_as(self.weight).copy_(self.weight) if cast else self.weight
        return weight, taken[cast:].view(rows, n)

    def logits(self, hidden: Tensor, weight: Tensor, room: Tensor) -> Tensor:
        """Return f(h W^T + b) of hidden [n, H], in memory that may be written to."""
        z = matmul.linear_into(room[: len(hidden)], hidden, weight)
        if self.bias is not None:
            z.add_(self.bias.to(z))
        if self.scale != 1:
            z.mul_(self.scale)
        if self.cap is not None:
            z.div_(self.cap).tanh_().mul_(self.cap)
        return z


class _LogProbs(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, head: Head
    ) -> Tensor:
        """Return the log-probabilities [N]."""
        ctx.head_trains = any(ctx.needs_input_grad[1:3])
        found, by_hidden = _forward(head, hidden, targets, gradient=not ctx.head_trains)
        if ctx.head_trains:
            ctx.save_for_backward(hidden, targets, weight, bias)
            ctx.scale, ctx.cap = head.scale, head.cap
        else:
            ctx.save_for_backward(by_hidden)
        return found

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> Any:
        """Return the gradients of hidden, weight and bias."""
        (grad,) = grads
        if not ctx.head_trains:
            (by_hidden,) = ctx.saved_tensors
            return by_hidden * grad[:, None].to(by_hidden), None, None, None, None
        hidden, targets, weight, bias = ctx.saved_tensors
        head = Head(weight, bias, ctx.scale, ctx.cap)
        with torch.autocast(hidden.device.type, enabled=False):
            found = _backward(head, hidden, targets, grad, ctx.needs_input_grad[:3])
        return *found, None, None


def _forward(
    head: Head, hidden: Tensor, targets: Tensor, *, gradient: bool
) -> tuple[Tensor, Tensor | None]:
    """Return the log-probabilities [N], and where asked for their gradients by hidden [N, H]."""
    wide = torch.promote_types(hidden.dtype, torch.float32)
    found = torch.empty(len(hidden), dtype=wide, device=hidden.device)
    by_hidden = torch.empty_like(hidden) if gradient else None
    factors = found.new_full(found.shape, head.scale) if gradient else None
    for part, weight, room in _parts(head, hidden):
        z = head.logits(hidden[part], weight, room)
        one = None if factors is None else factors[part]
        found[part] = _log_softmax(z, targets[part], one, head.cap)
        if by_hidden is not None:
            by_hidden[part] = matmul.product(z, weight)
    return found, by_hidden


def _backward(
    head: Head, hidden: Tensor, targets: Tensor, grad: Tensor, wanted: tuple[bool, ...]
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Return the gradients of hidden, weight and bias; grad [N] is that of the log-probabilities.

    Those of the head are added up in float32.
    """
    by_hidden = torch.empty_like(hidden) if wanted[0] else None
    by_weight = torch.zeros_like(head.weight, dtype=torch.float32) if wanted[1] else None
    by_bias = None
    if wanted[2] and head.bias is not None:
        by_bias = torch.zeros_like(head.bias, dtype=torch.float32)
    factors = grad.float() * head.scale
    for part, weight, room in _parts(head, hidden):
        z = head.logits(hidden[part], weight, room)
        _log_softmax(z, targets[part], factors[part], head.cap)
        if by_hidden is not None:
            by_hidden[part] = matmul.product(z, weight)
        if by_weight is not None:
            by_weight += z.T @ hidden[part]
        if by_bias is not None:
            by_bias += z.sum(0, dtype=torch.float32)
    return (
        by_hidden,
        None if by_weight is None else by_weight.to(head.weight.dtype),
        None if by_bias is None or head.bias is None else by_bias.to(head.bias.dtype),
    )


def _parts(head: Head, hidden: Tensor) -> Iterator[tuple[slice, Tensor, Tensor]]:
    """Yield rows of `hidden`, few enough for the buffer, with the weight and room for logits."""
    count = len(hidden)
    if not count:
        return
    most = max(1, BUFFER // (len(head.weight) * hidden.dtype.itemsize))
    if hidden.dtype == torch.float32:
        most = min(most, MOST_FLOAT32)
    parts = -(-count // most)
    size = -(-count // parts)
    weight, room = head.room(size, hidden.dtype)
    for first in range(0, count, size):
        yield slice(first, min(first + size, count)), weight, room


def _log_softmax(z: Tensor, targets: Tensor, factors: Tensor | None, cap: float | None) -> Tensor:
    """Return log softmax(z)[targets], float32 [n], of logits z [n, V].

    With factors [n], z becomes factors times its gradient by what was capped.
    """
    if z.device.type != "cpu":
        kernels = triton_for(z.device, z.dtype) if z.is_contiguous() else None
        compute = _plain_log_softmax if kernels is None else kernels.log_softmax
        return cast(Tensor, compute(z, targets, factors, cap))
    known = z.dtype in (torch.float32, torch.bfloat16) and z.is_contiguous()
    function = _function() if known else None
    if function is None:
        return _plain_log_softmax(z, targets, factors, cap)
    targets, found = targets.contiguous(), torch.empty(len(z), dtype=torch.float32)
    given = None if factors is None else factors.contiguous()
    function(
        *(z.data_ptr(), targets.data_ptr(), None if given is None else given.data_ptr()),
        *(found.data_ptr(), *z.shape, cap or 0.0),
        *(int(given is not None), int(z.dtype == torch.bfloat16), torch.get_num_threads()),
    )
    return found


@cache
def triton_for(device: torch.device, dtype: torch.dtype) -> Any:
    """Return the kernels for this GPU and `dtype`, or None as `gpu.tried` does."""
    return gpu.tried("cross_entropy_triton", "losses are", wrong, device, dtype)


def wrong(kernels: Any, device: torch.device, dtype: torch.dtype) -> str | None:
    """Return what `kernels` compute otherwise than plain torch does on the CPU, or None."""
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(4, kernels.PIECE + 5, generator=generator).to(dtype)
    targets, factors = torch.tensor([0, 7, 100, kernels.PIECE + 4]), torch.linspace(-1, 2, 4)
    for given in (None, factors):
        for cap in (None, 5.0):
            z, wide = logits.to(device, copy=True), logits.to(torch.float32, copy=True)
            there = None if given is None else given.to(device)
            found = kernels.log_softmax(z, targets.to(device), there, cap)
            wanted = _plain_log_softmax(wide, targets, given, cap)
            if not gpu.close(found, wanted):
                return "another log-probability"
            if not gpu.close(z, wide):
                return "another gradient of the logits"
    return None


def _plain_log_softmax(
    z: Tensor, targets: Tensor, factors: Tensor | None, cap: float | None
) -> Tensor:
    at = targets[:, None]
    wide = z if z.dtype == torch.float64 else z.float()
    whole = wide.log_softmax(-1)
    found = whole.gather(1, at).squeeze(1)
    if factors is not None:
        slope = whole.exp_().neg_()
        slope.scatter_add_(1, at, torch.ones_like(found)[:, None])
        if cap is not None:
            slope.mul_(1 - (wide / cap) ** 2)
        z.copy_(slope.mul_(factors[:, None]))
    return found


def _check_targets(targets: Tensor, vocabulary: int) -> None:
    # on an accelerator looking would make the host wait: gather looks by itself, and Triton's
    # kernel makes a loss that is not a number
    if targets.device.type == "cpu" and len(targets):
        least, most = (int(t) for t in targets.aminmax())
        if least < 0 or most >= vocabulary:
            raise IndexError(f"targets from {least} to {most}; they must be 0 to {vocabulary - 1}")


@cache
def _function() -> Any:
    found = library("cross_entropy")
    if found is None:
        return None
    whole, pointer, flag = ctypes.c_int64, ctypes.c_void_p, ctypes.c_int
    function = found.inlay_log_softmax
    function.argtypes = [*[pointer] * 4, whole, whole, ctypes.c_float, *[flag] * 3]
    function.restype = None
    return function
