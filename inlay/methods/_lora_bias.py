"""LoRA with a bias of its own: W + s B A, b + s c; LoRA's `lora_bias`.   c [O].

A layer that has no bias has one once this is merged into it.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from inlay.core.adapter import Reweight
from inlay.core.base import Base
from inlay.methods.lora import Lora, LoraConfig


class BiasedLora(Reweight):
    """The LoRA of one layer, and c."""

    on = frozenset({"linear", "conv"})
    config: LoraConfig

    def make(self, base: Base) -> None:
        """Make the LoRA and c [O]."""
        self.lora = Lora(self.config, base, device=self._device)
        self.offset = self.parameter(base.shape[0])

    def reset(self, base: Base) -> None:
        """Start the LoRA, and c at zero."""
        self.lora.reset(base)
        nn.init.zeros_(self.offset)
        if not self.config.init_lora_weights:
            nn.init.normal_(self.offset, std=0.02)

    def reweight(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """Return W + s B A and b + s c, with b the LoRA's where it trains one."""
        weight, bias = self.lora.reweight(weight, bias)
        own = self.config.scaling * self.offset.to(weight.dtype)
        return weight, own if bias is None else bias + own

    def rebias(self, base: Base) -> Tensor | None:
        """Return b + s c."""
        below, own = self.lora.rebias(base), self.config.scaling * self.offset
        return own if below is None else below + own

    def forward(self, base: Base, x: Any, *args: Any, **kwargs: Any) -> Any:
        """Return what the LoRA computes, and s c."""
        out = self.lora(base, x, *args, **kwargs)
        return (out + self.config.scaling * base.spread(self.offset)).to(out.dtype)

    def keys(self, base: Base) -> dict[str, tuple[str, tuple[int, ...]]]:
        """Return the LoRA's keys, and PEFT's name of c."""
        found = {key: (f"lora.{name}", s) for key, (name, s) in self.lora.keys(base).items()}
        return {**found, "lora_B.bias": ("offset", (base.shape[0],))}
