"""QA-LoRA: W + s B A P, P x the sums of G groups of g inputs, times G / g; LoRA's `use_qalora`.

Xu et al., arXiv:2309.14717.  G = I / g groups, A [R, G], B [O, R].  The update is the same for all
inputs of a group, so a weight that is quantized in these groups takes it into its zero points.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from inlay.core.adapter import Delta
from inlay.core.base import Base
from inlay.core.numbers import check_divides
from inlay.methods.lora import LoraConfig, draw, named_as_modules


class QALora(Delta):
    """The update of one layer from its grouped inputs."""

    on = frozenset({"linear"})
    drops = "lora_dropout"
    config: LoraConfig

    def make(self, base: Base) -> None:
        """Make A [R, G] and B [O, R]; UserError where the groups do not divide the inputs."""
        (outputs, inputs), config = base.shape, self.config
        self._group = config.qalora_group_size
        check_divides("qalora_group_size", self._group, inputs)
        self._scale = config.scaling * (inputs // self._group) / self._group
        self.lora_A = self.parameter(config.r, inputs // self._group)
        self.lora_B = self.parameter(outputs, config.r)

    def reset(self, base: Base) -> None:
        """Make A random and B zero."""
        super().reset(base)
        draw(self.config, self.lora_A, self.lora_B)

    def factors(self, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Return s G / g B, and A with each column as often as its group has inputs."""
        wide = self.lora_A.to(dtype).repeat_interleave(self._group, dim=1)
        return self._scale * self.lora_B.to(dtype), wide

    def update(self, base: Base, x: Any) -> Tensor:
        """Return the update from the groups' sums, which are fewer than the inputs."""
        del base
        x = self.dropped(x)
        sums = x.reshape(*x.shape[:-1], -1, self._group).sum(-1)
        return F.linear(F.linear(sums, self.lora_A), self.lora_B) * self._scale

    def keys(self, base: Base) -> dict[str, tuple[str, tuple[int, ...]]]:
        """Return PEFT's names."""
        return named_as_modules(super().keys(base))
