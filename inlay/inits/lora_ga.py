"""LoRA-GA: A and B begin along the gradient of W: the first step goes as full fine-tuning's.

    dL/dW = U S V    A = c V_[:R]    B = c U_[R:2R]    (Wang et al., arXiv:2407.05000)

c = O^(1/4) / sqrt(gamma) keeps the size of outputs and gradients apart from O ("stable"); or 1 / s
("gd_scale"), 1 ("unit"), or what makes the factors as long as PiSSA's of W ("weight_svd").
O out, I in, R rank, s scale.
"""

from __future__ import annotations

import torch
from torch import Tensor

from inlay.core.errors import UserError
from inlay.inits._search import largest

FROM_THE_BASE = True
FROM_DATA = True
ROUNDS = 4


def start(
    weight: Tensor,
    rank: int,
    scale: float,
    *,
    gradient: Tensor,
    direction: str = "ArB2r",
    length: str = "stable",
    gamma: float = 16,
) -> tuple[Tensor, Tensor]:
    """Return B [O, R] and A [R, I] for the gradient [O, I] of the weight."""
    if 2 * rank > min(weight.shape):
        raise UserError(
            f"a LoRA-GA start shares out 2 * {rank} directions, and a weight {list(weight.shape)} "
            f"has {min(weight.shape)}: lower r"
        )
    if not gradient.isfinite().all() or not gradient.any():
        raise UserError("LoRA-GA: a layer's gradient is zero or not finite: give other batches")
    u, _, v = largest(gradient.to(weight), 4 * rank, ROUNDS)
    of_a, of_b = _shared_out(rank, direction)
    c = _length(weight, rank, scale, length, gamma)
    return c * u[:, of_b], c * v[of_a]


def _shared_out(rank: int, direction: str) -> tuple[Tensor, Tensor]:
    """Return which of the 2 R directions A gets, and which B."""
    first, second = torch.arange(2 * rank).chunk(2)
    if direction == "ArB2r":
        return first, second
    if direction == "A2rBr":
        return second, first
    if direction == "ArBr":
        return 2 * first + 1, 2 * first
    drawn = torch.randperm(2 * rank, generator=torch.Generator().manual_seed(0))
    return drawn[:rank], drawn[rank:]


def _length(weight: Tensor, rank: int, scale: float, length: str, gamma: float) -> float:
    if length == "stable":
        return float(len(weight) ** 0.25 / gamma**0.5)
    if length == "unit":
        return 1.0
    if scale <= 0:
        raise UserError(f"a LoRA-GA start needs a scale above 0, not {scale}: raise lora_alpha")
    if length == "gd_scale":
        return 1 / scale
    return float((largest(weight, rank, ROUNDS)[1][:rank] / scale).sqrt().mean())
