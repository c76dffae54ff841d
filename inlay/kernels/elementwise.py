"""What stands between a transformer's products, each in one pass: RMSNorm and a gate.

On the CPU `elementwise.c` computes them, in float32 and bfloat16, and on a GPU
`elementwise_triton.py`, in float16 too; elsewhere, and where these do not compile, the eager twins
below do. Weights are frozen: the gradients are those of the inputs. Sums and functions are computed
in float32, and rounded once.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from functools import cache
from typing import Any, Literal, cast

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from inlay.kernels import gpu
from inlay.kernels.native import library

Gate = Literal["silu", "gelu"]
"""The function of a gate: x sigmoid(x), or GELU by tanh."""
MODES = {"silu": 0, "gelu": 1}
Call = Callable[..., None]
"""What computes a pass, given its name, its tensors and its numbers."""


def rms_norm(x: Tensor, weight: Tensor, eps: float, *, plus_one: bool = False) -> Tensor:
    """Return x / sqrt(mean(x^2) + eps) * w along the last dimension n of x [..., n]; w [n].

    plus_one: times 1 + w, as in Gemma; else what is divided is rounded to the dtype before it is
    multiplied, as in Llama.
    """
    call = None if weight.requires_grad else _call_for(x, weight)
    if call is None:
        return _plain_norm(x, weight, eps, plus_one)
    out: Tensor = _Norm.apply(x, weight, eps, plus_one, call)
    return _remembered(out, lambda x: rms_norm(x, weight, eps, plus_one=plus_one), x)


def gated(gate: Tensor, up: Tensor, function: Gate) -> Tensor:
    """Return f(gate) * up, of two tensors of one shape; halves of one tensor are not copied."""
    call = _call_for(gate, up)
    if call is None:
        return _plain_gate(gate, up, function)
    out: Tensor = _Gate.apply(gate, up, function, call)
    return _remembered(out, lambda gate, up: gated(gate, up, function), gate, up)


def available() -> bool:
    """Return whether this machine can compile them."""
    return _functions() is not None


@cache
def triton_for(device: torch.device, dtype: torch.dtype) -> Any:
    """Return the kernels for this GPU and `dtype`, or None as `gpu.tried` does."""
    return gpu.tried("elementwise_triton", "norms and gates are", wrong, device, dtype)


def wrong(kernels: Any, device: torch.device, dtype: torch.dtype) -> str | None:
    """Return which pass `kernels` compute otherwise than plain torch does on the CPU, or None."""
    generator = torch.Generator().manual_seed(0)
    x, y, grad = torch.randn(3, 5, 3, 72, generator=generator).to(dtype).unbind()
    weight = x[0, 0].clone()
    passes: list[tuple[Any, Callable[..., Tensor], list[Tensor], tuple[Any, ...]]] = [
        *((_Norm, _plain_norm, [x], (weight, 1e-6, plus_one)) for plus_one in (False, True)),
        *((_Gate, _plain_gate, [x, y], (function,)) for function in MODES),
    ]
    for node, plain, inputs, rest in passes:
        there, wide = ([t.detach().to(to) for t in inputs] for to in (device, torch.float32))
        given, known = (
            [t.to(to) if isinstance(t, Tensor) else t for t in rest]
            for to in (device, torch.float32)
        )
        for t in (*there, *wide):
            t.requires_grad_()
        found, wanted = node.apply(*there, *given, kernels.call), plain(*wide, *known)
        back = torch.autograd.grad(found, there, grad.to(device))
        meant = torch.autograd.grad(wanted, wide, grad.float())
        for one, other in zip((found, *back), (wanted, *meant), strict=True):
            if not gpu.close(one, other):
                return f"another {node.__name__[1:].lower()}"
    return None


def _remembered(out: Tensor, make: Callable[..., Tensor], *inputs: Tensor) -> Tensor:
    """Return `out`, which says how it is made again: who would keep it may keep that instead.

    What it is made of is kept for its own gradient anyway. It is to be kept as autograd keeps what
    it needs (`save_for_backward`), for that is what activation checkpointing sees.
    """
    if out.requires_grad:
        # the version tells of a tensor that was written to since
        given = (t.detach() for t in inputs)
        out.made_from = (out._version, make, *given)  # type: ignore[attr-defined]
    return out


def _plain_norm(x: Tensor, weight: Tensor, eps: float, plus_one: bool) -> Tensor:
    wide = x.float() if x.dtype.itemsize < 4 else x
    scaled = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)
    if plus_one:
        return (scaled * (1.0 + weight.to(wide.dtype))).to(x.dtype)
    return scaled.to(x.dtype) * weight


def _plain_gate(gate: Tensor, up: Tensor, function: Gate) -> Tensor:
    return (F.silu(gate) if function == "silu" else F.gelu(gate, approximate="tanh")) * up


def _call_for(*tensors: Tensor) -> Call | None:
    """Return what computes passes of these tensors, or None where only plain torch does."""
    first = tensors[0]
    if any((t.dtype, t.device) != (first.dtype, first.device) for t in tensors):
        return None
    if first.device.type == "cpu":
        known = first.dtype in (torch.float32, torch.bfloat16)
        return _call if known and available() else None
    kernels = triton_for(first.device, first.dtype)
    return None if kernels is None else cast(Call, kernels.call)


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
        "inlay_gate": [*[pointer] * 3, *sizes, *sizes, *ends],
        "inlay_gate_back": [*[pointer] * 5, *sizes, *sizes, *ends],
    }.items():
        function = getattr(found, name)
        function.argtypes, function.restype = given, None
    return found


def _call(name: str, tensors: tuple[Tensor, ...], *rest: float) -> None:
    """Call a function of the C library with the tensors' places, `rest`, their type and threads."""
    half = int(tensors[0].dtype == torch.bfloat16)
    places = [tensor.data_ptr() for tensor in tensors]
    getattr(_functions(), f"inlay_{name}")(*places, *rest, half, torch.get_num_threads())


