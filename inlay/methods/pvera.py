"""PVeRA: VeRA whose features between the two random matrices are drawn from a normal in training.

arXiv:2512.07703: h = diag(d) A x holds mean and log variance [R each] of z, and
diag(b) B z is added; out of training z is its mean, which is VeRA with the first half of d and A.
A [2R, I] and B [O, R] are drawn once for all layers as VeRA's are; d [2R], b [O].
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from inlay.core.adapter import Delta, Method, Shared
from inlay.core.base import Base
from inlay.core.config import PeftType
from inlay.core.numbers import check_dropout, check_finite, check_one_of, check_whole
from inlay.core.targeted import TargetedConfig


@dataclasses.dataclass(frozen=True, kw_only=True)
class PveraConfig(TargetedConfig):
    """PVeRA's settings, under PEFT's names and with PEFT's defaults."""

    method = PeftType.PVERA
    not_yet: ClassVar[dict[str, str]] = {
        "sample_at_inference": "out of training the mean is computed, which is what merges",
        "generator_seed": "the draws come from torch's own generator, so from the run's seed",
    }

    r: int = 256
    """Rank of the update: higher than LoRA's, for a rank costs one number a layer."""
    projection_prng_key: int = 0
    """Seed that A and B are drawn from."""
    save_projection: bool = True
    """Whether a file holds A and B; without, they are drawn from the seed again."""
    pvera_dropout: float = 0.0
    """Probability of zeroing an input of the update in training."""
    d_initial: float = 0.1
    """What d starts at."""
    fan_in_fan_out: bool = False
    """PEFT's note that a weight is stored [in, out]; read from the layer, kept for the files."""
    bias: Literal["none", "all", "pvera_only"] = "none"
    """Which biases train too: none, every one of the model, or those of the adapted layers."""
    sample_at_inference: bool = False
    """Whether to draw out of training too; only False, for no weight can say it."""
    generator_seed: int | None = None
    """Seed of the draws in PEFT; only None: they come from torch's own generator."""
    init_weights: bool = True
    """True: b zero and d d_initial. False: b ones and d random, for tests."""

    def __post_init__(self) -> None:
        """Refuse ranks, seeds and starts that cannot be."""
        super().__post_init__()
        check_whole("r", self.r)
        check_whole("projection_prng_key", self.projection_prng_key, least=0, most=2**63 - 1)
        check_dropout("pvera_dropout", self.pvera_dropout)
        check_finite("d_initial", self.d_initial)
        check_one_of("save_projection", self.save_projection, (True, False))
        check_one_of("bias", self.bias, ("none", "all", "pvera_only"))
        check_one_of("init_weights", self.init_weights, (True, False))


class Projections(Shared):
    """A [2R, largest I] and B [largest O, R], frozen."""

    pvera_A: Tensor
    pvera_B: Tensor

    def __init__(
        self, config: PveraConfig, bases: Sequence[Base], device: torch.device | None
    ) -> None:
        """Draw both, or on the meta device only say their sizes."""
        super().__init__()
        self.config, self._device, self._dtype = config, bases[0].device, bases[0].adapter_dtype
        outputs, inputs = (max(base.shape[side] for base in bases) for side in (0, 1))
        for name, shape in (("pvera_A", (2 * config.r, inputs)), ("pvera_B", (outputs, config.r))):
            empty = torch.empty(shape, device="meta", dtype=self._dtype)
            self.register_buffer(name, empty, persistent=config.save_projection)
        if device is None or device.type != "meta":
            self.complete()

    def complete(self) -> None:
        """Draw what has no memory yet: uniform of variance 2 / I and 2 / R, A before B."""
        if not self.pvera_A.is_meta:
            return
        # on the CPU and in float32 wherever they go, so that a seed means the same numbers
        generator = torch.Generator().manual_seed(self.config.projection_prng_key)
        for name in ("pvera_A", "pvera_B"):
            drawn = torch.empty(getattr(self, name).shape)
            nn.init.kaiming_uniform_(drawn, generator=generator)
            setattr(self, name, drawn.to(self._device, self._dtype))

    def keys(self) -> dict[str, tuple[str, tuple[int, ...]]]:
        """Return PEFT's names, where both are saved."""
        if not self.config.save_projection:
            return {}
        return {name: (name, tuple(tensor.shape)) for name, tensor in self.named_buffers()}


class Pvera(Delta):
    """The update of one layer."""

    on = frozenset({"linear"})
    config: PveraConfig

    def __init__(
        self,
        config: PveraConfig,
        base: Base,
        *,
        device: torch.device | None = None,
        shared: Shared | None = None,
    ) -> None:
        """Make b [O] and d [2R], and take A and B from `shared`."""
        super().__init__(config, base, device=device)
        self.pvera_lambda_b = self.parameter(base.shape[0])
        self.pvera_lambda_d = self.parameter(2 * config.r)
        self.inputs = base.shape[1]
        self.hold(shared or self.share(config, [base], device=device))

    @classmethod
    def share(
        cls, config: PveraConfig, bases: Sequence[Base], *, device: torch.device | None = None
    ) -> Shared:
        """Return A and B, large enough for every layer."""
        return Projections(config, bases, device)

    def reset(self, base: Base) -> None:
        """Start from an update of zero."""
        super().reset(base)
        if self.config.init_weights:
            nn.init.zeros_(self.pvera_lambda_b)
            nn.init.constant_(self.pvera_lambda_d, self.config.d_initial)
        else:
            nn.init.ones_(self.pvera_lambda_b)
            nn.init.normal_(self.pvera_lambda_d)

    def factors(self, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Return diag(b) B [O, R] and the half of diag(d) A [R, I] that is the mean."""
        (held,) = self._held
        assert isinstance(held, Projections)
        r = self.config.r
        b, d = self.pvera_lambda_b.to(dtype), self.pvera_lambda_d[:r].to(dtype)
        low = held.pvera_A[:r, : self.inputs].to(d.device, dtype)
        high = held.pvera_B[: len(b)].to(b.device, dtype)
        return b[:, None] * high, d[:, None] * low

    def delta(self, dtype: torch.dtype) -> Tensor:
        """Return the update [O, I] of the mean."""
        high, low = self.factors(dtype)
        return high @ low

    def update(self, base: Base, x: Tensor) -> Tensor:
        """Return the update's share: drawn in training, else that of the mean."""
        (held,) = self._held
        assert isinstance(held, Projections)
        b, d, r = self.pvera_lambda_b, self.pvera_lambda_d, self.config.r
        rows = 2 * r if self.training else r
        low = held.pvera_A[:rows, : self.inputs].to(d.device, d.dtype)
        high = held.pvera_B[: len(b)].to(b.device, b.dtype)
        x = F.dropout(x.to(d.dtype), self.config.pvera_dropout, self.training)
        h = d[:rows] * base.down(x, low)
        if self.training:
            mean, log_variance = h.chunk(2, dim=-1)
            h = mean + torch.randn_like(mean) * (log_variance / 2).exp()
        return b * base.up(h, high)


METHOD = Method(PveraConfig, Pvera)
