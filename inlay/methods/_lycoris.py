"""What LoHa and LoKr have in common: settings, a convolution's kernel, and what training drops."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from inlay.core.adapter import Delta
from inlay.core.base import Base
from inlay.core.limits import Dropout, Rank, Scale
from inlay.core.targeted import TargetedConfig


@dataclasses.dataclass(frozen=True, kw_only=True)
class LycorisConfig(TargetedConfig):
    """The settings, under PEFT's names and with PEFT's defaults."""

    r: Rank = 8
    """Rank of the factors."""
    alpha: Scale = 8
    """Numerator of the scale: the update is multiplied by alpha / r."""
    rank_dropout: Dropout = 0.0
    """Probability of leaving an output out of the update in training."""
    module_dropout: Dropout = 0.0
    """Probability of leaving the whole update of a layer out in training."""
    use_effective_conv2d: bool = False
    """Factor a convolution's channels apart from the places of its kernel, where there are some."""
    rank_pattern: dict[str, Rank] = dataclasses.field(default_factory=dict)
    """Rank of the modules whose path ends in the key (a regular expression), instead of r."""
    alpha_pattern: dict[str, Scale] = dataclasses.field(default_factory=dict)
    """alpha of the modules whose path ends in the key (a regular expression)."""

    by_site: ClassVar[Mapping[str, str]] = {"rank_pattern": "r", "alpha_pattern": "alpha"}

    @property
    def scaling(self) -> float:
        """The factor of the update."""
        return self.alpha / self.r


class Lycoris(Delta):
    """An update of which training leaves out some outputs, or at times all."""

    on = frozenset({"linear", "conv"})
    config: Any

    def product(self, base: Base, x: Tensor) -> Tensor:
        """Return the update's share with nothing left out."""
        return super().update(base, x)

    def update(self, base: Base, x: Tensor) -> Tensor:
        """Return the update's share, in training without the outputs that are left out."""
        out = self.product(base, x)
        config = self.config
        if not self.training or not (config.rank_dropout or config.module_dropout):
            return out
        kept = (torch.rand(base.shape[0], device=out.device) >= config.rank_dropout).to(out.dtype)
        if config.rank_dropout and self.makes_up:
            kept = kept / kept.mean().clamp(min=1 / len(kept))  # there may be none to make up
        present = torch.rand(1, device=out.device) >= config.module_dropout
        return out * base.spread(kept * present)

    @property
    def makes_up(self) -> bool:
        """Whether what is kept is enlarged for what rank_dropout leaves out."""
        raise NotImplementedError

    def cut(self, base: Base) -> tuple[int, int, tuple[int, ...], tuple[int, ...]]:
        """Return outputs, inputs or channels, the kernel's places, and those of a core R x R.

        A linear layer has no kernel. A core is there where a kernel is factored apart from the
        channels; in PEFT's files it has two dimensions of places even where the kernel has one.
        """
        (_, channels, *kernel), (outputs, *_) = base.file_shapes(1)
        apart = self.config.use_effective_conv2d and math.prod(kernel) > 1
        core = (*kernel, *[1] * (2 - len(kernel))) if apart else ()
        return outputs, channels, tuple(kernel), core


def around(core: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """Return [O, C, *k]: the core [R, R, *k] between A [R, O] and B [R, C]."""
    return torch.einsum("ij...,io,jc->oc...", core, a, b)


def draw(*parameters: nn.Parameter | None) -> None:
    """Draw each as the weight of a linear layer of its own inputs is drawn."""
    for parameter in parameters:
        if parameter is not None:
            nn.init.kaiming_uniform_(parameter, a=math.sqrt(5))
