"""LoftQ: Q + s B A, Q the weight W quantized; LoRA's start "loftq" (Li et al., arXiv:2310.08659).

The base stays as it is, for the other adapters: what Q lost of it, D = Q - W [O, I], is kept here,
frozen, and added to it.  Over a base that is packed to Q already there is no D.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from inlay.core.adapter import Reweight
from inlay.core.base import Base
from inlay.methods.lora import Lora, LoraConfig


class LoftQ(Reweight):
    """The quantized weight of one layer, and the LoRA that makes up for it."""

    on = frozenset({"linear"})
    config: LoraConfig
    lost: Tensor | None

    def make(self, base: Base) -> None:
        """Make the LoRA and D."""
        self.lora = Lora(self.config, base, device=self._device)
        lost = None if base.bits else self.parameter(*base.shape).data
        self.register_buffer("lost", lost, persistent=False)

    def reset(self, base: Base) -> None:
        """Start the LoRA as if nothing were lost; `model.starts` then looks at the weight."""
        self.lora.reset(base)
        if self.lost is not None:
            self.lost.zero_()

    def reweight(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """Return W + D + s B A, and the LoRA's bias."""
        weight = weight if self.lost is None else weight + self.lost.to(weight.dtype)
        return self.lora.reweight(weight, bias)

    def rebias(self, base: Base) -> Tensor | None:
        """Return the LoRA's bias."""
        return self.lora.rebias(base)

    def forward(self, base: Base, x: Any, *args: Any, **kwargs: Any) -> Any:
        """Return base(x) + D x + s B (A x)."""
        if self.lost is None:
            return self.lora(base, x, *args, **kwargs)
        below = base(x, *args, **kwargs)
        lost = base.apply(x.to(self.lost.dtype), self.lost)
        return (below + lost + self.lora.change(base, x)).to(below.dtype)

    def keys(self, base: Base) -> dict[str, tuple[str, tuple[int, ...]]]:
        """Return the LoRA's keys."""
        return {key: (f"lora.{name}", s) for key, (name, s) in self.lora.keys(base).items()}
