"""Causal attention of rows packed behind one another: each token sees its own row up to itself.

    S = cap tanh(Q K^T scale / cap)     P = softmax(S)     O = P V

q [T, heads, D], k and v [T, kv_heads, D], T the tokens of all rows; a head of keys serves heads /
kv_heads of queries. Queries and keys may be rotated first (RoPE, arXiv:2104.09864). On the CPU
`attention.c` computes it, forward and backward (FlashAttention-2, arXiv:2307.08691), in float32 and
bfloat16; the scores are never whole, and rows do not grow to the longest. Elsewhere torch's
varlen_attn does, and where neither can, the eager twin, row by row.
"""

from __future__ import annotations

import ctypes
import dataclasses
from collections.abc import Sequence
from functools import cache
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from inlay.kernels.native import library
from inlay.kernels.scratch import SCRATCH

WIDEST = 256
"""Numbers of a head at most, in the compiled code and in torch's varlen_attn."""
MOST_THREADS = 64
Rotation = tuple[Tensor, Tensor]
"""The cosines and the sines that a token's numbers are rotated by: float32 [T, D], D even."""


@dataclasses.dataclass(frozen=True)
class Rows:
    """Where the rows of T tokens begin: told once a batch, for all of its layers."""

    bounds: tuple[int, ...]
    """Row i holds the tokens bounds[i] .. bounds[i + 1]; from 0 to T."""
    starts: Tensor
    """The bounds, int32 [rows + 1], on the device of the tokens."""
    order: Tensor
    """The rows, the longest first: int32 [rows], on the CPU."""

    @classmethod
    def of(cls, lengths: Sequence[int], device: torch.device | str = "cpu") -> Rows:
        """Return the rows of so many tokens each."""
        assert all(n >= 0 for n in lengths)
        bounds = [0]
        for length in lengths:
            bounds.append(bounds[-1] + length)
        assert bounds[-1] < 2**31
        order = sorted(range(len(lengths)), key=lambda i: -lengths[i])
        starts = torch.tensor(bounds, dtype=torch.int32).to(device)
        return cls(tuple(bounds), starts, torch.tensor(order, dtype=torch.int32))

    @property
    def longest(self) -> int:
        """Tokens of the longest row."""
        return max((b - a for a, b in self.spans), default=0)

    @property
    def spans(self) -> list[tuple[int, int]]:
        """The first token of each row, and the one behind its last."""
        return list(pairwise(self.bounds))


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    rows: Rows,
    *,
    scale: float,
    window: int | None = None,
    cap: float | None = None,
    rotation: Rotation | None = None,
) -> Tensor:
    """Return O [T, heads, D], in the dtype that q, k and v share.

    scale: over 0. window: a token sees that many tokens, itself among them; None: all of its row.
    cap: scores are squeezed between -cap and cap; None: they are not. rotation: the cosines and
    sines that turn q and k (`rotated`); None: they are as they are to be.
    """
    assert q.shape[0] == k.shape[0] == v.shape[0] == rows.bounds[-1]
    assert k.shape == v.shape
    assert q.shape[1] % k.shape[1] == 0
    assert scale > 0
    if window is not None and window >= rows.longest:
        window = None
    if compiled(q, k, v):
        q, k, v = (t if t.stride(-1) == 1 else t.contiguous() for t in (q, k, v))
        return _Attention.apply(q, k, v, rows, scale, window or 0, cap or 0.0, rotation)
    if rotation is not None:
        q, k = rotated(q, rotation), rotated(k, rotation)
    if cap is None and _varlen_takes(q, k, v):
        return _varlen(q, k, v, rows, scale, window)
    return eager(q, k, v, rows, scale=scale, window=window, cap=cap)


def rotated(x: Tensor, rotation: Rotation) -> Tensor:
    """Return x cos + (-second half, first half of x) sin, of x [T, heads, D], computed in float32.

    In float64 where x is.
    """
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    cos, sin = (t.to(wide.dtype)[:, None] for t in rotation)
    first, second = wide.chunk(2, -1)
    return (wide * cos + torch.cat((-second, first), -1) * sin).to(x.dtype)


def compiled(q: Tensor, k: Tensor, v: Tensor) -> bool:
    """Return whether `attention.c` computes these on this machine."""
    return (
        q.device.type == "cpu"
        and q.dtype in (torch.float32, torch.bfloat16)
        and q.dtype == k.dtype == v.dtype
        and q.shape[-1] == v.shape[-1] <= WIDEST
        and available()
    )


def available() -> bool:
    """Return whether this machine can compile it."""
    return _functions() is not None


def eager(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    rows: Rows,
    *,
    scale: float,
    window: int | None = None,
    cap: float | None = None,
) -> Tensor:
    """Return the same, row by row, by plain torch."""
    outs = []
    shared = q.shape[1] != k.shape[1]
    for first, last in rows.spans:
        a, b, c = (t[first:last].transpose(0, 1)[None] for t in (q, k, v))
        if window is None and cap is None:
            out = F.scaled_dot_product_attention(
                a, b, c, is_causal=True, scale=scale, enable_gqa=shared
            )[0]
        else:
            out = _scored(a[0], b[0], c[0], scale, window, cap)
        outs.append(out.transpose(0, 1))
    return torch.cat(outs)


