"""Rotations from free numbers: R = (1 + Q) (1 - Q)^-1 is orthogonal where Q is skew (Cayley, 1846).

Q [..., K, K] = -Q^T is said by its K (K - 1) / 2 numbers above the diagonal, row by row.
"""

from __future__ import annotations

import torch
from torch import Tensor


def skew(numbers: Tensor, size: int) -> Tensor:
    """Return Q [..., K, K] of K = `size` from what stands above its diagonal, [..., K (K - 1) / 2].

    Computed in float32 at least, for neither solving nor a power is worth much below it.
    """
    wide = numbers.to(torch.promote_types(numbers.dtype, torch.float32))
    rows, columns = torch.triu_indices(size, size, 1, device=wide.device)
    above: Tensor = wide.new_zeros(*wide.shape[:-1], size * size)
    places = (rows * size + columns).expand(wide.shape)
    above = above.scatter(-1, places, wide).reshape(*wide.shape[:-1], size, size)
    return above - above.mT


def within(q: Tensor, most: float) -> Tensor:
    """Return each Q [..., K, K], scaled so that its norm is at most `most`."""
    norms: Tensor = torch.linalg.vector_norm(q, dim=(-2, -1), keepdim=True)
    return q * (most / norms.clamp(min=most))


def cayley(q: Tensor) -> Tensor:
    """Return (1 + Q) (1 - Q)^-1."""
    one = torch.eye(q.shape[-1], dtype=q.dtype, device=q.device)
    turn: Tensor = torch.linalg.solve(one - q, one + q, left=False)
    return turn


def powers(q: Tensor, terms: int) -> Tensor:
    """Return 1 + 2 Q + 2 Q^2 ... + Q^n, which nears (1 + Q) (1 - Q)^-1 where Q is small.

    n = terms - 1, but that three count as four, and that of two the second is 2 Q: as in PEFT.
    """
    power = out = torch.eye(q.shape[-1], dtype=q.dtype, device=q.device).expand(q.shape)
    last = max(terms, 4) - 1 if terms > 2 else terms - 1
    for n in range(1, last + 1):
        power = power @ q
        out = out + (1 if n == last > 1 else 2) * power
    return out
