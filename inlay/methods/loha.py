"""LoHa: W + s (B_1 A_1) * (B_2 A_2), the products multiplied entry by entry, s = alpha / R.

A [R, I], B [O, R]: the update may have rank R^2.  Of a convolution the kernel may be factored apart
(use_effective_conv2d): each product is then T [R, R, k, k] with B [R, O] on its first side and
A [R, C] on its second.  Hyeon-Woo et al., arXiv:2108.06098, propositions 1 and 3; Yeh et al.,
arXiv:2309.14859.
"""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor, nn

from inlay.core.adapter import Method
from inlay.core.base import Base
from inlay.core.config import PeftType
from inlay.methods._lycoris import Lycoris, LycorisConfig, around, draw


@dataclasses.dataclass(frozen=True, kw_only=True)
class LoHaConfig(LycorisConfig):
    """LoHa's settings, under PEFT's names and with PEFT's defaults."""

    method = PeftType.LOHA

    init_weights: bool = True
    """True: A_2 zero, the rest Kaiming-uniform. False: all random, for tests."""


class LoHa(Lycoris):
    """The update of one layer. PEFT's names: w1_a is B_1, w1_b is A_1."""

    makes_up = True
    config: LoHaConfig

    def make(self, base: Base) -> None:
        """Make both pairs of factors, and their cores where a kernel is factored apart."""
        r = self.config.r
        outputs, channels, _, core = self.cut(base)
        left, right = ((r, outputs), (r, channels)) if core else ((outputs, r), (r, base.shape[1]))
        self._shape = base.shape
        self.hada_w1_a, self.hada_w1_b = self.parameter(*left), self.parameter(*right)
        self.hada_w2_a, self.hada_w2_b = self.parameter(*left), self.parameter(*right)
        self.hada_t1 = self.parameter(r, r, *core) if core else None
        self.hada_t2 = self.parameter(r, r, *core) if core else None

    def reset(self, base: Base) -> None:
        """Draw all but one factor, which is zero: an untrained update changes nothing."""
        super().reset(base)
        draw(*self.parameters())
        if self.config.init_weights:
            nn.init.zeros_(self.hada_w2_b)

    def delta(self, dtype: torch.dtype) -> Tensor:
        """Return the update [O, I]."""
        one = _side(self.hada_t1, self.hada_w1_a, self.hada_w1_b, dtype)
        two = _side(self.hada_t2, self.hada_w2_a, self.hada_w2_b, dtype)
        return self.config.scaling * (one * two).reshape(self._shape)


def _side(core: Tensor | None, b: Tensor, a: Tensor, dtype: torch.dtype) -> Tensor:
    if core is None:
        return b.to(dtype) @ a.to(dtype)
    return around(core.to(dtype), b.to(dtype), a.to(dtype))


METHOD = Method(LoHaConfig, LoHa)
