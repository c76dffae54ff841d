"""DeLoRA: W + B diag(lambda / (r |a_k| |b_k|)) A diag(|w|)   (Bini et al., arXiv:2503.18225).

A [R, I] with rows a_k, B [O, R] with columns b_k, lambda one number, |w| [I] the norms of W's
columns as they were at the start.  Each rank's part has norm lambda / r, whatever A and B become:
the direction is learned apart from the strength.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn

from inlay.core.adapter import Delta, Method
from inlay.core.base import Base
from inlay.core.config import PeftType
from inlay.core.limits import Dropout, Rank, Scale
from inlay.core.targeted import TargetedConfig

SHORTEST = 1e-4
"""Norm below which a row or column is not lengthened any more; PEFT's."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class DeloraConfig(TargetedConfig):
    """DeLoRA's settings, under PEFT's names and with PEFT's defaults."""

    method = PeftType.DELORA

    r: Rank = 8
    """Rank of the update."""
    delora_lambda: Scale = 15
    """Where the strength of the update starts."""
    module_dropout: Dropout = 0.0
    """Probability of zeroing an input of the update in training."""
    bias: Literal["none", "all", "delora_only"] = "none"
    """Which biases train too: none, every one of the model, or those of the adapted layers."""
    init_weights: bool = True
    """True: A Kaiming-uniform, B zero. False: both random, for tests."""
    rank_pattern: dict[str, Rank] = dataclasses.field(default_factory=dict)
    """Rank of the modules whose path ends in the key (a regular expression), instead of r."""
    lambda_pattern: dict[str, Scale] = dataclasses.field(default_factory=dict)
    """delora_lambda of the modules whose path ends in the key (a regular expression)."""

    by_site: ClassVar[Mapping[str, str]] = {
        "rank_pattern": "r",
        "lambda_pattern": "delora_lambda",
    }


class Delora(Delta):
    """The update of one layer."""

    drops = "module_dropout"
    config: DeloraConfig
    delora_w_norm: Tensor

    def make(self, base: Base) -> None:
        """Make A [R, I], B [O, R], lambda [1] and the norms [I], which do not train."""
        config = self.config
        outputs, inputs = base.shape
        self.delora_A = self.parameter(config.r, inputs)
        self.delora_B = self.parameter(outputs, config.r)
        self.delora_lambda = self.parameter(1)
        self.register_buffer("delora_w_norm", torch.ones_like(self.delora_A[0]))

    def reset(self, base: Base) -> None:
        """Start from no update, and take the norms of the weight's columns."""
        super().reset(base)
        nn.init.kaiming_uniform_(self.delora_A, a=math.sqrt(5))
        if self.config.init_weights:
            nn.init.zeros_(self.delora_B)
        else:
            nn.init.kaiming_uniform_(self.delora_B, a=math.sqrt(5))
        nn.init.constant_(self.delora_lambda, self.config.delora_lambda)
        with torch.no_grad():
            self.delora_w_norm.copy_(base.weight().to(self.delora_A.dtype).norm(dim=0))

    def factors(self, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Return B, scaled rank by rank, and A, scaled by the norms of the weight's columns."""
        a, b = self.delora_A.to(dtype), self.delora_B.to(dtype)
        lengths = a.norm(dim=1).clamp(min=SHORTEST) * b.norm(dim=0).clamp(min=SHORTEST)
        scale = self.delora_lambda.to(dtype) / self.config.r / lengths
        return b * scale, a * self.delora_w_norm.to(dtype)

    def keys(self, base: Base) -> dict[str, tuple[str, tuple[int, ...]]]:
        """Return PEFT's names: the parameters', and that of the norms."""
        norms = ("delora_w_norm", tuple(self.delora_w_norm.shape))
        return {**super().keys(base), "delora_w_norm": norms}


METHOD = Method(DeloraConfig, Delora)
