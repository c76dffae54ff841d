"""MiCA: B holds the directions of the output that W reaches least, and stays; A starts at zero.

W = U S V    B = U_[-R:]    A = 0    (arXiv:2604.01694)      O out, I in, R rank.
"""

from __future__ import annotations

import torch
from torch import Tensor

FROM_THE_BASE = False


def start(weight: Tensor, rank: int, scale: float) -> tuple[Tensor, Tensor]:
    """Return B [O, R], whose columns are orthonormal, and A [R, I], zero."""
    del scale
    u = torch.linalg.svd(weight, full_matrices=False)[0]
    return u[:, -rank:], weight.new_zeros(rank, weight.shape[1])