class _Norm(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, eps: float, plus_one: bool, call: Call
    ) -> Tensor:
        x, weight = x.contiguous(), weight.contiguous()
        n, ctx.call = x.shape[-1], call
        out, sums = torch.empty_like(x), x.new_empty(x.numel() // n, dtype=torch.float32)
        ctx.call("norm", (x, weight, out, sums), len(sums), n, eps, int(plus_one))
        ctx.save_for_backward(x, weight, sums)
        ctx.plus_one = plus_one
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> Any:
        x, weight, sums = ctx.saved_tensors
        grad = grads[0].contiguous()
        out = torch.empty_like(x)
        tensors = grad, weight, x, out, sums
        ctx.call("norm_back", tensors, len(sums), x.shape[-1], int(ctx.plus_one))
        return out, None, None, None, None


class _Gate(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor, function: Gate, call: Call) -> Tensor:
        rows = _rows(gate), _rows(up)
        out = gate.new_empty(gate.shape)
        steps = (t.stride(0) for t in rows)
        call("gate", (*rows, out), *rows[0].shape, *steps, MODES[function])
        ctx.save_for_backward(*rows)
        ctx.call, ctx.function = call, function
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> Any:
        rows, grad = ctx.saved_tensors, grads[0].contiguous()
        one, two = torch.empty_like(grad), torch.empty_like(grad)
        steps = (t.stride(0) for t in rows)
        ctx.call("gate_back", (*rows, grad, one, two), *rows[0].shape, *steps, MODES[ctx.function])
        return one, two, None, None


def _rows(t: Tensor) -> Tensor:
    """Return `t` as rows [rows, n] whose numbers lie side by side; copied only where it must be."""
    rows = t.reshape(-1, t.shape[-1])
    return rows if rows.stride(1) == 1 else rows.contiguous()
