"""What stands between a transformer's products on a GPU, in Triton, as `elementwise.c` on the CPU.

Rows of n numbers in float32, bfloat16 or float16, contiguous, but for a gate's two, which may be
halves of one tensor; sums and functions in float32, rounded once.  A row's norm is computed by one
program, its numbers in registers from the sum to the result.  On the CPU it runs where
`TRITON_INTERPRET=1` was set before Triton was imported.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

PIECE = 2048
"""Numbers that a program makes: of norms at least, for short rows share one; of a gate at most."""


def call(name: str, tensors: tuple[Tensor, ...], *rest: float) -> None:
    """Compute the pass `name` of tensors and numbers, in the order in which the C function does."""
    with torch.cuda.device_of(tensors[0]):
        _PASSES[name](*tensors, *rest)


def _norm(
    x: Tensor, weight: Tensor, out: Tensor, sums: Tensor, rows: int, n: int, eps: float, mode: int
) -> None:
    grid, tile = _rows_of(rows, n)
    _norms[grid](x, weight, out, sums, rows, n, eps, PLUS_ONE=bool(mode), **tile)


def _norm_back(
    grad: Tensor, weight: Tensor, x: Tensor, out: Tensor, sums: Tensor, rows: int, n: int, mode: int
) -> None:
    grid, tile = _rows_of(rows, n)
    _norms_back[grid](grad, weight, x, out, sums, rows, n, PLUS_ONE=bool(mode), **tile)


def _gate(gate: Tensor, up: Tensor, out: Tensor, rows: int, n: int, *rest: int) -> None:
    *steps, mode = rest
    piece = min(PIECE, triton.next_power_of_2(n))
    grid = rows, triton.cdiv(n, piece)
    _gates[grid](gate, up, out, n, *steps, GELU=bool(mode), PIECE=piece)


def _gate_back(
    gate: Tensor, up: Tensor, grad: Tensor, one: Tensor, two: Tensor, rows: int, n: int, *rest: int
) -> None:
    *steps, mode = rest
    piece = min(PIECE, triton.next_power_of_2(n))
    grid = rows, triton.cdiv(n, piece)
    _gates_back[grid](gate, up, grad, one, two, n, *steps, GELU=bool(mode), PIECE=piece)


_PASSES: dict[str, Any] = {
    "norm": _norm,
    "norm_back": _norm_back,
    "gate": _gate,
    "gate_back": _gate_back,
}


def _rows_of(rows: int, n: int) -> tuple[tuple[int], dict[str, int]]:
    """Return how many programs there are, and what each takes: ROWS of a power of two numbers."""
    width = triton.next_power_of_2(n)
    many = max(1, PIECE // width)
    warps = min(16, max(4, width // 1024))
    return (triton.cdiv(rows, many),), {"ROWS": many, "WIDTH": width, "num_warps": warps}


@triton.jit
def _places(rows, n, ROWS: tl.constexpr, WIDTH: tl.constexpr):
    """Return a program's rows and columns, where in memory these are, and whether they are."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)  # 64 bits: beyond 2^31 numbers
    column = tl.arange(0, WIDTH)
    real = (row < rows)[:, None] & (column < n)[None, :]
    return row, column, row[:, None] * n + column[None, :], real


@triton.jit
def _weights(weight, column, n, PLUS_ONE: tl.constexpr):
    """Return w [1, WIDTH] in float32, or 1 + w."""
    w = tl.load(weight + column, mask=column < n, other=0.0).to(tl.float32)[None, :]
    if PLUS_ONE:
        w += 1.0
    return w


