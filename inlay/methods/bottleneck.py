"""Bottleneck adapters: y + U f(D z + d) + u, a small network beside or after a part of each block.

houlsby    z = y, after the attention and after the MLP       Houlsby et al., arXiv:1902.00751
pfeiffer   z = y, after the MLP alone                         Pfeiffer et al., arXiv:2005.00052
parallel   z = x, beside the MLP, its output times `scaling`  He et al., arXiv:2110.04366

x [.., I] goes into the layer or block, y [.., O] comes out; D [R, O] (parallel: [R, I]), U [O, R].
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from inlay.core.adapter import Method, Wrap
from inlay.core.base import Base, Kind
from inlay.core.config import PeftType
from inlay.core.errors import UserError
from inlay.core.limits import Scale
from inlay.core.numbers import check_one_of
from inlay.core.targeted import TargetedConfig

FUNCTIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": F.relu,
    "gelu": F.gelu,
    "silu": F.silu,
    "tanh": torch.tanh,
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class BottleneckConfig(TargetedConfig):
    """Settings of bottleneck adapters; PEFT has no such method, so the files are inlay's own."""

    method = PeftType.BOTTLENECK
    everywhere = False

    style: Literal["houlsby", "pfeiffer", "parallel"] = "pfeiffer"
    """Where adapters go without target_modules, and what they read: a part's output (houlsby: of
    attention and MLP; pfeiffer: of the MLP), or the MLP's input (parallel)."""
    reduction_factor: float = 16
    """The output's width over the adapter's inner width."""
    non_linearity: Literal["relu", "gelu", "silu", "tanh"] = "relu"
    """The function between the two matrices."""
    scaling: Scale = 1.0
    """What the adapter's output is multiplied by."""

    def __post_init__(self) -> None:
        """Check the values; UserError names the limit."""
        super().__post_init__()
        check_one_of("non_linearity", self.non_linearity, FUNCTIONS)
        if not (math.isfinite(self.reduction_factor) and self.reduction_factor > 0):
            raise UserError(
                f"reduction_factor={self.reduction_factor} must be a number above 0; 16 is usual"
            )

    @property
    def usual(self) -> str:
        """Each style has sites of its own."""
        return f"{self.method} {self.style}"


class Bottleneck(Wrap):
    """The network at one layer, or at a block whose first output it changes."""

    on: ClassVar[frozenset[Kind]] = frozenset({"linear", "module"})
    config: BottleneckConfig

    def make(self, base: Base) -> None:
        """Make D, d, U and u."""
        out_features, in_features = base.features
        rank = max(1, int(out_features / self.config.reduction_factor))
        self.down = self.parameter(rank, in_features if self._parallel else out_features)
        self.down_bias = self.parameter(rank)
        self.up = self.parameter(out_features, rank)
        self.up_bias = self.parameter(out_features)

    @property
    def _parallel(self) -> bool:
        return self.config.style == "parallel"

    def reset(self, base: Base) -> None:
        """Start D as PyTorch does a linear layer, and U from zero, so that nothing is added."""
        nn.init.kaiming_uniform_(self.down, a=math.sqrt(5))
        for zero in (self.down_bias, self.up, self.up_bias):
            nn.init.zeros_(zero)

    def forward(self, base: Base, x: Any, *args: Any, **kwargs: Any) -> Any:
        """Return what the base does with the network's output added, in the base's dtype."""
        out = base(x, *args, **kwargs)
        # blocks of attention return their weights too
        first = out[0] if isinstance(out, tuple) else out
        first = (first + self._added(x if self._parallel else first)).to(first.dtype)
        return (first, *out[1:]) if isinstance(out, tuple) else first

    def _added(self, z: Tensor) -> Tensor:
        function = FUNCTIONS[self.config.non_linearity]
        inner = function(F.linear(z.to(self.down.dtype), self.down, self.down_bias))
        return self.config.scaling * F.linear(inner, self.up, self.up_bias)

    def keys(self, base: Base) -> dict[str, tuple[str, tuple[int, ...]]]:
        """Return the parameters' names, as two linear layers have them."""
        del base
        names = {
            "bottleneck_down.weight": "down",
            "bottleneck_down.bias": "down_bias",
            "bottleneck_up.weight": "up",
            "bottleneck_up.bias": "up_bias",
        }
        return {key: (name, tuple(self.get_parameter(name).shape)) for key, name in names.items()}


METHOD = Method(BottleneckConfig, Bottleneck)
