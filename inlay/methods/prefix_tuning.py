"""Prefix tuning: softmax(q [P_k; K]^T) [P_v; V], trained keys and values before a layer's own.

Li & Liang, ACL 2021, arXiv:2101.00190.  P_k, P_v [N, D] for each of L layers, N virtual tokens, D
the width of a layer's keys. With prefix_projection a network computes all [P_k, P_v] [N, 2 L D] of
N trained vectors: W_2 tanh(W_1 e + b_1) + b_2.
"""

from __future__ import annotations

import dataclasses
from typing import Any, Literal, Self

import torch
from torch import nn

from inlay.core.adapter import Method
from inlay.core.base import Base
from inlay.core.config import PeftType
from inlay.core.limits import Rank
from inlay.methods._computed import Network
from inlay.methods._past import Past, PastConfig


@dataclasses.dataclass(frozen=True, kw_only=True)
class PrefixTuningConfig(PastConfig):
    """Prefix tuning's settings, under PEFT's names and with PEFT's defaults."""

    method = PeftType.PREFIX_TUNING

    prefix_projection: bool = False
    """Whether a network computes the keys and values while they are trained; a file has them."""
    encoder_hidden_size: Rank | None = None
    """Width of the network's hidden layer; unset = token_dim."""
    init_weights: Literal["zero"] | None = None
    """Where keys and values start: at zero, or unset at random."""

    def filled(self, model: Any) -> Self:
        """Return the configuration with what is unset taken from the model's."""
        whole = super().filled(model)
        return whole.replace(encoder_hidden_size=whole.encoder_hidden_size or whole.token_dim)


class PrefixTuning(Past):
    """The keys and values of all layers."""

    config: PrefixTuningConfig

    def network(self) -> Network | None:
        """Return the network of prefix_projection."""
        config = self.config
        if not config.prefix_projection:
            return None
        width, hidden = config.token_dim or 1, config.encoder_hidden_size or 1
        last = self._linear(hidden, self.size()[1])
        return Network(self._inputs(width), self._linear(width, hidden), nn.Tanh(), last)

    @torch.no_grad()
    def reset(self, base: Base) -> None:
        """Start from random keys and values, or zeros."""
        super().reset(base)
        if self.config.init_weights == "zero":
            made = (
                self.parameters() if self.encoder is None else self.encoder.layers[-1].parameters()
            )
            for parameter in made:
                nn.init.zeros_(parameter)


METHOD = Method(PrefixTuningConfig, PrefixTuning)
