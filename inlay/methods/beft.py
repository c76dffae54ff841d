"""BEFT: b -> b + v, a vector v [O] added to what a layer puts out   (arXiv:2509.15974).

The usual targets are the value projections alone.  A layer without a bias has one once merged.
"""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar

from torch import Tensor, nn

from inlay.core.adapter import Method, Reweight
from inlay.core.base import Base
from inlay.core.config import PeftType
from inlay.core.targeted import BY_LAYER, TargetedConfig


@dataclasses.dataclass(frozen=True, kw_only=True)
class BeftConfig(TargetedConfig):
    """BEFT's settings, under PEFT's names and with PEFT's defaults."""

    method = PeftType.BEFT

    init_weights: bool = True
    """True: the vectors start at 0. False: random, for tests."""

    everywhere: ClassVar[bool] = False
    unwritten = BY_LAYER


class Beft(Reweight):
    """The vector added to one layer's outputs."""

    on = frozenset({"linear", "conv"})
    config: BeftConfig

    def make(self, base: Base) -> None:
        """Make v, in the shape [1, O] it has in PEFT's files."""
        self.beft_bias = self.parameter(1, base.shape[0])

    def reset(self, base: Base) -> None:
        """Start from nothing added."""
        del base
        nn.init.normal_(self.beft_bias, std=0.0 if self.config.init_weights else 1.0)

    def reweight(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """Return the weight as it is, and b + v."""
        added = self.beft_bias[0].to(weight.dtype)
        return weight, added if bias is None else bias + added

    def rebias(self, base: Base) -> Tensor | None:
        """Return b + v."""
        bias = base.bias()
        return self.beft_bias[0] if bias is None else bias + self.beft_bias[0]

    def forward(self, base: Base, x: Any, *args: Any, **kwargs: Any) -> Any:
        """Return base(x) + v."""
        below = base(x, *args, **kwargs)
        return (below + base.spread(self.beft_bias[0])).to(below.dtype)


METHOD = Method(BeftConfig, Beft)
