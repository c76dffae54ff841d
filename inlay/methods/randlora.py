"""RandLoRA: W + s sum_n B_n diag(l_n) A diag(g_n), so many random bases that the sum has full rank.

Albert et al., ICLR 2025, arXiv:2502.00987.  A and B_n are drawn once for all layers; l and g train.

Of a layer whose smaller side is m and larger side M, with N = ceil(m / R) bases: A [R, m] and
B_n [M, R] are cut from the shared A [R, 1, largest m] and B [largest M, largest N, R];
l [R, N], g [N, m], s = randlora_alpha / R.  The sum is [M, m]: where O < I it is transposed.

PEFT's files mean a sum of other pairs: column n R + r of [B_1 ... B_N] meets the row that is
(r', n') at r' N + n', and not (r, n).  Both factors being random, that is as good; it is kept.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor, nn

from inlay.core.adapter import Delta, Method, Shared
from inlay.core.base import Base
from inlay.core.config import PeftType
from inlay.core.limits import Dropout, Rank, Scale, Seed
from inlay.core.targeted import TargetedConfig
from inlay.methods._drawn import Drawn, largest


@dataclasses.dataclass(frozen=True, kw_only=True)
class RandLoraConfig(TargetedConfig):
    """RandLoRA's settings, under PEFT's names and with PEFT's defaults."""

    method = PeftType.RANDLORA
    unwritten = ("exclude_modules",)

    r: Rank = 32
    """Rank of one basis: the higher it is, the fewer bases and trained numbers."""
    projection_prng_key: Seed = 0
    """Seed that A and B are drawn from."""
    save_projection: bool = True
    """Whether a file holds A and B, once a layer; without, they are drawn from the seed again."""
    sparse: bool = False
    """Draw A and B from -1, 0, 1 with probabilities 1/6, 2/3, 1/6."""
    very_sparse: bool = False
    """As sparse, with fewer entries that are not 0: one in sqrt(m)."""
    randlora_dropout: Dropout = 0.0
    """Probability of zeroing an input of the update in training."""
    fan_in_fan_out: bool = False
    """PEFT's note that a weight is stored [in, out]; read from the layer, kept for the files."""
    randlora_alpha: Scale = 640
    """Numerator of the scale: the update is multiplied by randlora_alpha / r."""
    bias: Literal["none", "all", "randlora_only"] = "none"
    """Which biases train too: none, every one of the model, or those of the adapted layers."""
    init_weights: bool = True
    """True: l zero, g constant. False: l random, for tests."""


class Bases(Drawn):
    """A [R, 1, largest m] and B [largest M, largest N, R], each of standard deviation 1."""

    randlora_A: Tensor

    def draw(self, shape: torch.Size, generator: torch.Generator) -> Tensor:
        """Return one of them."""
        drawn = self._drawn(shape, generator)
        return drawn / drawn.std()

    def _drawn(self, shape: torch.Size, generator: torch.Generator) -> Tensor:
        if not (self.config.sparse or self.config.very_sparse):
            # basis by basis: the order of the numbers is part of what a seed means
            # in bfloat16, as PEFT does wherever a machine has it
            parts = [
                torch.empty(shape[0], 1, shape[2], dtype=torch.bfloat16) for _ in range(shape[1])
            ]
            for part in parts:
                nn.init.kaiming_uniform_(part, a=math.sqrt(5), generator=generator)
            return torch.cat(parts, dim=1)
        small = self.randlora_A.shape[2]
        share = 1 / (2 * (math.sqrt(small) if self.config.very_sparse else 3))
        even = torch.rand(shape, generator=generator)
        return (even > 1 - share).float() - (even < share).float()


class RandLora(Delta):
    """The update of one layer."""

    on = frozenset({"linear"})
    drops = "randlora_dropout"
    config: RandLoraConfig

    def make(self, base: Base) -> None:
        """Make l [R, N] and g [N, m], and take A and B from `shared`."""
        config = self.config
        self.small, self.large = sorted(base.shape)
        self.lies = base.shape[1] > base.shape[0]
        count = math.ceil(self.small / config.r)
        self.randlora_lambda = self.parameter(config.r, count)
        self.randlora_gamma = self.parameter(count, self.small)

    @classmethod
    def share(
        cls, config: RandLoraConfig, bases: Sequence[Base], *, device: torch.device | None = None
    ) -> Shared:
        """Return A and B, large enough for every layer."""
        small, large = sorted(largest(bases))
        shapes = (config.r, 1, small), (large, math.ceil(small / config.r), config.r)
        return Bases(config, bases, device, randlora_A=shapes[0], randlora_B=shapes[1])

    def reset(self, base: Base) -> None:
        """Start from an update of zero."""
        super().reset(base)
        if self.config.init_weights:
            nn.init.zeros_(self.randlora_lambda)
            nn.init.constant_(self.randlora_gamma, 1 / max(self.randlora_gamma.shape))
        else:
            nn.init.normal_(self.randlora_lambda)
            nn.init.constant_(self.randlora_gamma, 1 / self.large)

    def factors(self, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Return s B [M, N R] and diag(l) A diag(g) [N R, m], transposed where O < I."""
        (held,) = self._held
        shared_a, shared_b = held.get_buffer("randlora_A"), held.get_buffer("randlora_B")
        weights, g = self.randlora_lambda.to(dtype), self.randlora_gamma.to(dtype)
        a = shared_a[..., : self.small].to(g.device, dtype)
        b = shared_b[: self.large, : len(g)].to(g.device, dtype)
        low = (weights[:, :, None] * a * g).flatten(0, 1)
        # rows by (rank, basis), columns by (basis, rank): what PEFT's files mean
        high = self.config.randlora_alpha / self.config.r * b.flatten(1)
        return (low.T, high.T) if self.lies else (high, low)

    def keys(self, base: Base) -> dict[str, tuple[str, tuple[int, ...]]]:
        """Return PEFT's names, which repeat A and B under every layer."""
        (held,) = self._held
        shared = {
            name: (f"{Shared.lent_as}.{own}", shape) for name, (own, shape) in held.keys().items()
        }
        return super().keys(base) | shared


METHOD = Method(RandLoraConfig, RandLora)