def _scored(
    q: Tensor, k: Tensor, v: Tensor, scale: float, window: int | None, cap: float | None
) -> Tensor:
    """Return O [heads, L, D] of one row, its scores whole."""
    k, v = (t.repeat_interleave(q.shape[0] // k.shape[0], 0) for t in (k, v))
    scores = q @ k.transpose(1, 2) * scale
    if cap is not None:
        scores = cap * torch.tanh(scores / cap)
    n = torch.arange(q.shape[1], device=q.device)
    m = n[:, None]
    seen = n <= m
    if window is not None:
        seen &= n > m - window
    weights = scores.masked_fill(~seen, -torch.inf).softmax(-1, dtype=torch.float32)
    return weights.to(q.dtype) @ v


def _varlen_takes(q: Tensor, k: Tensor, v: Tensor) -> bool:
    return (
        q.device.type == "cuda"
        and torch.version.hip is None
        and torch.backends.cuda.is_flash_attention_available()
        and torch.cuda.get_device_capability(q.device) >= (8, 0)
        and q.dtype in (torch.float16, torch.bfloat16)
        and q.dtype == k.dtype == v.dtype
        and q.shape[-1] % 8 == 0
        and q.shape[-1] <= WIDEST
    )


def _varlen(
    q: Tensor, k: Tensor, v: Tensor, rows: Rows, scale: float, window: int | None
) -> Tensor:
    from torch.nn.attention.varlen import varlen_attn  # imported where there is a GPU only

    found = varlen_attn(
        *(q, k, v, rows.starts, rows.starts, rows.longest, rows.longest),
        scale=scale,
        window_size=(-1 if window is None else window - 1, 0),
        enable_gqa=q.shape[1] != k.shape[1],
    )
    assert isinstance(found, Tensor)
    return found


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        rows: Rows,
        scale: float,
        window: int,
        cap: float,
        rotation: Rotation | None,
    ) -> Tensor:
        """Return O; of the scores, their logsumexp [heads, T] is kept, in base 2."""
        out = torch.empty(q.shape, dtype=q.dtype)
        lse = torch.empty(q.shape[1], q.shape[0])
        call = _call(q, k, v, rows, lse, scale, window, cap, rotation)
        call.o = out.data_ptr()
        _functions().inlay_attention(ctypes.byref(call))
        ctx.save_for_backward(q, k, v, out, lse)
        ctx.rows, ctx.settings = rows, (scale, window, cap, rotation)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Any:
        """Return the gradients of q, k and v."""
        q, k, v, out, lse = ctx.saved_tensors
        grad = grad if grad.stride(-1) == 1 else grad.contiguous()
        found = [torch.empty(t.shape, dtype=t.dtype) for t in (q, k, v)]
        call = _call(q, k, v, ctx.rows, lse, *ctx.settings)
        call.backward, call.grad, call.out = 1, grad.data_ptr(), out.data_ptr()
        call.grad_token, call.grad_head = grad.stride()[:2]
        call.dq, call.dk, call.dv = (t.data_ptr() for t in found)
        _functions().inlay_attention(ctypes.byref(call))
        return *found, None, None, None, None, None


POINTERS = ("q", "k", "v", "grad", "out", "o", "dq", "dk", "dv", "lse")
ROWS = ("cos", "sin", "starts", "order")
WHOLE = (
    *("rows", "tokens", "heads", "kv_heads", "width", "window"),
    *("q_token", "q_head", "k_token", "k_head", "v_token", "v_head", "grad_token", "grad_head"),
    *("share", "bf16", "pairs", "backward", "threads"),
)


class _Call(ctypes.Structure):
    """`Call` of attention.c."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in (*POINTERS, *ROWS, "scratch")),
        *((name, ctypes.c_int64) for name in WHOLE),
        ("scale", ctypes.c_float),
        ("cap", ctypes.c_float),
    )


def _call(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    rows: Rows,
    lse: Tensor,
    scale: float,
    window: int,
    cap: float,
    rotation: Rotation | None,
) -> Any:
    """Return what both passes tell; its scratch is this thread's, until the next kernel."""
    functions = _functions()
    tokens, heads, width = q.shape
    threads = min(torch.get_num_threads(), MOST_THREADS)
    share = functions.inlay_attention_scratch(rows.longest, width)
    names = {"q": q, "k": k, "v": v, "lse": lse, "starts": rows.starts, "order": rows.order}
    if rotation is not None:
        names["cos"], names["sin"] = rotation
        assert all(t.shape == (tokens, width) and t.dtype == torch.float32 for t in rotation)
        assert all(t.is_contiguous() for t in rotation)
        assert width % 2 == 0
    half = q.dtype == torch.bfloat16
    return _Call(
        **{name: tensor.data_ptr() for name, tensor in names.items()},
        scratch=SCRATCH.take(torch.float32, share * threads).data_ptr(),
        rows=len(rows.order),
        tokens=tokens,
        heads=heads,
        kv_heads=k.shape[1],
        width=width,
        window=window,
        q_token=q.stride(0),
        q_head=q.stride(1),
        k_token=k.stride(0),
        k_head=k.stride(1),
        v_token=v.stride(0),
        v_head=v.stride(1),
        share=share,
        bf16=half,
        pairs=half and functions.inlay_attention_pairs(),
        threads=threads,
        scale=scale,
        cap=cap,
    )


@cache
def _functions() -> Any:
    found = library("attention")
    if found is None:
        return None
    found.inlay_attention.argtypes = [ctypes.c_void_p]
    found.inlay_attention.restype = None
    found.inlay_attention_scratch.argtypes = [ctypes.c_int64] * 2
    found.inlay_attention_scratch.restype = ctypes.c_int64
    found.inlay_attention_pairs.restype = ctypes.c_int
    return found
