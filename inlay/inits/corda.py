"""CorDA: the part of W that matters most for inputs of covariance C, or least, as the update.

    W C = U S V    B = U_R sqrt(S_R / s)    A = sqrt(S_R / s) V_R C^-1

(Yang et al., arXiv:2406.05223.)  ipm takes the R largest singular values, which the data uses most,
to learn its task faster; kpm the R smallest, to keep what the data is about.
O out, I in, R rank, s scale.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from inlay.core.errors import UserError

FROM_THE_BASE = True
FROM_DATA = True
DAMPING = 0.01
"""Share of the mean variance that is added to every one, doubled until C can be inverted."""
FAULT = 0.05
"""Largest |C C^-1 - I| (Frobenius) of an inverse that is taken."""


def start(
    weight: Tensor, rank: int, scale: float, *, covariance: Tensor, method: str = "ipm"
) -> tuple[Tensor, Tensor]:
    """Return B [O, R] and A [R, I] for inputs of `covariance` [I, I]."""
    if scale <= 0:
        raise UserError(f"a CorDA start needs a scale above 0, not {scale}: raise lora_alpha")
    c, inverse = _invertible(covariance.to(weight))
    u, s, v = torch.linalg.svd(weight @ c, full_matrices=False)
    chosen = slice(None, rank) if method == "ipm" else slice(-rank, None)
    root = (s[chosen] / scale).sqrt()
    return u[:, chosen] * root, root[:, None] * (v[chosen] @ inverse)


class Covariance:
    """The mean X^T X of samples X [N, I].

    Each is divided by its largest value first, as the paper's authors do: else the samples with a
    few huge activations would outweigh all others.
    """

    def __init__(self, dtype: torch.dtype = torch.float32) -> None:
        """Hold the sum in `dtype`."""
        self.samples, self._dtype = 0, dtype
        self._sum: Tensor | None = None

    def add(self, x: Tensor) -> None:
        """Take in a sample [N, I]; UserError where it is not finite."""
        x = x.float()
        x = (x / x.max().abs().clamp_min(torch.finfo(x.dtype).tiny)).to(self._dtype)
        square = x.T @ x
        if not square.isfinite().all():
            raise UserError("CorDA: the inputs of a layer are not finite: try float32")
        self._sum = square if self._sum is None else self._sum + square
        self.samples += 1

    @property
    def mean(self) -> Tensor | None:
        """The mean [I, I] so far; None before the first sample."""
        return None if self._sum is None else self._sum / self.samples


def _invertible(covariance: Tensor) -> tuple[Tensor, Tensor]:
    eye = torch.eye(len(covariance)).to(covariance)
    for damping in _doubled(DAMPING):
        c = covariance + damping * covariance.diagonal().mean() * eye
        inverse = torch.linalg.inv_ex(c)[0]
        if (c @ inverse - eye).norm() < FAULT:
            return c, inverse
    raise UserError("CorDA: the inputs of a layer were all zero or not finite: give other data")


def _doubled(value: float) -> Iterable[float]:
    return (value * 2**turn for turn in range(60))
