"""Thin updates over frozen layers that read one input, as one node of the graph.

    y_i = (x W_i^T + b_i + d_i(x) A_i^T B_i^T) c_i    x [N, I], A_i [R, I], B_i [O_i, R], c_i [O_i]

d_i is dropout; few have factors c_i. Plain torch keeps the input of each product; this keeps x once
for all layers, their d_i(x) A_i^T [N, R] and, of a dropout, which inputs it left. Adding the update
is part of the product with B_i, and the gradient of x is added up in one place. An x that says how
it was made (`made_from`) is not kept at all: it is made again.

Activation checkpointing computes a block again until it has all that the backward pass needs, and
what a node saves is seen when its forward pass is through. So there what is saved has a node of its
own, ahead of the frozen products: those of a block's last layer are not made again, for nobody.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from inlay.kernels.columns import gradients_of_scaled, scaled_in_place


class Frozen(Protocol):
    """A frozen layer x W^T + b; neither product notes a gradient."""

    def forward_product(self, x: Tensor) -> Tensor:
        """Return x W^T + b [N, O], in the dtype of x [N, I]."""

    def backward_product(self, grad: Tensor) -> Tensor:
        """Return grad W [N, I], in the dtype of grad [N, O]."""


@dataclasses.dataclass(frozen=True)
class Member:
    """A frozen layer and the update over it: A [R, I], B [O, R] in any dtype, scaled already."""

    layer: Frozen
    a: Tensor
    b: Tensor
    dropout: float = 0.0
    """Probability of zeroing an input of the update."""
    columns: Tensor | None = None
    """c [O], none of them 0. Not with checkpointing: then y is not there when it would be kept."""


def adapted(x: Tensor, members: Sequence[Member], dtype: torch.dtype) -> tuple[Tensor, ...]:
    """Return what each member makes of x [..., I]: [..., O_i], computed in `dtype`."""
    given = x.to(dtype)
    version, make, *inputs = getattr(given, "made_from", (None, None))
    if make is not None and version != given._version:  # written to: it is what was made no more
        make, inputs = None, []
    layers, rates = [m.layer for m in members], [m.dropout for m in members]
    factors = [*(m.a for m in members), *(m.b for m in members), *(m.columns for m in members)]
    with torch.autocast(x.device.type, enabled=False):
        rows = given.reshape(-1, x.shape[-1])
        updates: list[Update] | None = [] if checkpointing() else None
        outs = _Adapted.apply(rows, (make, inputs), layers, rates, updates, *factors)
        if updates is not None:
            outs = _Products.apply(rows.detach(), layers, updates, *outs)
    return tuple(out.view(*x.shape[:-1], out.shape[-1]) for out in outs)


Update = tuple[Tensor, Tensor, Tensor | None]
"""d_i(x) A_i^T, B_i and c_i."""


def checkpointing() -> bool:
    """Return whether somebody else decides what becomes of saved tensors, as checkpointing does."""
    top = getattr(torch._C._autograd, "_top_saved_tensors_default_hooks", None)
    return top is not None and top(False) is not None


class _Products(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        layers: list[Frozen],
        updates: list[Update],
        *ahead: Tensor,
    ) -> tuple[Tensor, ...]:
        """Return y_i [N, O_i] of each layer; ahead: what `_Adapted` gave in their places."""
        del ahead
        ctx.set_materialize_grads(False)
        return _products(x, layers, updates)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> Any:
        """Hand on the gradients of the y_i."""
        del ctx
        return None, None, None, *grads


FIRST = 5
"""The place of the first factor among the inputs of `_Adapted`."""


class _Adapted(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        source: tuple[Callable[..., Tensor] | None, list[Tensor]],
        layers: list[Frozen],
        rates: list[float],
        updates: list[Update] | None,
        *factors: Any,
    ) -> tuple[Tensor, ...]:
        """Return y_i [N, O_i] of each layer; factors: the A_i, the B_i, then the c_i or None.

        A list of updates is given each Update, for `_Products` to make the y_i of: what is returned
        then takes their gradients, and has their shapes without their memory.
        """
        n = len(layers)
        a, b = ([t.to(x.dtype) for t in factors[i : i + n]] for i in (0, n))
        columns = factors[2 * n :]
        kept = [_draw(x, rate) for rate in rates] if any(rates) else None
        if kept is None:
            thin = (x @ _joined(a).T).split([len(m) for m in a], 1)
        else:
            left = zip(kept, rates, a, strict=True)  # in turn: what each leaves is as large as x
            thin = tuple(_drop(x, mask, rate) @ m.T for mask, rate, m in left)
        ctx.layers, ctx.rates, ctx.dtypes = layers, rates, [t.dtype for t in factors[: 2 * n]]
        ctx.set_materialize_grads(False)
        ctx.make, inputs = source
        needed = inputs if ctx.make else [x]
        trained = any(ctx.needs_input_grad[FIRST : FIRST + len(layers)])
        masks = kept or [None] * len(layers)
        made = list(zip(thin, b, columns, strict=True))
        if updates is None:
            outs = _products(x, layers, made)
        else:
            assert not any(c is not None for c in columns)
            updates.extend(made)
            outs = tuple(x.new_empty(1).expand(len(x), len(m)) for m in b)
        scaled = [None if c is None else y for y, c in zip(outs, columns, strict=True)]
        ctx.save_for_backward(
            *(*thin, *a, *b, *masks, *columns, *scaled), *(needed if trained else ())
        )
        return outs

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor | None) -> Any:
        """Return the gradients of x, of the A_i, of the B_i and of the c_i."""
        n = len(ctx.layers)
        saved = ctx.saved_tensors
        thin, a, b, kept, columns, scaled = (saved[i : i + n] for i in range(0, 6 * n, n))
        by_columns: list[Tensor | None] = [None] * n
        given = list(grads)  # those of the sums, before they are multiplied by c_i
        for i, (grad, y, c) in enumerate(zip(grads, scaled, columns, strict=True)):
            if grad is not None and c is not None:
                given[i], by_columns[i] = gradients_of_scaled(grad, y, c)
        up: list[Tensor | None] = [None] * n
        low: list[Tensor] = []  # the gradients of d_i(x) A_i^T
        for i, grad in enumerate(given):
            if grad is None:  # nothing was made of this layer's output
                low.append(torch.zeros_like(thin[i]))
                continue
            low.append(grad @ b[i])
            if ctx.needs_input_grad[FIRST + n + i]:
                up[i] = (grad.T @ thin[i]).to(ctx.dtypes[n + i])
        total = _through(ctx.layers, given, low, a) if ctx.needs_input_grad[0] else None
        down: list[Tensor | None] = [None] * n
        trained = any(ctx.needs_input_grad[FIRST : FIRST + n])
        if trained:
            x = ctx.make(*saved[6 * n :]) if ctx.make else saved[6 * n]
            x = x.reshape(-1, a[0].shape[1])
        if any(ctx.rates):
            for i, left in enumerate(zip(kept, ctx.rates, strict=True)):
                if trained:
                    down[i] = low[i].T @ _drop(x, *left)
                if total is not None:
                    back = low[i] @ a[i]
                    total.add_(_drop(back, *left, out=back))
        else:
            joined = _joined(low, 1)
            if trained:
                down = list((joined.T @ x).split([len(m) for m in a]))
            if total is not None:
                total.addmm_(joined, _joined(a))
        typed = (None if t is None else t.to(d) for t, d in zip(down, ctx.dtypes, strict=False))
        return total, None, None, None, None, *typed, *up, *by_columns


def _products(x: Tensor, layers: Sequence[Frozen], updates: Sequence[Update]) -> tuple[Tensor, ...]:
    outs = []
    for layer, (low, up, columns) in zip(layers, updates, strict=True):
        out = layer.forward_product(x).addmm_(low, up.T)
        outs.append(out if columns is None else scaled_in_place(out, columns))
    return tuple(outs)


def _through(
    layers: list[Frozen], grads: Sequence[Tensor | None], low: Sequence[Tensor], a: Sequence[Tensor]
) -> Tensor:
    """Return the gradient of x [N, I] through the frozen layers."""
    total: Tensor | None = None
    for layer, grad in zip(layers, grads, strict=True):
        if grad is not None:
            part = layer.backward_product(grad)
            total = part if total is None else total.add_(part)
    return low[0].new_zeros(len(low[0]), a[0].shape[1]) if total is None else total


def _joined(parts: Sequence[Tensor], dim: int = 0) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(list(parts), dim)


def _draw(x: Tensor, rate: float) -> Tensor | None:
    """Return which inputs a dropout leaves, a byte each, drawn as torch draws them."""
    return torch.empty_like(x, dtype=torch.bool).bernoulli_(1 - rate) if rate else None


def _drop(x: Tensor, kept: Tensor | None, rate: float, out: Tensor | None = None) -> Tensor:
    """Return x / (1 - rate) where it is kept, and 0 elsewhere; in `out`, which may be x."""
    if kept is None:
        return x
    return torch.mul(x, kept, out=out).mul_(1 / (1 - rate) if rate < 1 else 0.0)
