"""RoAd: R W and R b; R turns pairs of outputs and scales them (Liao and Monz, arXiv:2409.00119).

The O outputs come in groups of g; output i of a group's first half is paired with output i of its
second half:

    y_i       = c_i x_i - s_i x_j            j = i + g/2, c = alpha cos(theta), s = alpha sin(theta)
    y_j       = c_j x_j + s_j x_i

road_1: a pair shares one alpha and theta [O/2]. road_2: each output has its own [O]. road_4: so
have c and s [2 O], in each group g of c and then g of s.
"""

from __future__ import annotations

import dataclasses
from typing import Any, Literal

import torch
from torch import Tensor, nn

from inlay.core.adapter import Method, Reweight
from inlay.core.base import Base
from inlay.core.config import PeftType
from inlay.core.errors import UserError
from inlay.core.numbers import check_divides, check_whole
from inlay.core.targeted import BY_LAYER, TargetedConfig

PER_PAIR = {"road_1": 1, "road_2": 2, "road_4": 4}
"""Angles that each pair of outputs has of its own."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class RoadConfig(TargetedConfig):
    """RoAd's settings, under PEFT's names and with PEFT's defaults."""

    method = PeftType.ROAD

    variant: Literal["road_1", "road_2", "road_4"] = "road_1"
    """Angles and scales for each pair of outputs: 1, 2 or 4."""
    group_size: int = 64
    """Outputs whose two halves are paired; even, and must divide the layer's outputs."""
    init_weights: bool = True
    """True: no turn, and scale 1. False: random, for tests."""

    unwritten = BY_LAYER

    def __post_init__(self) -> None:
        """Refuse variants and groups that cannot be."""
        super().__post_init__()
        check_whole("group_size", self.group_size, least=2)
        if self.group_size % 2:
            raise UserError(f"group_size={self.group_size} must be even: its halves are paired")


class Road(Reweight):
    """The turned and scaled outputs of one layer."""

    on = frozenset({"linear"})
    config: RoadConfig

    def make(self, base: Base) -> None:
        """Make the angles and scales; UserError where the outputs do not divide into groups."""
        config = self.config
        outputs = base.shape[0]
        check_divides("group_size", config.group_size, outputs, step=2)
        size = PER_PAIR[config.variant] * outputs // 2
        self.road_theta, self.road_alpha = self.parameter(size), self.parameter(size)

    def reset(self, base: Base) -> None:
        """Start from no turn, and scale 1."""
        del base
        random = 0.0 if self.config.init_weights else 0.5
        nn.init.normal_(self.road_theta, std=random)
        nn.init.normal_(self.road_alpha, mean=1.0, std=random)

    def _turned(self, y: Tensor) -> Tensor:
        """Return R y for y [..., O]."""
        halves = 2, self.config.group_size // 2
        # [groups, c or s, half, place], those that a variant shares broadcast
        shared = {
            "road_1": (-1, 1, 1, halves[1]),
            "road_2": (-1, 1, *halves),
            "road_4": (-1, 2, *halves),
        }[self.config.variant]
        theta, alpha = (p.to(y.dtype).reshape(shared) for p in (self.road_theta, self.road_alpha))
        c, s = (alpha * theta.cos())[:, 0], (alpha * theta.sin())[:, -1]
        pairs = y.reshape(*y.shape[:-1], -1, *halves)
        other = torch.stack((-pairs[..., 1, :], pairs[..., 0, :]), -2)
        return (c * pairs + s * other).reshape(y.shape)

    def reweight(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """Return R W and R b."""
        return self._turned(weight.T).T, None if bias is None else self._turned(bias)

    def rebias(self, base: Base) -> Tensor | None:
        """Return R b."""
        bias = base.bias()
        return None if bias is None else self._turned(bias)

    def forward(self, base: Base, x: Any, *args: Any, **kwargs: Any) -> Any:
        """Return R base(x), which needs no weight."""
        below = base(x, *args, **kwargs)
        wide = torch.promote_types(below.dtype, self.road_theta.dtype)
        return self._turned(below.to(wide)).to(below.dtype)


METHOD = Method(RoadConfig, Road)
