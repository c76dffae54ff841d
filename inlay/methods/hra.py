"""HRA: W H_1 H_2 ... H_R, each H = 1 - 2 u u^T a reflection (Yuan et al., arXiv:2405.17484).

U [I, R] holds the vectors u, which are brought to length 1.  The product is 1 - U T U^T, where T
[R, R] is upper triangular and T^-1 is 1/2 and, above the diagonal, U^T U: no matrix [I, I] is
formed, and what W becomes is W - (W U T) U^T.  apply_GS: U is orthogonal, and then T is 2.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any, Literal

import torch
from torch import Tensor, nn

from inlay.core.adapter import Delta, Method
from inlay.core.base import Base
from inlay.core.config import PeftType
from inlay.core.errors import UserError
from inlay.core.limits import Rank
from inlay.core.targeted import TargetedConfig

SHORTEST = 1e-15
"""Square of a length below which a vector reflects nothing: it has no direction."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class HRAConfig(TargetedConfig):
    """HRA's settings, under PEFT's names and with PEFT's defaults."""

    method = PeftType.HRA

    r: Rank = 8
    """How many reflections; an even number, or the one left over changes the model at once."""
    apply_GS: bool = False
    """Make the vectors orthogonal to each other; the model then starts from R reflections."""
    bias: Literal["none", "all", "hra_only"] = "none"
    """Which biases train too: none, every one of the model, or those of the adapted layers."""
    init_weights: bool = True
    """True: pairs of equal vectors, whose reflections undo each other. False: all random."""


class Hra(Delta):
    """The reflections of one layer's inputs; said as an update, it depends on the weight below."""

    on = frozenset({"linear", "conv"})
    config: HRAConfig

    def make(self, base: Base) -> None:
        """Make U [I, R]; UserError where a layer has no R orthogonal directions."""
        r, inputs = self.config.r, base.shape[1]
        if self.config.apply_GS and r > inputs:
            raise UserError(
                f"r={r} vectors cannot be orthogonal in a layer of {inputs} inputs: lower it, or "
                "leave apply_GS out"
            )
        self.hra_u = self.parameter(inputs, r)

    def reset(self, base: Base) -> None:
        """Start from pairs of equal vectors: reflected twice, an input is what it was."""
        super().reset(base)
        r = self.config.r
        # equal vectors have no orthogonal form, so that with apply_GS all are drawn
        pairs = r // 2 if self.config.init_weights and not self.config.apply_GS else 0
        drawn = torch.empty_like(self.hra_u[:, pairs:])
        nn.init.kaiming_uniform_(drawn, a=math.sqrt(5))
        with torch.no_grad():
            twice = drawn[:, :pairs].repeat_interleave(2, dim=1)
            self.hra_u.copy_(torch.cat([twice, drawn[:, pairs:]], dim=1))

    def _reflections(self, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Return V [I, R] and K [R, R], of which V K V^T is U T U^T.

        V has the second vector of a pair less the first: at the start that is zero to the bit, and
        so is all that K says of the first ones alone.
        """
        # neither QR nor solving has a kernel for half precision
        u = self.hra_u.to(torch.promote_types(dtype, torch.float32))
        one = torch.eye(u.shape[1], dtype=u.dtype, device=u.device)
        if self.config.apply_GS:
            return torch.linalg.qr(u).Q.to(dtype), 2 * one.to(dtype)
        products = u.T @ u
        squares = products.diagonal().clamp(min=SHORTEST)
        # by one root of both squares, for then the cosine of two equal vectors is 1 to the bit
        cosines = products / (squares[:, None] * squares).sqrt()
        t = torch.linalg.solve_triangular(cosines.triu(1) + one / 2, one, upper=True)
        second = one.roll(1, 1)
        second[1::2] = 0
        second[:, 0] = 0
        v = u / squares.sqrt() @ (one - second)
        return v.to(dtype), ((one + second) @ t @ (one + second).T).to(dtype)

    def delta(self, dtype: torch.dtype) -> Tensor:
        """Raise TypeError: there is no update without the weight."""
        raise TypeError("the update of HRA depends on the weight it is added to")

    def reweight(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """Return W - (W V K) V^T, and the trained bias where there is one."""
        v, k = self._reflections(weight.dtype)
        own = bias if self.bias is None else self.bias.to(weight.dtype)
        return weight - weight @ v @ k @ v.T, own

    def update(self, base: Base, x: Tensor) -> Tensor:
        """Return -(W V K) (V^T x), never a product of the weight's size."""
        v, k = self._reflections(self.dtype)
        weight = base.weight().to(self.dtype)
        return base.up(base.down(x.to(self.dtype), v.T), -(weight @ v @ k))

    def forward(self, base: Base, x: Any, *args: Any, **kwargs: Any) -> Any:
        """Return what the layer makes of the reflected input; of a linear no weight is needed."""
        if base.kind != "linear":  # the inputs of a convolution overlap: none is reflected alone
            return super().forward(base, x, *args, **kwargs)
        v, k = self._reflections(self.dtype)
        wide = x.to(self.dtype)
        below = base((wide - wide @ v @ k.T @ v.T).to(x.dtype), *args, **kwargs)
        if self.bias is None:
            return below
        return (below + (self.bias - base.bias())).to(below.dtype)  # type: ignore[operator]


METHOD = Method(HRAConfig, Hra)
