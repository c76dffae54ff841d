"""Cartridge: softmax(q [Z_k; K]^T) [Z_v; V], a trained cache in the place of a long text's own.

Eyuboglu et al., arXiv:2506.06266.  Z_k, Z_v [V, D] for each of L layers, V virtual tokens, D the
width of a layer's keys. Z starts best from the cache of the text's first V tokens; the first rows,
on which much attention rests whatever the text, do not train.
"""

from __future__ import annotations

import dataclasses
from typing import Any, Self

import torch
from torch import Tensor, nn

from inlay.core.adapter import Method
from inlay.core.base import Base
from inlay.core.config import PeftType
from inlay.core.errors import UserError
from inlay.core.limits import Count
from inlay.methods._past import Past, PastConfig


@dataclasses.dataclass(frozen=True, kw_only=True)
class CartridgeConfig(PastConfig):
    """Cartridge's settings, under PEFT's names and with PEFT's defaults."""

    method = PeftType.CARTRIDGE

    num_frozen_tokens: Count = 1
    """How many virtual tokens, from the first, stay as they start."""

    def filled(self, model: Any) -> Self:
        """Return the configuration with what is unset taken from the model's; checked."""
        whole = super().filled(model)
        if self.num_frozen_tokens > (whole.num_virtual_tokens or 0):
            raise UserError(
                f"num_frozen_tokens={self.num_frozen_tokens} is more than num_virtual_tokens="
                f"{whole.num_virtual_tokens}"
            )
        return whole


class Cartridge(Past):
    """The keys and values of all layers, the first of them frozen."""

    config: CartridgeConfig
    frozen = ("frozen_embedding",)

    def make(self, base: Base) -> None:
        """Make the two parts of the table."""
        super().make(base)
        (count, width), still = self.size(), self.config.num_frozen_tokens
        self.table = None
        self.frozen_embedding = self.parameter(still, width)
        self.trainable_embedding = self.parameter(count - still, width)

    @torch.no_grad()
    def reset(self, base: Base) -> None:
        """Start from random keys and values."""
        del base
        nn.init.normal_(self.frozen_embedding)
        nn.init.normal_(self.trainable_embedding)

    @property
    def prompt_embeddings(self) -> Tensor:
        """The keys and values [V, 2 L D], as a file holds them."""
        return torch.cat([self.frozen_embedding, self.trainable_embedding])

    def fill(self, name: str, value: Tensor) -> None:
        """Take a table, cut in two."""
        del name
        still = self.config.num_frozen_tokens
        self._put("frozen_embedding", value[:still])
        self._put("trainable_embedding", value[still:])


METHOD = Method(CartridgeConfig, Cartridge)
