"""DEFT: (1 - Q V^T) W + s Q R: a subspace of the outputs is taken out of W and filled anew.

Q and V come from one trained M [O, K]: "relu", Q = M and V = relu(M); "qr", Q = V = the orthogonal
factor of M.  R [K, I], s = alpha / K or 1.  Said as an update it is Q (s R - V^T W).  para: no R,
nothing is put back.  Kumar et al., arXiv:2509.22793; M is PEFT's deft_P.
"""

from __future__ import annotations

import dataclasses
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from inlay.core.adapter import Delta, Method
from inlay.core.base import Base
from inlay.core.config import PeftType
from inlay.core.limits import Dropout, Rank, Scale, Steps
from inlay.core.targeted import TargetedConfig


@dataclasses.dataclass(frozen=True, kw_only=True)
class DeftConfig(TargetedConfig):
    """DEFT's settings, under PEFT's names and with PEFT's defaults."""

    method = PeftType.DEFT

    r: Rank = 8
    """Dimension K of the subspace; a layer of fewer outputs takes as many as it has."""
    decomposition_method: Literal["relu", "qr"] = "relu"
    """How Q and V come from M."""
    init_scale: Scale = 1.0
    """With init_weights false: R's deviation, in units of 0.02."""
    alpha: Steps | None = None
    """Numerator of R's scale s = alpha / K; None: s is 1."""
    para: bool = False
    """Take the subspace out and put nothing back; this changes the base from the start."""
    fan_in_fan_out: bool = False
    """PEFT's note that a weight is stored [in, out]; read from the layer, kept for the files."""
    deft_dropout: Dropout = 0.0
    """Probability of zeroing an input of R in training."""
    init_weights: bool = True
    """True: R puts back what is taken out. False: R random."""
    bias: Literal["none", "all", "deft_only"] = "none"
    """Which biases train too: none, every one of the model, or those of the adapted layers."""


class Deft(Delta):
    """The exchanged subspace of one layer; its update depends on the weight below."""

    on = frozenset({"linear"})
    config: DeftConfig

    def make(self, base: Base) -> None:
        """Make M [O, K], and R [K, I] unless nothing is put back."""
        config = self.config
        outputs, inputs = base.shape
        k = min(config.r, outputs)
        self.deft_P = self.parameter(outputs, k)
        self.deft_R = None if config.para else self.parameter(k, inputs)
        self._scale = config.alpha / k if config.alpha else 1.0

    def reset(self, base: Base) -> None:
        """Draw M, and let R put back what is taken out: an untrained update changes nothing."""
        super().reset(base)
        nn.init.normal_(self.deft_P, std=0.02)
        if self.deft_R is None:
            return
        if not self.config.init_weights:
            nn.init.normal_(self.deft_R, std=0.02 * self.config.init_scale)
            return
        with torch.no_grad():
            self.deft_R.copy_(self._taken(base.weight().to(self.deft_P.dtype))[1] / self._scale)

    def _taken(self, weight: Tensor) -> tuple[Tensor, Tensor]:
        """Return Q [O, K] and V^T W [K, I]."""
        q = self.deft_P.to(weight.dtype)
        if self.config.decomposition_method == "qr":
            q = torch.linalg.qr(q).Q
            return q, q.T @ weight
        return q, F.relu(q).T @ weight

    def _put(self, dtype: torch.dtype) -> Tensor | float:
        return 0.0 if self.deft_R is None else self._scale * self.deft_R.to(dtype)

    def delta(self, dtype: torch.dtype) -> Tensor:
        """Raise TypeError: there is no update without the weight."""
        raise TypeError("the update of DEFT depends on the weight it is added to")

    def reweight(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """Return W + Q (s R - V^T W), and the trained bias where there is one."""
        q, taken = self._taken(weight)
        own = bias if self.bias is None else self.bias.to(weight.dtype)
        return weight + q @ (self._put(weight.dtype) - taken), own

    def update(self, base: Base, x: Tensor) -> Tensor:
        """Return Q (s R x - V^T W x), never a product of the weight's size."""
        dtype = self.deft_P.dtype
        q, taken = self._taken(base.weight().to(dtype))
        x, put = x.to(dtype), self._put(dtype)
        if not (self.config.deft_dropout and self.training and isinstance(put, Tensor)):
            return base.up(base.down(x, put - taken), q)
        dropped = F.dropout(x, self.config.deft_dropout)
        return base.up(base.down(dropped, put) - base.down(x, taken), q)


METHOD = Method(DeftConfig, Deft)