@triton.jit(do_not_specialize=["rows"])
def _norms(
    x, weight, out, sums, rows, n, eps,
    PLUS_ONE: tl.constexpr, ROWS: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """Write x / rms(x), rounded unless PLUS_ONE, times w; and 1 / rms(x) of each row."""
    row, column, at, real = _places(rows, n, ROWS, WIDTH)
    given = tl.load(x + at, mask=real, other=0.0).to(tl.float32)
    rstd = tl.rsqrt(tl.sum(given * given, 1) / n + eps)
    tl.store(sums + row, rstd, mask=row < rows)
    scaled = given * rstd[:, None]
    if not PLUS_ONE:
        scaled = scaled.to(out.dtype.element_ty).to(tl.float32)
    made = scaled * _weights(weight, column, n, PLUS_ONE)
    tl.store(out + at, made.to(out.dtype.element_ty), mask=real)


@triton.jit(do_not_specialize=["rows"])
def _norms_back(
    grad, weight, x, out, sums, rows, n,
    PLUS_ONE: tl.constexpr, ROWS: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """Write rstd (g - x rstd^2 mean(g x)) of g = dy w."""
    row, column, at, real = _places(rows, n, ROWS, WIDTH)
    given = tl.load(x + at, mask=real, other=0.0).to(tl.float32)
    rstd = tl.load(sums + row, mask=row < rows, other=0.0)[:, None]
    g = tl.load(grad + at, mask=real, other=0.0).to(tl.float32)
    g = g * _weights(weight, column, n, PLUS_ONE)
    shared = tl.sum(g * given, 1)[:, None] * rstd * rstd / n
    made = rstd * (g - shared * given)
    tl.store(out + at, made.to(out.dtype.element_ty), mask=real)


@triton.jit
def _activated(x, GELU: tl.constexpr):
    """Return silu(x), or gelu(x) by tanh, and its slope."""
    if GELU:
        # (1 + tanh u) / 2 is the sigmoid of 2u; beyond 20 it is 0 or 1, and squares stay finite
        v = tl.where(x < -20.0, -20.0, tl.where(x > 20.0, 20.0, x))
        s = tl.sigmoid(1.5957691216 * (v + 0.044715 * v * v * v))
        slope = s + 1.5957691216 * v * s * (1.0 - s) * (1.0 + 0.134145 * v * v)
    else:
        s = tl.sigmoid(x)
        slope = s * (1.0 + x * (1.0 - s))
    return x * s, slope


@triton.jit
def _gates(gate, up, out, n, gate_step, up_step, GELU: tl.constexpr, PIECE: tl.constexpr):
    """Write f(gate) up, of a row of each; a step is from a row to the next."""
    row = tl.program_id(0).to(tl.int64)  # 64 bits: rows times n may be beyond 2^31
    at = tl.program_id(1) * PIECE + tl.arange(0, PIECE)
    gate, up, out = gate + row * gate_step, up + row * up_step, out + row * n
    value, _ = _activated(tl.load(gate + at, mask=at < n, other=0.0).to(tl.float32), GELU)
    made = value * tl.load(up + at, mask=at < n, other=0.0).to(tl.float32)
    tl.store(out + at, made.to(out.dtype.element_ty), mask=at < n)


@triton.jit
def _gates_back(
    gate, up, grad, one, two, n, gate_step, up_step, GELU: tl.constexpr, PIECE: tl.constexpr
):
    """Write the gradients of gate and up."""
    row = tl.program_id(0).to(tl.int64)
    at = tl.program_id(1) * PIECE + tl.arange(0, PIECE)
    gate, up, grad = gate + row * gate_step, up + row * up_step, grad + row * n
    one, two = one + row * n, two + row * n
    value, slope = _activated(tl.load(gate + at, mask=at < n, other=0.0).to(tl.float32), GELU)
    g = tl.load(grad + at, mask=at < n, other=0.0).to(tl.float32)
    by_gate = g * tl.load(up + at, mask=at < n, other=0.0).to(tl.float32) * slope
    tl.store(one + at, by_gate.to(one.dtype.element_ty), mask=at < n)
    tl.store(two + at, (g * value).to(two.dtype.element_ty), mask=at < n)
