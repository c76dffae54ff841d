"""FourierFT: W + s Re(F(C)), F the inverse 2-D Fourier transform, C sparse (arXiv:2405.03003).

Gao et al.  C [O, I] has N trained coefficients, at places drawn from a seed; all else in it is 0.
"""

from __future__ import annotations

import dataclasses
from typing import Literal

import torch
from torch import Tensor

from inlay.core.adapter import Method
from inlay.core.config import PeftType
from inlay.core.limits import Scale
from inlay.methods._spectrum import Numbers, Spectrum, SpectrumConfig


@dataclasses.dataclass(frozen=True, kw_only=True)
class FourierFTConfig(SpectrumConfig):
    """FourierFT's settings, under PEFT's names and with PEFT's defaults."""

    method = PeftType.FOURIERFT

    n_frequency: Numbers = 1000
    """Coefficients N of each layer, all that trains there."""
    scaling: Scale = 150.0
    """Factor s of the update; the paper takes 100 to 300."""
    bias: Literal["none", "all", "fourier_only"] = "none"
    """Which biases train too: none, every one of the model, or those of the adapted layers."""
    init_weights: bool = False
    """False: coefficients random, as in the paper. True: zero, so that training starts from the
    base."""


class FourierFt(Spectrum):
    """The spectrum of one layer's update; the paper starts it at random, which is near the base."""

    starts_neutral = False
    config: FourierFTConfig
    name = "fourierft_spectrum"
    deviation = 1.0

    def delta(self, dtype: torch.dtype) -> Tensor:
        """Return s Re(F(C)) [O, I]."""
        update: Tensor = torch.fft.ifft2(self.grid(dtype)).real * self.config.scaling
        return update.to(dtype)


METHOD = Method(FourierFTConfig, FourierFt)
