"""What stands between a transformer's products, each in one pass: RMSNorm, a gate, rotation.

On the CPU `elementwise.c` computes them, in float32 and bfloat16; elsewhere, and where nothing
compiles, the eager twins below do. Weights are frozen: the gradients are those of the inputs.
Sums and functions are computed in float32, and rounded once.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from functools import cache
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from inlay.kernels.native import library

Gate = Literal["silu", "gelu"]
"""The function of a gate: x sigmoid(x), or GELU by tanh."""
MODES = {"silu": 0, "gelu": 1}


def rms_norm(x: Tensor, weight: Tensor, eps: float, *, plus_one: bool = False) -> Tensor:
    """Return x / sqrt(mean(x^2) + eps) * w along the last dimension n of x [..., n]; w [n].

    plus_one: times 1 + w, as in Gemma; else what is divided is rounded to the dtype before it is
    multiplied, as in Llama.
    """
    if weight.requires_grad or not _compiled(x, weight):
        return _plain_norm(x, weight, eps, plus_one)
    out: Tensor = _Norm.apply(x, weight, eps, plus_one)
    return _remembered(out, lambda: rms_norm(x.detach(), weight, eps, plus_one=plus_one))


def gated(gate: Tensor, up: Tensor, function: Gate) -> Tensor:
    """Return f(gate) * up, of two tensors of one shape."""
    if not _compiled(gate, up):
        return _plain_gate(gate, up, function)
    out: Tensor = _Gate.apply(gate, up, function)
    return _remembered(out, lambda: gated(gate.detach(), up.detach(), function))


def rotary(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Return x cos + rotated(x) sin of x [T, heads, n]; cos, sin [T, n].

    rotated: of each head's halves [x1, x2], [-x2, x1] (Su et al., arXiv:2104.09864, as GPT-NeoX
    lays it out).
    """
    if not _compiled(x, cos, sin):
        return _plain_rotary(x, cos, sin)
    return _Rotary.apply(x, cos, sin)


def available() -> bool:
    """Return whether this machine can compile them."""
    return _functions() is not None


def _remembered(out: Tensor, make: Callable[[], Tensor]) -> Tensor:
    """Return `out`, which says how it is made again: who would keep it may keep that instead.

    What it is made of is kept for its own gradient anyway.
    """
    if out.requires_grad:
        out.made_from = make  # type: ignore[attr-defined]
    return out


def _plain_norm(x: Tensor, weight: Tensor, eps: float, plus_one: bool) -> Tensor:
    wide = x.float() if x.dtype.itemsize < 4 else x
    scaled = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)
    if plus_one:
        return (scaled * (1.0 + weight.to(wide.dtype))).to(x.dtype)
    return scaled.to(x.dtype) * weight


def _plain_gate(gate: Tensor, up: Tensor, function: Gate) -> Tensor:
    return (F.silu(gate) if function == "silu" else F.gelu(gate, approximate="tanh")) * up


def _plain_rotary(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    one, two = x.chunk(2, -1)
    return x * cos[:, None] + torch.cat([-two, one], -1) * sin[:, None]


def _compiled(*tensors: Tensor) -> bool:
    first = tensors[0]
    known = first.device.type == "cpu" and first.dtype in (torch.float32, torch.bfloat16)
    return known and all(t.dtype == first.dtype for t in tensors) and available()


@cache
def _functions() -> Any:
    found = library("elementwise")
    if found is None:
        return None
    whole, pointer, flag = ctypes.c_int64, ctypes.c_void_p, ctypes.c_int
    sizes, ends = [whole] * 2, [flag] * 3
    for name, given in {
        "inlay_norm": [*[pointer] * 4, *sizes, ctypes.c_float, *ends],
        "inlay_norm_back": [*[pointer] * 5, *sizes, *ends],
        "inlay_gate": [*[pointer] * 3, *sizes, *ends],
        "inlay_gate_back": [*[pointer] * 5, *sizes, *ends],
        "inlay_rotate": [*[pointer] * 4, whole, *sizes, *ends],
    }.items():
        function = getattr(found, name)
        function.argtypes, function.restype = given, None
    return found


def _call(name: str, tensors: tuple[Tensor, ...], *rest: float) -> None:
    """Call a function of the library with the tensors' places, `rest`, their type and threads."""
    half = int(tensors[0].dtype == torch.bfloat16)
    places = [tensor.data_ptr() for tensor in tensors]
    getattr(_functions(), name)(*places, *rest, half, torch.get_num_threads())


class _Norm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float, plus_one: bool) -> Tensor:
        x, weight = x.contiguous(), weight.contiguous()
        n = x.shape[-1]
        out, sums = torch.empty_like(x), torch.empty(x.numel() // n)
        _call("inlay_norm", (x, weight, out, sums), len(sums), n, eps, int(plus_one))
        ctx.save_for_backward(x, weight, sums)
        ctx.plus_one = plus_one
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        x, weight, sums = ctx.saved_tensors
        grad = grads[0].contiguous()
        out = torch.empty_like(x)
        tensors = grad, weight, x, out, sums
        _call("inlay_norm_back", tensors, len(sums), x.shape[-1], int(ctx.plus_one))
        return out, None, None, None


class _Gate(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor, function: Gate) -> Tensor:
        gate, up = gate.contiguous(), up.contiguous()
        out = torch.empty_like(gate)
        n = gate.shape[-1]
        _call("inlay_gate", (gate, up, out), gate.numel() // n, n, MODES[function])
        ctx.save_for_backward(gate, up)
        ctx.function = function
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        gate, up = ctx.saved_tensors
        one, two = torch.empty_like(gate), torch.empty_like(up)
        n = gate.shape[-1]
        tensors = gate, up, grads[0].contiguous(), one, two
        _call("inlay_gate_back", tensors, gate.numel() // n, n, MODES[ctx.function])
        return one, two, None


class _Rotary(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        cos, sin = cos.contiguous(), sin.contiguous()
        ctx.save_for_backward(cos, sin)
        return _turned(x, cos, sin, back=False)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        # exact where the halves of cos and of sin are the same, which positions make them
        return _turned(grads[0], *ctx.saved_tensors, back=True), None, None


def _turned(x: Tensor, cos: Tensor, sin: Tensor, *, back: bool) -> Tensor:
    x = x.contiguous()
    out = torch.empty_like(x)
    _call("inlay_rotate", (x, cos, sin, out), *x.shape, int(back))
    return out
