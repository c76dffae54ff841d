"""GraLoRA: a LoRA B_jn A_nj on every block of W cut k by k (Jung et al., arXiv:2505.20355).

Block (j, n) of the update, from piece n of the inputs to piece j of the outputs, is B_jn A_nj of
rank r / k: as many parameters as a LoRA of rank r, but an update of rank up to k r.

A [k, I/k, r] and B [k, r, O/k] hold them: A_nj is columns j r/k ... of A[n], B_jn rows n r/k ... of
B[j].  With hybrid_r, a LoRA of that rank over the whole weight is added. All is scaled by
alpha / (r + hybrid_r).
"""

from __future__ import annotations

import dataclasses
import math
from typing import Literal

import torch
from torch import Tensor, nn

from inlay.core.adapter import Delta, Method
from inlay.core.base import Base
from inlay.core.config import PeftType
from inlay.core.errors import UserError
from inlay.core.limits import Count, Dropout, Rank, Scale
from inlay.core.numbers import check_divides
from inlay.core.targeted import TargetedConfig


@dataclasses.dataclass(frozen=True, kw_only=True)
class GraloraConfig(TargetedConfig):
    """GraLoRA's settings, under PEFT's names and with PEFT's defaults."""

    method = PeftType.GRALORA
    unwritten = ("exclude_modules",)

    r: Rank = 32
    """Rank of a LoRA with as many parameters; each block has rank r / gralora_k."""
    hybrid_r: Count = 0
    """Rank of a LoRA over the whole weight beside the blocks, or 0."""
    alpha: Scale = 64
    """Numerator of the scale: the update is multiplied by alpha / (r + hybrid_r)."""
    gralora_dropout: Dropout = 0.0
    """Probability of zeroing an input of the update in training."""
    gralora_k: Rank = 2
    """Pieces that inputs and outputs are cut into; must divide both, and r."""
    fan_in_fan_out: bool = False
    """PEFT's note that a weight is stored [in, out]; read from the layer, kept for the files."""
    bias: Literal["none", "all", "gralora_only"] = "none"
    """Which biases train too: none, every one of the model, or those of the adapted layers."""
    init_weights: bool = True
    """True: A Kaiming-uniform, B zero. False: both random, for tests."""

    def __post_init__(self) -> None:
        """Refuse ranks, scales and cuts that cannot be."""
        super().__post_init__()
        if self.r % self.gralora_k:
            raise UserError(
                f"gralora_k={self.gralora_k} does not divide r={self.r}; "
                f"try r={self.gralora_k * max(1, self.r // self.gralora_k)}"
            )


class Gralora(Delta):
    """The update of one layer."""

    on = frozenset({"linear"})
    drops = "gralora_dropout"
    config: GraloraConfig

    def make(self, base: Base) -> None:
        """Make A, B and the whole weight's two; UserError where the layer cannot be cut."""
        config = self.config
        k, r, (outputs, inputs) = config.gralora_k, config.r, base.shape
        check_divides("gralora_k", k, outputs, inputs)
        self.gralora_A = self.parameter(k, inputs // k, r)
        self.gralora_B = self.parameter(k, r, outputs // k)
        self.whole_A = self.parameter(config.hybrid_r, inputs) if config.hybrid_r else None
        self.whole_B = self.parameter(outputs, config.hybrid_r) if config.hybrid_r else None

    def reset(self, base: Base) -> None:
        """Make each A random and each B zero: an untrained update changes nothing."""
        super().reset(base)
        for name, parameter in self.named_parameters():
            if name == "bias":
                continue
            if name.endswith("_B") and self.config.init_weights:
                nn.init.zeros_(parameter)
                continue
            # a piece of A is drawn as a linear layer of its own inputs, which stand before the rank
            matrices = [parameter] if name.startswith("whole") else [p.T for p in parameter]
            for matrix in matrices:
                nn.init.kaiming_uniform_(matrix, a=math.sqrt(5))

    def _cut(self, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Return A [n, I/k, j, r/k] and B [j, n, r/k, O/k]."""
        a, b, k = self.gralora_A.to(dtype), self.gralora_B.to(dtype), self.config.gralora_k
        return a.reshape(k, -1, k, self.config.r // k), b.reshape(k, k, self.config.r // k, -1)

    @property
    def scaling(self) -> float:
        """The factor of the update."""
        return self.config.alpha / (self.config.r + self.config.hybrid_r)

    def delta(self, dtype: torch.dtype) -> Tensor:
        """Return the update [O, I]."""
        a, b = self._cut(dtype)
        blocks = torch.einsum("nijs,jnso->joni", a, b)
        out = blocks.reshape(b.shape[0] * b.shape[3], a.shape[0] * a.shape[1])
        if self.whole_A is not None and self.whole_B is not None:
            out = out + self.whole_B.to(dtype) @ self.whole_A.to(dtype)
        return self.scaling * out

    def update(self, base: Base, x: Tensor) -> Tensor:
        """Return the update's share from the thin factors alone."""
        a, b = self._cut(self.gralora_A.dtype)
        x = self.dropped(x)
        pieces = x.reshape(*x.shape[:-1], a.shape[0], a.shape[1])
        h = torch.einsum("...ni,nijs->...jns", pieces, a)
        out = torch.einsum("...jns,jnso->...jo", h, b).flatten(-2)
        if self.whole_A is not None and self.whole_B is not None:
            out = out + base.up(base.down(x, self.whole_A), self.whole_B)
        return self.scaling * out

    def keys(self, base: Base) -> dict[str, tuple[str, tuple[int, ...]]]:
        """Return PEFT's names; those of the whole weight's factors are linear layers'."""
        return {
            key.replace("whole_", "gralora_") + "_general.weight" * key.startswith("whole_"): slot
            for key, slot in super().keys(base).items()
        }


METHOD = Method(GraloraConfig, Gralora)
