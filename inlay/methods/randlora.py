"""RandLoRA: s sum_n B_n diag(l_n) A diag(g_n), so many random bases n that the sum has full rank.

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
import torch.nn.functional as F
from torch import Tensor, nn

from inlay.core.adapter import Delta, Method, Shared
from inlay.core.base import Base
from inlay.core.config import PeftType
from inlay.core.numbers import check_dropout, check_finite, check_one_of, check_whole
from inlay.core.targeted import TargetedConfig


@dataclasses.dataclass(frozen=True, kw_only=True)
class RandLoraConfig(TargetedConfig):
    """RandLoRA's settings, under PEFT's names and with PEFT's defaults."""

    method = PeftType.RANDLORA

    r: int = 32
    """Rank of one basis: the higher it is, the fewer bases and trained numbers."""
    projection_prng_key: int = 0
    """Seed that A and B are drawn from."""
    save_projection: bool = True
    """Whether a file holds A and B, once a layer; without, they are drawn from the seed again."""
    sparse: bool = False
    """Draw A and B from -1, 0, 1 with probabilities 1/6, 2/3, 1/6."""
    very_sparse: bool = False
    """As sparse, with fewer entries that are not 0: one in sqrt(m)."""
    randlora_dropout: float = 0.0
    """Probability of zeroing an input of the update in training."""
    fan_in_fan_out: bool = False
    """PEFT's note that a weight is stored [in, out]; read from the layer, kept for the files."""
    randlora_alpha: float = 640
    """Numerator of the scale: the update is multiplied by randlora_alpha / r."""
    bias: Literal["none", "all", "randlora_only"] = "none"
    """Which biases train too: none, every one of the model, or those of the adapted layers."""
    init_weights: bool = True
    """True: l zero, g constant. False: l random, for tests."""

    def __post_init__(self) -> None:
        """Refuse ranks, seeds and scales that cannot be."""
        super().__post_init__()
        check_whole("r", self.r)
        check_whole("projection_prng_key", self.projection_prng_key, least=0, most=2**63 - 1)
        check_dropout("randlora_dropout", self.randlora_dropout)
        check_finite("randlora_alpha", self.randlora_alpha)
        for switch in ("save_projection", "sparse", "very_sparse", "init_weights"):
            check_one_of(switch, getattr(self, switch), (True, False))
        check_one_of("bias", self.bias, ("none", "all", "randlora_only"))


class Bases(Shared):
    """A [R, 1, largest m] and B [largest M, largest N, R], frozen."""

    randlora_A: Tensor
    randlora_B: Tensor

    def __init__(
        self, config: RandLoraConfig, bases: Sequence[Base], device: torch.device | None
    ) -> None:
        """Draw both, or on the meta device only say their sizes."""
        super().__init__()
        self.config, self._device, self._dtype = config, bases[0].device, bases[0].adapter_dtype
        # of the largest O and the largest I, which need not be one layer's
        large, small = sorted(
            (max(base.shape[side] for base in bases) for side in (0, 1)), reverse=True
        )
        shapes = {
            "randlora_A": (config.r, 1, small),
            "randlora_B": (large, math.ceil(small / config.r), config.r),
        }
        for name, shape in shapes.items():
            empty = torch.empty(shape, device="meta", dtype=self._dtype)
            self.register_buffer(name, empty, persistent=config.save_projection)
        if device is None or device.type != "meta":
            self.complete()

    def complete(self) -> None:
        """Draw what has no memory yet, A before B, each of standard deviation 1."""
        if not self.randlora_A.is_meta:
            return
        # on the CPU wherever they go, so that a seed means the same numbers
        generator = torch.Generator().manual_seed(self.config.projection_prng_key)
        for name in ("randlora_A", "randlora_B"):
            drawn = self._drawn(getattr(self, name).shape, generator)
            setattr(self, name, (drawn / drawn.std()).to(self._device, self._dtype))

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

    def keys(self) -> dict[str, tuple[str, tuple[int, ...]]]:
        """Return PEFT's names, where both are saved."""
        if not self.config.save_projection:
            return {}
        return {name: (name, tuple(tensor.shape)) for name, tensor in self.named_buffers()}


class RandLora(Delta):
    """The update of one layer."""

    on = frozenset({"linear"})
    config: RandLoraConfig

    def __init__(
        self,
        config: RandLoraConfig,
        base: Base,
        *,
        device: torch.device | None = None,
        shared: Shared | None = None,
    ) -> None:
        """Make l [R, N] and g [N, m], and take A and B from `shared`."""
        super().__init__(config, base, device=device)
        self.small, self.large = sorted(base.shape)
        self.lies = base.shape[1] > base.shape[0]
        count = math.ceil(self.small / config.r)
        self.randlora_lambda = self.parameter(config.r, count)
        self.randlora_gamma = self.parameter(count, self.small)
        self.hold(shared or self.share(config, [base], device=device))

    @classmethod
    def share(
        cls, config: RandLoraConfig, bases: Sequence[Base], *, device: torch.device | None = None
    ) -> Shared:
        """Return A and B, large enough for every layer."""
        return Bases(config, bases, device)

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
        assert isinstance(held, Bases)
        weights, g = self.randlora_lambda.to(dtype), self.randlora_gamma.to(dtype)
        a = held.randlora_A[..., : self.small].to(g.device, dtype)
        b = held.randlora_B[: self.large, : len(g)].to(g.device, dtype)
        low = (weights[:, :, None] * a * g).flatten(0, 1)
        # rows by (rank, basis), columns by (basis, rank): what PEFT's files mean
        high = self.config.randlora_alpha / self.config.r * b.flatten(1)
        return (low.T, high.T) if self.lies else (high, low)

    def delta(self, dtype: torch.dtype) -> Tensor:
        """Return the update [O, I]."""
        high, low = self.factors(dtype)
        return high @ low

    def update(self, base: Base, x: Tensor) -> Tensor:
        """Return the update's share; the product of full rank is not made."""
        high, low = self.factors(self.randlora_lambda.dtype)
        x = F.dropout(x.to(low.dtype), self.config.randlora_dropout, self.training)
        return base.up(base.down(x, low), high)

    def keys(self, base: Base) -> dict[str, tuple[str, tuple[int, ...]]]:
        """Return PEFT's names, which repeat A and B under every layer."""
        (held,) = self._held
        shared = {
            name: (f"{Shared.lent_as}.{own}", shape) for name, (own, shape) in held.keys().items()
        }
        return super().keys(base) | shared


METHOD = Method(RandLoraConfig, RandLora)
