"""LoftQ: the weight quantized to Q, and factors that make up for what Q lost of it.

    Q = q(W - s B A)    s B A = the R largest singular values of W - Q        (Li et al.,
                                                                        arXiv:2310.08659)
in turn, from B A = 0.  q is NormalFloat of 4 bits in blocks of 64 (QLoRA, arXiv:2305.14314), or
whole numbers of 8 bits with a scale for each row.  Here q rounds and the result stays a float: it
says what a packed base would hold, and packs none.      O out, I in, R rank, s scale.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from inlay.core.errors import UserError

FROM_THE_BASE = False
BLOCK = 64


def start(
    weight: Tensor, rank: int, scale: float, *, bits: int = 4, turns: int = 1
) -> tuple[Tensor, Tensor]:
    """Return B [O, R] and A [R, I]."""
    return quantized(weight, rank, scale, bits=bits, turns=turns)[1:]


def quantized(
    weight: Tensor, rank: int, scale: float, *, bits: int = 4, turns: int = 1
) -> tuple[Tensor, Tensor, Tensor]:
    """Return Q [O, I], B [O, R] and A [R, I]."""
    left, q, b, a = weight, weight, weight, weight
    for _ in range(turns):
        q = rounded(left, bits)
        b, a = making_up(weight - q, rank, scale)
        left = weight - scale * b @ a
    return q, b, a


def making_up(lost: Tensor, rank: int, scale: float) -> tuple[Tensor, Tensor]:
    """Return B and A of which scale * B A comes nearest to `lost` [O, I]."""
    if scale <= 0:
        raise UserError(f"a LoftQ start needs a scale above 0, not {scale}: raise lora_alpha")
    u, s, v = torch.linalg.svd(lost, full_matrices=False)
    root = (s[:rank] / scale).sqrt()
    return u[:, :rank] * root, root[:, None] * v[:rank]


def rounded(weight: Tensor, bits: int) -> Tensor:
    """Return the weight [O, I] as it is after quantizing and back."""
    if bits == 8:
        step = weight.abs().amax(1, keepdim=True).clamp_min(torch.finfo(weight.dtype).tiny) / 127
        return (weight / step).round() * step
    blocks = F.pad(weight.flatten(), (0, -weight.numel() % BLOCK)).view(-1, BLOCK)
    largest = blocks.abs().amax(1, keepdim=True).clamp_min(torch.finfo(weight.dtype).tiny)
    levels = normal_floats().to(weight)
    # what lies between two levels goes to the nearer one
    codes = torch.bucketize(blocks / largest, (levels[1:] + levels[:-1]) / 2)
    return (levels[codes] * largest).flatten()[: weight.numel()].view_as(weight)


def normal_floats() -> Tensor:
    """Return the 16 levels [16] from -1 to 1: quantiles of a normal distribution, 0 among them.

    Eight above zero and seven below, at even probabilities up to that of the outermost.
    """
    outermost = (1 - 1 / 32 + 1 - 1 / 30) / 2
    normal = torch.distributions.Normal(0.0, 1.0)
    above = normal.icdf(torch.linspace(outermost, 0.5, 9, dtype=torch.float64)[:-1])
    below = -normal.icdf(torch.linspace(outermost, 0.5, 8, dtype=torch.float64)[:-1])
    levels = torch.cat([below, above, torch.zeros(1, dtype=torch.float64)]).sort().values
    return (levels / levels.max()).float()
