"""OLoRA: the first R columns and rows of W = Q R' start as the update; the rest stays in the base.

B = Q_R    A = R'_R    (Buyukakyuz, arXiv:2406.01775)      O out, I in, R rank.
"""

from __future__ import annotations

import torch
from torch import Tensor

FROM_THE_BASE = True


def start(weight: Tensor, rank: int, scale: float) -> tuple[Tensor, Tensor]:
    """Return B [O, R], whose columns are orthonormal, and A [R, I]."""
    del scale  # the paper's: what the base gives away is scale * B A
    q, r = torch.linalg.qr(weight)
    return q[:, :rank], r[:rank]
