"""Orthogonal: both factors random from the start, and their product zero.

The rows of a random orthogonal Q [R, R] are dealt out: B = N_1 Q_1 / 10, A = Q_2^T N_2 / 10 with N
normal, so that B A = N_1 (Q_1 Q_2^T) N_2 / 100 = 0 and the layer begins as it was
(https://datta0.github.io/posts/rethink-lora-init).   O out, I in, R rank, even.
"""

from __future__ import annotations

import torch
from torch import Tensor

from inlay.core.errors import UserError

FROM_THE_BASE = False


def start(weight: Tensor, rank: int, scale: float) -> tuple[Tensor, Tensor]:
    """Return B [O, R] and A [R, I] whose product is zero, drawn from torch's own generator."""
    del scale
    if rank % 2:
        raise UserError(f"an orthogonal start needs an even rank, not {rank}: take {rank + 1}")
    half, (outputs, inputs) = rank // 2, weight.shape
    q = torch.linalg.qr(torch.randn(rank, rank))[0]
    b = torch.randn(outputs, half) @ q[1::2] / 10
    a = q[::2].T @ torch.randn(half, inputs) / 10
    return b.to(weight), a.to(weight)
