"""LoKr: W + s L (x) M, a Kronecker product of a small matrix and a larger one, s = alpha / R.

L [p, u], M [q, v]: O = p q and I = u v, each cut into the two factors nearest its root, or with
decompose_factor at it.  M is B A of rank R where R is small beside q and v; so is L with
decompose_both.  Of a convolution M has the kernel [q, v, k, k], which may be factored apart
(use_effective_conv2d): T [R, R, k, k] with B [R, q] on its first side and A [R, v] on its second.
Yeh et al., arXiv:2309.14859.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Literal

import torch
from torch import Tensor, nn

from inlay.core.adapter import Method
from inlay.core.base import Base
from inlay.core.config import PeftType
from inlay.core.numbers import MOST_RANK, check_whole
from inlay.methods._lycoris import Lycoris, LycorisConfig, around, draw


@dataclasses.dataclass(frozen=True, kw_only=True)
class LoKrConfig(LycorisConfig):
    """LoKr's settings, under PEFT's names and with PEFT's defaults."""

    method = PeftType.LOKR

    decompose_both: bool = False
    """Factor L too, where r is less than half of its longer side."""
    decompose_factor: int = -1
    """The largest that a side of L may be, or -1: up to the root of the layer's side."""
    rank_dropout_scale: bool = False
    """Enlarge what is kept for what rank_dropout leaves out."""
    init_weights: bool | Literal["lycoris"] = True
    """True: L zero, the rest Kaiming-uniform. "lycoris": M zero instead. False: all random."""

    def __post_init__(self) -> None:
        """Refuse numbers and switches that cannot be."""
        super().__post_init__()
        if self.decompose_factor != -1:
            check_whole("decompose_factor", self.decompose_factor, most=MOST_RANK)


class LoKr(Lycoris):
    """The update of one layer. PEFT's names: w1 is L, w2 is M, w2_a is B, w2_b is A."""

    config: LoKrConfig

    def make(self, base: Base) -> None:
        """Make L and M, each whole or in its factors."""
        config = self.config
        r, most = config.r, config.decompose_factor
        outputs, channels, kernel, core = self.cut(base)
        (p, q), (u, v) = factors_of(outputs, most), factors_of(channels, most)
        self._shape, whole = base.shape, r >= max(q, v) / 2
        apart = bool(core) and not whole
        one = not config.decompose_both or r >= max(p, u) / 2
        self.lokr_w1 = self.parameter(p, u) if one else None
        self.lokr_w1_a = None if one else self.parameter(p, r)
        self.lokr_w1_b = None if one else self.parameter(r, u)
        self.lokr_w2 = self.parameter(q, v, *kernel) if whole else None
        left, right = ((r, q), (r, v)) if apart else ((q, r), (r, v * math.prod(kernel)))
        self.lokr_w2_a = None if whole else self.parameter(*left)
        self.lokr_w2_b = None if whole else self.parameter(*right)
        self.lokr_t2 = self.parameter(r, r, *core) if apart else None

    @property
    def makes_up(self) -> bool:
        """Whether what is kept is enlarged for what rank_dropout leaves out."""
        return self.config.rank_dropout_scale

    def reset(self, base: Base) -> None:
        """Draw all but one factor, of L or of M, so that an untrained update changes nothing."""
        super().reset(base)
        draw(*self.parameters())
        init = self.config.init_weights
        if init == "lycoris":
            zero = self.lokr_w2_b if self.lokr_w2 is None else self.lokr_w2
        else:
            zero = self.lokr_w1_a if self.lokr_w1 is None else self.lokr_w1
        if init and zero is not None:
            nn.init.zeros_(zero)

    def _pair(self, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Return L, scaled, and M, its kernel folded or not."""
        one = _whole(dtype, self.lokr_w1, self.lokr_w1_a, self.lokr_w1_b)
        two = _whole(dtype, self.lokr_w2, self.lokr_w2_a, self.lokr_w2_b, self.lokr_t2)
        return self.config.scaling * one, two

    def delta(self, dtype: torch.dtype) -> Tensor:
        """Return the update [O, I]."""
        one, two = self._pair(dtype)
        # over a kernel of one dimension PEFT multiplies in another order, and its files mean that
        sides = "pu,qvk->qpvuk" if two.ndim == 3 else "pu,qv...->pquv..."
        return torch.einsum(sides, one, two).reshape(self._shape)

    def product(self, base: Base, x: Tensor) -> Tensor:
        """Return the update's share: of a linear layer L (x M^T), never the update itself."""
        if base.kind != "linear":
            return super().product(base, x)
        one, two = self._pair(self.dtype)
        pieces = x.to(self.dtype).reshape(*x.shape[:-1], one.shape[1], two.shape[1])
        return (one @ (pieces @ two.T)).flatten(-2)


def factors_of(side: int, most: int) -> tuple[int, int]:
    """Return two whole numbers whose product is `side`; PEFT's choice, which its files need.

    They are `most` and the rest where that divides; else the first is the largest divisor that is
    no more than `most` and no more than the root of `side`. most -1: no limit.
    """
    if most > 0 and side % most == 0:
        return most, side // most
    limit = math.isqrt(side) if most < 0 else min(most, math.isqrt(side))
    low = next(n for n in range(limit, 0, -1) if side % n == 0)
    return low, side // low


def _whole(dtype: torch.dtype, whole: Tensor | None, *factors: Tensor | None) -> Tensor:
    """Return a matrix that is there whole, or as B, A and perhaps a core between them."""
    if whole is not None:
        return whole.to(dtype)
    b, a, *core = (factor.to(dtype) for factor in factors if factor is not None)
    return around(core[0], b, a) if core else b @ a


METHOD = Method(LoKrConfig, LoKr)
