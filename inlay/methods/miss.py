"""MiSS: W + D, where column i of D is row i mod r of M (Kang and Yin, arXiv:2409.15371).

M [r, O]: every r-th input shares one column of the update, so that D x = M^T (the sum of x over its
pieces of r).  mini: M is [r, m], repeated along the outputs.  bat: W and D are cut into blocks
[r, r], and each of D is W_block B_a + B_a with one B_a [r, r] for every row a of blocks.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from inlay.core.adapter import Delta, Method
from inlay.core.base import Base
from inlay.core.config import PeftType
from inlay.core.errors import UserError
from inlay.core.limits import Dropout, Rank
from inlay.core.numbers import check_divides
from inlay.core.targeted import TargetedConfig


@dataclasses.dataclass(frozen=True, kw_only=True)
class MissConfig(TargetedConfig):
    """MiSS's settings, under PEFT's names and with PEFT's defaults."""

    method = PeftType.MISS

    r: Rank = 64
    """Rows of M: how many inputs stand side by side before the sharing starts over."""
    miss_dropout: Dropout = 0.0
    """Probability of zeroing an input of the update in training."""
    mini_r: Rank = 1
    """With init_weights "mini": outputs of M before it repeats; must divide the layer's outputs."""
    init_weights: bool | Literal["bat", "mini"] = True
    """The form: True as above, "bat" or "mini"; all start at zero. False: random, for tests."""
    bias: Literal["none", "all", "MiSS_only"] = "none"
    """Which biases train too: none, every one of the model, or those of the adapted layers."""


class Miss(Delta):
    """The update of one layer; in the form "bat" it depends on the weight below."""

    on = frozenset({"linear"})
    drops = "miss_dropout"
    config: MissConfig

    def make(self, base: Base) -> None:
        """Make M, or the blocks; UserError where the layer does not divide into them."""
        config = self.config
        r, (outputs, inputs) = config.r, base.shape
        if r > inputs:
            raise UserError(f"r={r} is more than a layer of {inputs} inputs can share: lower it")
        self._bat, mini = config.init_weights == "bat", config.init_weights == "mini"
        if self._bat:
            check_divides("r", r, outputs, inputs)
        if mini:
            check_divides("mini_r", config.mini_r, outputs)
        self._shape = base.shape
        shape = (outputs // r, r, r) if self._bat else (r, config.mini_r if mini else outputs)
        self.miss_block = self.parameter(*shape)

    def reset(self, base: Base) -> None:
        """Start from no update."""
        super().reset(base)
        if self.config.init_weights is False:
            nn.init.kaiming_uniform_(self.miss_block, a=math.sqrt(5))
        else:
            nn.init.zeros_(self.miss_block)

    def _full(self, dtype: torch.dtype) -> Tensor:
        """Return M [r, O] of the forms that have one."""
        block = self.miss_block.to(dtype)
        return block.repeat(1, self._shape[0] // block.shape[1])

    def delta(self, dtype: torch.dtype) -> Tensor:
        """Return D [O, I]; TypeError in the form "bat", where there is none without the weight."""
        if self._bat:
            raise TypeError("the update of MiSS's form bat depends on the weight it is added to")
        inputs = self._shape[1]
        return self._full(dtype).T.repeat(1, -(-inputs // self.config.r))[:, :inputs]

    def _delta(self, weight: Tensor) -> Tensor:
        if not self._bat:
            return self.delta(weight.dtype)
        block, r = self.miss_block.to(weight.dtype), self.config.r
        pieces = weight.reshape(len(block), r, -1, r)  # [O/r, r, I/r, r]
        changed = torch.einsum("aoci,aij->aocj", pieces, block) + block[:, :, None]
        return changed.reshape(weight.shape)

    def reweight(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """Return W + D, and the trained bias where there is one."""
        own = bias if self.bias is None else self.bias.to(weight.dtype)
        return weight + self._delta(weight), own

    def update(self, base: Base, x: Tensor) -> Tensor:
        """Return D x: but for "bat", from sums of x alone."""
        dtype = self.miss_block.dtype
        x = self.dropped(x)
        if self._bat:
            return base.apply(x, self._delta(base.weight().to(dtype)))
        r = self.config.r
        pieces = F.pad(x, (0, -x.shape[-1] % r)).reshape(*x.shape[:-1], -1, r)
        return base.up(pieces.sum(-2), self._full(dtype).T)


METHOD = Method(MissConfig, Miss)
