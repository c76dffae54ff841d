"""VeRA: W + diag(b) B diag(d) A, with A and B drawn once for all layers; only b and d are trained.

Kopiczko et al., ICLR 2024, arXiv:2310.11454.  A [R, I] and B [O, R] are the first I columns and the
first O rows of matrices as wide and as high as the largest adapted layer; d [R], b [O].
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from inlay.core.adapter import Delta, Method
from inlay.core.base import Base
from inlay.core.config import PeftType
from inlay.core.limits import Dropout, Rank, Scale, Seed
from inlay.core.targeted import TargetedConfig
from inlay.methods._drawn import Drawn, largest


@dataclasses.dataclass(frozen=True, kw_only=True)
class VeraConfig(TargetedConfig):
    """VeRA's settings, under PEFT's names and with PEFT's defaults."""

    method = PeftType.VERA
    unwritten = ("exclude_modules",)

    r: Rank = 256
    """Rank of the update: higher than LoRA's, for a rank costs one number a layer."""
    projection_prng_key: Seed = 0
    """Seed that A and B are drawn from."""
    save_projection: bool = True
    """Whether a file holds A and B; without, they are drawn from the seed again."""
    vera_dropout: Dropout = 0.0
    """Probability of zeroing an input of the update in training."""
    d_initial: Scale = 0.1
    """What d starts at."""
    fan_in_fan_out: bool = False
    """PEFT's note that a weight is stored [in, out]; read from the layer, kept for the files."""
    bias: Literal["none", "all", "vera_only"] = "none"
    """Which biases train too: none, every one of the model, or those of the adapted layers."""
    init_weights: bool = True
    """True: b zero and d d_initial. False: b ones and d random, for tests."""


class Vera(Delta):
    """The update of one layer."""

    on = frozenset({"linear"})
    config: Any
    drops = "vera_dropout"
    prefix: ClassVar[str] = "vera"
    """What PEFT's names of its settings and tensors begin with."""
    rows: ClassVar[int] = 1
    """Rows of A, and entries of d, for each rank."""

    @classmethod
    def share(
        cls, config: Any, bases: Sequence[Base], *, device: torch.device | None = None
    ) -> Drawn:
        """Return A and B, large enough for every layer."""
        outputs, inputs = largest(bases)
        shapes = {
            f"{cls.prefix}_A": (cls.rows * config.r, inputs),
            f"{cls.prefix}_B": (outputs, config.r),
        }
        return Drawn(config, bases, device, **shapes)

    def make(self, base: Base) -> None:
        """Make b [O] and d [R]."""
        outputs, self.inputs = base.shape
        self.register_parameter(f"{self.prefix}_lambda_b", self.parameter(outputs))
        d = self.parameter(self.rows * self.config.r)
        self.register_parameter(f"{self.prefix}_lambda_d", d)

    def reset(self, base: Base) -> None:
        """Start from an update of zero."""
        super().reset(base)
        b, d = self.vectors()
        if self.config.init_weights:
            nn.init.zeros_(b)
            nn.init.constant_(d, self.config.d_initial)
        else:
            nn.init.ones_(b)
            nn.init.normal_(d)

    def vectors(self) -> tuple[nn.Parameter, nn.Parameter]:
        """Return b and d."""
        b, d = (self.get_parameter(f"{self.prefix}_lambda_{name}") for name in "bd")
        return b, d

    def matrices(self, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Return B [O, R] and A [R, I], this layer's part of them."""
        (held,) = self._held
        b, _ = self.vectors()
        high, low = (held.get_buffer(f"{self.prefix}_{name}") for name in "BA")
        return high[: len(b)].to(b.device, dtype), low[:, : self.inputs].to(b.device, dtype)

    def factors(self, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Return diag(b) B [O, R] and diag(d) A [R, I]: what is computed out of training."""
        (high, low), (b, d), r = self.matrices(dtype), self.vectors(), self.config.r
        return b.to(dtype)[:, None] * high, d[:r].to(dtype)[:, None] * low[:r]

    def middle(self, h: Tensor) -> Tensor:
        """Return what B is applied to, of h = diag(d) A x."""
        return h

    def update(self, base: Base, x: Tensor) -> Tensor:
        """Return the update's share, the vectors on the features and not on the matrices."""
        b, d = self.vectors()
        high, low = self.matrices(b.dtype)
        return b * base.up(self.middle(d * base.down(self.dropped(x), low)), high)


METHOD = Method(VeraConfig, Vera)
