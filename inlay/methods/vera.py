"""VeRA: diag(b) B diag(d) A, with A and B drawn once for all layers; only b and d are trained.

Kopiczko et al., ICLR 2024, arXiv:2310.11454.  A [R, I] and B [O, R] are the first I columns and the
first O rows of matrices as wide and as high as the largest adapted layer; d [R], b [O].
"""

from __future__ import annotations

import dataclasses
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
class VeraConfig(TargetedConfig):
    """VeRA's settings, under PEFT's names and with PEFT's defaults."""

    method = PeftType.VERA

    r: int = 256
    """Rank of the update: higher than LoRA's, for a rank costs one number a layer."""
    projection_prng_key: int = 0
    """Seed that A and B are drawn from."""
    save_projection: bool = True
    """Whether a file holds A and B; without, they are drawn from the seed again."""
    vera_dropout: float = 0.0
    """Probability of zeroing an input of the update in training."""
    d_initial: float = 0.1
    """What d starts at."""
    fan_in_fan_out: bool = False
    """PEFT's note that a weight is stored [in, out]; read from the layer, kept for the files."""
    bias: Literal["none", "all", "vera_only"] = "none"
    """Which biases train too: none, every one of the model, or those of the adapted layers."""
    init_weights: bool = True
    """True: b zero and d d_initial. False: b ones and d random, for tests."""

    def __post_init__(self) -> None:
        """Refuse ranks, seeds and starts that cannot be."""
        super().__post_init__()
        check_whole("r", self.r)
        check_whole("projection_prng_key", self.projection_prng_key, least=0, most=2**63 - 1)
        check_dropout("vera_dropout", self.vera_dropout)
        check_finite("d_initial", self.d_initial)
        check_one_of("save_projection", self.save_projection, (True, False))
        check_one_of("bias", self.bias, ("none", "all", "vera_only"))
        check_one_of("init_weights", self.init_weights, (True, False))


class Projections(Shared):
    """A [R, largest I] and B [largest O, R], frozen."""

    vera_A: Tensor
    vera_B: Tensor

    def __init__(
        self, config: VeraConfig, bases: Sequence[Base], device: torch.device | None
    ) -> None:
        """Draw both, or on the meta device only say their sizes."""
        super().__init__()
        self.config, self._device, self._dtype = config, bases[0].device, bases[0].adapter_dtype
        outputs, inputs = (max(base.shape[side] for base in bases) for side in (0, 1))
        for name, shape in (("vera_A", (config.r, inputs)), ("vera_B", (outputs, config.r))):
            empty = torch.empty(shape, device="meta", dtype=self._dtype)
            self.register_buffer(name, empty, persistent=config.save_projection)
        if device is None or device.type != "meta":
            self.complete()

    def complete(self) -> None:
        """Draw what has no memory yet: uniform of variance 2 / I and 2 / R, A before B."""
        if not self.vera_A.is_meta:
            return
        # on the CPU and in float32 wherever they go, so that a seed means the same numbers
        generator = torch.Generator().manual_seed(self.config.projection_prng_key)
        for name in ("vera_A", "vera_B"):
            drawn = torch.empty(getattr(self, name).shape)
            nn.init.kaiming_uniform_(drawn, generator=generator)
            setattr(self, name, drawn.to(self._device, self._dtype))

    def keys(self) -> dict[str, tuple[str, tuple[int, ...]]]:
        """Return PEFT's names, where both are saved."""
        if not self.config.save_projection:
            return {}
        return {name: (name, tuple(tensor.shape)) for name, tensor in self.named_buffers()}


class Vera(Delta):
    """The update of one layer."""

    on = frozenset({"linear"})
    config: VeraConfig

    def __init__(
        self,
        config: VeraConfig,
        base: Base,
        *,
        device: torch.device | None = None,
        shared: Shared | None = None,
    ) -> None:
        """Make b [O] and d [R], and take A and B from `shared`."""
        super().__init__(config, base, device=device)
        self.vera_lambda_b = self.parameter(base.shape[0])
        self.vera_lambda_d = self.parameter(config.r)
        self.inputs = base.shape[1]
        self.hold(shared or self.share(config, [base], device=device))

    @classmethod
    def share(
        cls, config: VeraConfig, bases: Sequence[Base], *, device: torch.device | None = None
    ) -> Shared:
        """Return A and B, large enough for every layer."""
        return Projections(config, bases, device)

    def reset(self, base: Base) -> None:
        """Start from an update of zero."""
        super().reset(base)
        if self.config.init_weights:
            nn.init.zeros_(self.vera_lambda_b)
            nn.init.constant_(self.vera_lambda_d, self.config.d_initial)
        else:
            nn.init.ones_(self.vera_lambda_b)
            nn.init.normal_(self.vera_lambda_d)

    def factors(self, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Return diag(b) B [O, R] and diag(d) A [R, I]."""
        (held,) = self._held
        assert isinstance(held, Projections)
        b, d = self.vera_lambda_b.to(dtype), self.vera_lambda_d.to(dtype)
        low = held.vera_A[:, : self.inputs].to(d.device, dtype)
        high = held.vera_B[: len(b)].to(b.device, dtype)
        return b[:, None] * high, d[:, None] * low

    def delta(self, dtype: torch.dtype) -> Tensor:
        """Return diag(b) B diag(d) A."""
        high, low = self.factors(dtype)
        return high @ low

    def update(self, base: Base, x: Tensor) -> Tensor:
        """Return the update's share, the vectors on the features and not on the matrices."""
        (held,) = self._held
        assert isinstance(held, Projections)
        b, d = self.vera_lambda_b, self.vera_lambda_d
        low = held.vera_A[:, : self.inputs].to(d.device, d.dtype)
        high = held.vera_B[: len(b)].to(b.device, b.dtype)
        x = F.dropout(x.to(d.dtype), self.config.vera_dropout, self.training)
        return b * base.up(d * base.down(x, low), high)


METHOD = Method(VeraConfig, Vera)
