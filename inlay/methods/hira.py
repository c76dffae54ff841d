"""HiRA: W + W * (B A), the product taken entry by entry.   A [R, I], B [O, R].

Huang et al., ICLR 2025, openreview.net/forum?id=TwJrTz9cRS: W has full rank, so the update may have
it too, from as few parameters as LoRA's.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any, ClassVar, Literal

import torch.nn.functional as F
from torch import Tensor, nn

from inlay.core.adapter import Method, Reweight
from inlay.core.base import Base
from inlay.core.config import PeftType
from inlay.core.limits import Dropout, Rank
from inlay.core.targeted import TargetedConfig


@dataclasses.dataclass(frozen=True, kw_only=True)
class HiraConfig(TargetedConfig):
    """HiRA's settings, under PEFT's names and with PEFT's defaults."""

    method = PeftType.HIRA

    r: Rank = 32
    """Rank of B A."""
    hira_dropout: Dropout = 0.0
    """Probability of zeroing an input of the update in training."""
    fan_in_fan_out: bool = False
    """PEFT's note that a weight is stored [in, out]; read from the layer, kept for the files."""
    init_weights: bool | Literal["gaussian"] = True
    """True: A Kaiming-uniform, B zero. "gaussian": A normal with deviation 1/r, B zero. False: both
    random, for tests."""
    rank_pattern: dict[str, Rank] = dataclasses.field(default_factory=dict)
    """Rank of the modules whose path ends in the key (a regular expression), instead of r."""

    by_site: ClassVar[Mapping[str, str]] = {"rank_pattern": "r"}


class Hira(Reweight):
    """The factor 1 + B A on each entry of one layer's weight."""

    keeps_bias = True
    on = frozenset({"linear", "conv", "embedding"})
    config: HiraConfig

    def make(self, base: Base) -> None:
        """Make A [R, I] and B [O, R]."""
        config = self.config
        self.hira_A = self.parameter(config.r, base.shape[1])
        self.hira_B = self.parameter(base.shape[0], config.r)

    def reset(self, base: Base) -> None:
        """Make one factor random and the other zero (on an embedding A, the side of the ids)."""
        init, (a, b) = self.config.init_weights, (self.hira_A, self.hira_B)
        if init is False:
            nn.init.normal_(a)
            nn.init.normal_(b)
        elif base.kind == "embedding":
            nn.init.zeros_(a)
            nn.init.normal_(b)
        else:
            if init == "gaussian":
                nn.init.normal_(a, std=1 / self.config.r)
            else:
                nn.init.kaiming_uniform_(a, a=math.sqrt(5))
            nn.init.zeros_(b)

    def _delta(self, weight: Tensor) -> Tensor:
        return weight * (self.hira_B.to(weight.dtype) @ self.hira_A.to(weight.dtype))

    def reweight(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """Return W + W * (B A), and the bias as it is."""
        return weight + self._delta(weight), bias

    def forward(self, base: Base, x: Any, *args: Any, **kwargs: Any) -> Any:
        """Return base(x) and the update's share; of an embedding only the rows that are asked."""
        below = base(x, *args, **kwargs)
        dtype = self.hira_A.dtype
        if base.kind == "embedding":
            low = F.embedding(x, self.hira_A.T) @ self.hira_B.T
            return (below + below * low).to(below.dtype)
        x = F.dropout(x.to(dtype), self.config.hira_dropout, self.training)
        return (below + base.apply(x, self._delta(base.weight().to(dtype)))).to(below.dtype)

    def keys(self, base: Base) -> dict[str, tuple[str, tuple[int, ...]]]:
        """Return PEFT's names; a convolution's factors are convolutions in the file."""
        prefix = "hira_embedding_" if base.kind == "embedding" else "hira_"
        a, b = base.file_shapes(self.config.r)
        return {f"{prefix}A": ("hira_A", a), f"{prefix}B": ("hira_B", b)}


METHOD = Method(HiraConfig, Hira)
