"""A matrix's largest singular values by subspace iteration (Halko et al., arXiv:0909.4061)."""

from __future__ import annotations

import torch
from torch import Tensor


def largest(
    matrix: Tensor, count: int, rounds: int, seed: int = 0
) -> tuple[Tensor, Tensor, Tensor]:
    """Return u [O, K], s [K] from the largest down, v [K, I] of `matrix` [O, I]; K at most `count`.

    Exact where that is all there are; else each of the rounds costs two products with it.
    """
    count = min(count, *matrix.shape)
    if count == min(matrix.shape):
        u, s, v = torch.linalg.svd(matrix, full_matrices=False)
        return u, s, v
    # seeded on its own: the same matrix has the same values each time, also when a run goes on
    draw = torch.Generator().manual_seed(seed)
    tried = torch.randn(matrix.shape[1], count, generator=draw).to(matrix)
    span = torch.linalg.qr(matrix @ tried)[0]
    for _ in range(rounds):
        span = torch.linalg.qr(matrix @ torch.linalg.qr(matrix.T @ span)[0])[0]
    u, s, v = torch.linalg.svd(span.T @ matrix, full_matrices=False)
    return span @ u, s, v
