"""PSOFT: W + s B (G R H - 1) A, R orthogonal; W's principal part is turned (arXiv:2505.11235).

s B A is the part of W in its first K singular vectors, fixed: A [K, I], B [O, K], s = alpha / K.
R [K, K] = (1 + Q) (1 - Q)^-1 with Q skew, its K (K - 1) / 2 numbers above the diagonal; G and H are
diagonal [K].  Where R need not be orthogonal it is a plain matrix.
"""

from __future__ import annotations

import dataclasses
from typing import Literal

import torch
from torch import Tensor, nn

from inlay.core.adapter import Delta, Method
from inlay.core.base import Base
from inlay.core.config import PeftType
from inlay.core.errors import UserError
from inlay.core.limits import Dropout, Rank, Scale, Seed
from inlay.core.numbers import check_whole
from inlay.core.targeted import TargetedConfig
from inlay.methods._cayley import cayley, powers, skew, within


@dataclasses.dataclass(frozen=True, kw_only=True)
class PsoftConfig(TargetedConfig):
    """PSOFT's settings, under PEFT's names and with PEFT's defaults."""

    method = PeftType.PSOFT

    r: Rank = 32
    """Singular vectors that are turned."""
    psoft_alpha: Scale = 32
    """Numerator of the scale s = psoft_alpha / r, by which A and B are made the smaller."""
    psoft_dropout: Dropout = 0.0
    """Probability of zeroing an input of the update in training."""
    fan_in_fan_out: bool = False
    """PEFT's note that a weight is stored [in, out]; read from the layer, kept for the files."""
    ab_svd_init: Literal["psoft_init", "pissa_init"] = "psoft_init"
    """Where the singular values go: all into B, or their roots into A and B."""
    psoft_svd: Literal["full", "lowrank"] = "full"
    """How the singular vectors are found: exactly, or by random projection."""
    psoft_svd_lowrank_niter: int = 10
    """Iterations of the random projection."""
    random_seed: Seed = 0
    """Seed of the random projection: a file holds R alone, so its vectors must be found again."""
    psoft_orth: bool = True
    """Whether R is orthogonal."""
    psoft_mag_b: bool = True
    """Whether G, on the side of B, trains."""
    psoft_mag_a: bool = True
    """Whether H, on the side of A, trains."""
    use_cayley_neumann: bool = False
    """Take a sum of powers of Q for the inverse."""
    num_cayley_neumann_terms: int = 5
    """Terms of that sum; three count as four, as in PEFT."""
    cayley_neumann_eps: float | None = None
    """Largest norm of Q in that sum, above 0 and below 1; None: as it is."""
    init_weights: bool = True
    """True: R, G and H are the identity. False: R random, for tests."""

    def __post_init__(self) -> None:
        """Refuse ranks, scales and switches that cannot be."""
        super().__post_init__()
        check_whole("psoft_svd_lowrank_niter", self.psoft_svd_lowrank_niter, least=0, most=1000)
        check_whole("num_cayley_neumann_terms", self.num_cayley_neumann_terms, most=1000)
        if not self.psoft_alpha > 0:
            raise UserError(f"psoft_alpha={self.psoft_alpha!r} must be above 0")
        eps = self.cayley_neumann_eps
        if eps is not None and not 0 < eps < 1:
            raise UserError(f"cayley_neumann_eps={eps!r} must be above 0 and below 1")


class Psoft(Delta):
    """The turned principal part of one layer."""

    on = frozenset({"linear"})
    drops = "psoft_dropout"
    config: PsoftConfig
    A: Tensor
    B: Tensor

    def make(self, base: Base) -> None:
        """Make Q's numbers, G and H; find A and B in the weight, which no file has."""
        config = self.config
        k = config.r
        if k > min(base.shape):
            raise UserError(f"r={k} is more than a layer {list(base.shape)} has: lower it")
        self.weight = (
            self.parameter(k * (k - 1) // 2) if config.psoft_orth else self.parameter(k, k)
        )
        self.vector_b = self.parameter(k) if config.psoft_mag_b else None
        self.vector_a = self.parameter(k) if config.psoft_mag_a else None
        a, b = _principal(base.weight().detach().to(base.adapter_dtype), config)
        self.register_buffer("A", a, persistent=False)
        self.register_buffer("B", b, persistent=False)

    def reset(self, base: Base) -> None:
        """Start from the identity: an untrained update changes nothing."""
        super().reset(base)
        random = 0.0 if self.config.init_weights else 0.1
        nn.init.normal_(self.weight, std=random)
        if not self.config.psoft_orth:
            with torch.no_grad():
                self.weight.diagonal().add_(1)
        for vector in (self.vector_a, self.vector_b):
            if vector is not None:
                nn.init.ones_(vector)

    def _turn(self, dtype: torch.dtype) -> Tensor:
        """Return G R H - 1 [K, K]."""
        config, turn = self.config, self.weight.to(dtype)
        one = torch.eye(config.r, dtype=dtype, device=turn.device)
        if config.psoft_orth:
            q = skew(self.weight, config.r)
            if config.use_cayley_neumann and config.cayley_neumann_eps is not None:
                q = within(q, config.cayley_neumann_eps)
            terms = config.num_cayley_neumann_terms
            turn = (powers(q, terms) if config.use_cayley_neumann else cayley(q)).to(dtype)
        if self.vector_b is not None:
            turn = self.vector_b.to(dtype)[:, None] * turn
        if self.vector_a is not None:
            turn = turn * self.vector_a.to(dtype)
        return turn - one

    def factors(self, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Return s B (G R H - 1) [O, K] and A [K, I]."""
        scale = self.config.psoft_alpha / self.config.r
        return scale * (self.B.to(dtype) @ self._turn(dtype)), self.A.to(dtype)

    def keys(self, base: Base) -> dict[str, tuple[str, tuple[int, ...]]]:
        """Return PEFT's names: the parameters are those of a module `psoft_R`."""
        return {f"psoft_R.{name}": slot for name, slot in super().keys(base).items()}


def _principal(weight: Tensor, config: PsoftConfig) -> tuple[Tensor, Tensor]:
    """Return A [K, I] and B [O, K], of which s B A is the principal part of the weight."""
    k = config.r
    if weight.is_meta:
        return weight.new_empty(k, weight.shape[1]), weight.new_empty(weight.shape[0], k)
    if config.psoft_svd == "full":
        left, values, right = torch.linalg.svd(weight, full_matrices=False)
    else:
        devices = [] if weight.device.type == "cpu" else [weight.device]
        with torch.random.fork_rng(devices, device_type=weight.device.type):
            torch.manual_seed(config.random_seed)
            left, values, right = torch.svd_lowrank(
                weight, q=k, niter=config.psoft_svd_lowrank_niter
            )
            right = right.T
    left, values, right = left[:, :k], values[:k] * (k / config.psoft_alpha), right[:k]
    if config.ab_svd_init == "pissa_init":
        roots = values.sqrt()
        return roots[:, None] * right, left * roots
    return right.contiguous(), left * values


METHOD = Method(PsoftConfig, Psoft)
