"""LN tuning: w, b -> w', b', the vectors of a norm trained in full (Zhao et al., arXiv:2312.11420).

w and b are [O], the features that the norm scales; b only where the norm has one.
"""

from __future__ import annotations

import dataclasses
from typing import ClassVar

import torch
from torch import Tensor

from inlay.core.adapter import Method, Reweight
from inlay.core.base import Base
from inlay.core.config import PeftType
from inlay.core.targeted import TargetedConfig


@dataclasses.dataclass(frozen=True, kw_only=True)
class LNTuningConfig(TargetedConfig):
    """LN tuning's settings, under PEFT's names and with PEFT's defaults."""

    method = PeftType.LN_TUNING

    everywhere: ClassVar[bool] = False
    unwritten: ClassVar[tuple[str, ...]] = ("layers_to_transform", "layers_pattern")


class LNTuning(Reweight):
    """The trained vectors of one norm."""

    on = frozenset({"norm"})
    bias: torch.nn.Parameter | None

    def make(self, base: Base) -> None:
        """Make w [O], and b [O] where the norm has one."""
        self.weight = self.parameter(base.shape[0])
        self.bias = None if base.bias() is None else self.parameter(base.shape[0])

    def reset(self, base: Base) -> None:
        """Start from the norm's own vectors."""
        below = base.bias()
        with torch.no_grad():
            self.weight.copy_(base.weight())
            if self.bias is not None and below is not None:
                self.bias.copy_(below)

    def reweight(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """Return w' and b' in place of both."""
        del bias
        return self.weight.to(weight.dtype), self.rebias(None, weight.dtype)

    def rebias(self, base: Base | None, dtype: torch.dtype | None = None) -> Tensor | None:
        """Return b', or None."""
        del base
        return None if self.bias is None else self.bias.to(dtype or self.bias.dtype)

    def keys(self, base: Base) -> dict[str, tuple[str, tuple[int, ...]]]:
        """Return PEFT's keys: it keeps a copy of the norm."""
        return {f"ln_tuning_layers.{key}": held for key, held in super().keys(base).items()}


METHOD = Method(LNTuningConfig, LNTuning)
