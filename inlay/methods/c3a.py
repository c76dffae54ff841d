"""C3A: W + D / I, D of circulant blocks: entry [t, j] is c[(j - t) mod b] (arXiv:2407.19342).

c [O/b, I/b, b]: each block [b, b] is said by its first row, so that D has O I / b numbers and may
have full rank.  A circulant times x is a circular correlation of c and x, which Fourier's transform
makes a product; Chen et al.
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
from inlay.core.limits import Rank
from inlay.core.numbers import check_divides
from inlay.core.targeted import TargetedConfig


@dataclasses.dataclass(frozen=True, kw_only=True)
class C3AConfig(TargetedConfig):
    """C3A's settings, under PEFT's names and with PEFT's defaults."""

    method = PeftType.C3A

    block_size: Rank = 256
    """Rows and columns b of a block; must divide inputs and outputs of every adapted layer."""
    bias: Literal["none", "all", "c3a_only"] = "none"
    """Which biases train too: none, every one of the model, or those of the adapted layers."""
    block_size_pattern: dict[str, Rank] = dataclasses.field(default_factory=dict)
    """block_size of the modules whose path ends in the key (a regular expression)."""
    init_weights: bool | Literal["gaussian", "kaiming_uniform", "xavier_uniform"] = "xavier_uniform"
    """True: zero, so that training starts from the base. Else random, and near it; False is
    "xavier_uniform"."""

    by_site: ClassVar[Mapping[str, str]] = {"block_size_pattern": "block_size"}
    unwritten: ClassVar[tuple[str, ...]] = ("exclude_modules",)


class C3a(Delta):
    """The circulant blocks of one layer's update; the paper starts them at random, near zero."""

    on = frozenset({"linear"})
    starts_neutral = False
    config: C3AConfig

    def make(self, base: Base) -> None:
        """Make c; UserError where the layer cannot be cut into blocks."""
        b, (outputs, inputs) = self.config.block_size, base.shape
        check_divides("block_size (or its block_size_pattern)", b, outputs, inputs)
        self._shape = base.shape
        self.c3a_kernel = self.parameter(outputs // b, inputs // b, b)

    def reset(self, base: Base) -> None:
        """Draw c as a weight [O, I] is drawn, or start from no update."""
        super().reset(base)
        init, (outputs, inputs) = self.config.init_weights, self._shape
        if init is True:
            nn.init.zeros_(self.c3a_kernel)
        elif init == "gaussian":
            nn.init.normal_(self.c3a_kernel)
        else:
            most = 1 / inputs if init == "kaiming_uniform" else 6 / (inputs + outputs)
            nn.init.uniform_(self.c3a_kernel, -math.sqrt(most), math.sqrt(most))

    def delta(self, dtype: torch.dtype) -> Tensor:
        """Return D / I [O, I]."""
        c = self.c3a_kernel.to(dtype)
        place = torch.arange(c.shape[-1], device=c.device)
        blocks = c[:, :, (place - place[:, None]) % len(place)]  # [O/b, I/b, t, j]
        return blocks.transpose(1, 2).reshape(self._shape) / self._shape[1]

    def update(self, base: Base, x: Tensor) -> Tensor:
        """Return D x / I in O I / b steps, from the transforms of c and of the pieces of x."""
        del base
        # Fourier's transform has no kernel for half precision
        wide = torch.promote_types(self.dtype, torch.float32)
        c, b = torch.fft.rfft(self.c3a_kernel.to(wide)), self.config.block_size
        pieces = torch.fft.rfft(x.to(wide).reshape(*x.shape[:-1], -1, b))
        products = torch.einsum("...nf,mnf->...mf", pieces, c.conj())
        out: Tensor = torch.fft.irfft(products, b).flatten(-2) / self._shape[1]
        return out


METHOD = Method(C3AConfig, C3a)
