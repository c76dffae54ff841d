"""What OFT and BOFT have in common: inputs that are turned before the layer, x -> x R."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from inlay.core.adapter import Delta, Reweight
from inlay.core.base import Base


class Turned(Delta):
    """W -> W R^T with R [I, I] orthogonal; said as an update, it depends on the weight below."""

    config: Any

    def turn(self, x: Tensor, *, back: bool = False) -> Tensor:
        """Return x R for x [..., I]; with `back`, x R^T."""
        raise NotImplementedError

    def delta(self, dtype: torch.dtype) -> Tensor:
        """Raise TypeError: there is no update without the weight."""
        raise TypeError(f"the update of {type(self).__name__} depends on the weight it is added to")

    def reweight(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """Return W R^T, and the trained bias."""
        own = bias if self.bias is None else self.bias.to(weight.dtype)
        return self.turn(weight, back=True), own

    def change(self, base: Base, x: Any) -> Tensor:
        """Return what the adapted layer computes more than the layer."""
        more: Tensor = self(base, x) - base(x)
        return more

    def forward(self, base: Base, x: Any, *args: Any, **kwargs: Any) -> Any:
        """Return what the layer makes of the turned input; of a linear no weight is needed."""
        if base.kind != "linear":  # the inputs of a convolution overlap: none is turned alone
            return Reweight.forward(self, base, x, *args, **kwargs)
        below = base(self.turn(x.to(self.dtype)).to(x.dtype), *args, **kwargs)
        if self.bias is None:
            return below
        return (below + (self.bias - base.bias())).to(below.dtype)  # type: ignore[operator]


def dropped(blocks: Tensor, share: float) -> Tensor:
    """Return the rotations [D, b, b], that share of them at random replaced by the identity."""
    chosen = torch.randperm(len(blocks), device=blocks.device)[: int(share * len(blocks))]
    one = torch.eye(blocks.shape[-1], dtype=blocks.dtype, device=blocks.device)
    return blocks.index_copy(0, chosen, one.expand(len(chosen), -1, -1))
