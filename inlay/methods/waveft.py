"""WaveFT: W + s V(C), V one step of an inverse 2-D wavelet transform, C sparse (arXiv:2505.12532).

Bilican et al.  C has W's shape, and beyond its edges zeros as far as the filter reaches; N of its
coefficients train, at places drawn from a seed, and the rest are 0.  Of its quarters the upper left
is coarse, the upper right changes down the columns, the lower left along the rows (PEFT's order),
and the lower right both ways.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from inlay.core.adapter import Method, Shared
from inlay.core.base import Base
from inlay.core.config import PeftType
from inlay.core.limits import Scale
from inlay.methods._spectrum import Numbers, Spectrum, SpectrumConfig
from inlay.methods._wavelets import taps

# fmt: off
Wavelet = Literal[
    "db1", "db2", "db3", "db4", "db5", "db6", "db7", "db8", "db9", "db10", "sym2", "sym3", "sym4",
    "sym5", "sym6", "sym7", "sym8", "sym9", "sym10", "coif1", "coif2", "coif3",
]
# fmt: on


@dataclasses.dataclass(frozen=True, kw_only=True)
class WaveFTConfig(SpectrumConfig):
    """WaveFT's settings, under PEFT's names and with PEFT's defaults."""

    method = PeftType.WAVEFT

    n_frequency: Numbers = 2592
    """Coefficients N of each layer, all that trains there."""
    scaling: Scale = 25.0
    """Factor s of the update."""
    wavelet_family: Wavelet = "db1"
    """Daubechies' wavelets, symlets and coiflets, by the vanishing moments; db1 is Haar's. PEFT
    computes no others, but for two coiflets of which its taps are wrong."""
    use_idwt: bool = True
    """False: no transform, the coefficients are entries of the weight."""
    proportional_parameters: bool = False
    """Give each layer a share of all coefficients by its number of entries, instead of N."""
    bias: Literal["none", "all", "waveft_only"] = "none"
    """Which biases train too: none, every one of the model, or those of the adapted layers."""
    init_weights: bool = True
    """True: zero, so that training starts from the base. False: random, and near it."""


class Budget(Shared):
    """All coefficients there are to be, and all entries of all layers."""

    def __init__(self, config: WaveFTConfig, bases: Sequence[Base]) -> None:
        """Count both."""
        super().__init__()
        self.coefficients = config.n_frequency * len(bases)
        self.entries = sum(base.shape[0] * base.shape[1] for base in bases)


class WaveFt(Spectrum):
    """The wavelet coefficients of one layer's update."""

    config: WaveFTConfig
    name = "waveft_spectrum"
    deviation = 0.01
    low: Tensor

    @classmethod
    def share(
        cls, config: WaveFTConfig, bases: Sequence[Base], *, device: torch.device | None = None
    ) -> Shared | None:
        """Return what the layers' shares are taken of, where they get such."""
        del device
        return Budget(config, bases) if config.proportional_parameters else None

    def make(self, base: Base) -> None:
        """Make room for the coefficients, where their number does not depend on other layers."""
        low = torch.tensor(taps(self.config.wavelet_family), device=base.device, dtype=self._dtype)
        self.register_buffer("low", low, persistent=False)
        if self.config.proportional_parameters:
            self._shape, self._home = base.shape, base.device
        else:
            super().make(base)

    def hold(self, shared: Any) -> None:
        """Make room for this layer's share of the coefficients, and for one at least."""
        super().hold(shared)
        part = self._shape[0] * self._shape[1] / shared.entries
        self.make_room(max(1, round(part * shared.coefficients)), self._home)

    def delta(self, dtype: torch.dtype) -> Tensor:
        """Return s V(C) [O, I]."""
        grid = self.grid(dtype)
        update = self._inverse(grid) if self.config.use_idwt else grid
        return (self.config.scaling * update).to(dtype)

    def _inverse(self, grid: Tensor) -> Tensor:
        """Return V(C) [O, I] for the coefficients [O, I] in the middle of C."""
        (outputs, inputs), low = grid.shape, self.low.to(grid.dtype)
        edges: list[int] = []
        for size in (inputs, outputs):
            added = len(low) - 2 + size % 2
            edges += [added // 2, added - added // 2]
        c = F.pad(grid, edges)
        high, wide = c.shape[0] // 2, c.shape[1] // 2
        # a quarter's row and its column say which filter runs down and along; PEFT's the other way
        c = c.reshape(2, high, 2, wide).transpose(0, 2).reshape(c.shape)
        along = _synthesis(c, low)[:, :inputs]
        return _synthesis(along.T, low)[:, :outputs].T


def _synthesis(c: Tensor, low: Tensor) -> Tensor:
    """Return the signals [N, 2 h - L + 2] of coefficients [N, 2 h], h coarse ones and h fine."""
    signs = torch.ones_like(low)
    signs[1::2] = -1
    filters = torch.stack((low, low.flip(0) * signs))[:, None]
    pairs = c.reshape(len(c), 2, -1)
    return F.conv_transpose1d(pairs, filters, stride=2, padding=len(low) - 2)[:, 0]


METHOD = Method(WaveFTConfig, WaveFt)
