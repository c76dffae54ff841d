"""What FourierFT and WaveFT have in common: a few numbers at places that a seed draws."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from functools import lru_cache
from typing import Annotated, Any, ClassVar

import torch
from torch import Tensor, nn

from inlay.core.adapter import Delta
from inlay.core.base import Base
from inlay.core.errors import UserError
from inlay.core.limits import Scale, Seed, Whole
from inlay.core.targeted import TargetedConfig

Numbers = Annotated[int, Whole(most=2**31 - 1)]
"""How many of a matrix's entries; no matrix has more."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class SpectrumConfig(TargetedConfig):
    """The settings, under PEFT's names; what the defaults are, each method says."""

    n_frequency: Numbers
    """Coefficients N of each layer, all that trains there."""
    scaling: Scale
    """Factor of the update."""
    random_loc_seed: Seed = 777
    """Seed of the coefficients' places, which no file holds: layers of one shape have the same."""
    fan_in_fan_out: bool = False
    """PEFT's note that a weight is stored [in, out]; read from the layer, kept for the files."""
    n_frequency_pattern: dict[str, Numbers] = dataclasses.field(default_factory=dict)
    """n_frequency of the modules whose path ends in the key (a regular expression)."""

    by_site: ClassVar[Mapping[str, str]] = {"n_frequency_pattern": "n_frequency"}


class Spectrum(Delta):
    """The coefficients of one layer's update and their places in a matrix of its shape."""

    on = frozenset({"linear"})
    config: Any
    name: ClassVar[str]
    """PEFT's name of the coefficients."""
    deviation: ClassVar[float]
    """Standard deviation of coefficients that start at random."""
    places: Tensor

    def make(self, base: Base) -> None:
        """Make room for the coefficients, and draw their places."""
        self._shape = base.shape
        self.make_room(self.config.n_frequency, base.device)

    def make_room(self, n: int, device: torch.device) -> None:
        """Make room for n coefficients; UserError where the layer has fewer entries."""
        outputs, inputs = self._shape
        if n > outputs * inputs:
            raise UserError(
                f"n_frequency={n} is more than the {outputs * inputs} entries of a layer "
                f"[{outputs}, {inputs}]: lower it, or give the layer its own in n_frequency_pattern"
            )
        self.register_parameter(self.name, self.parameter(n))
        if device.type == "meta":  # a model of which only the sizes count
            places = torch.empty(n, dtype=torch.int64, device=device)
        else:
            # a copy, for what was drawn under inference_mode could not be trained with
            places = drawn(outputs * inputs, n, self.config.random_loc_seed).clone().to(device)
        self.register_buffer("places", places, persistent=False)

    def reset(self, base: Base) -> None:
        """Start from coefficients of zero, and so from no update, or draw them."""
        super().reset(base)
        random = 0.0 if self.config.init_weights else self.deviation
        nn.init.normal_(self.get_parameter(self.name), std=random)

    def grid(self, dtype: torch.dtype) -> Tensor:
        """Return [O, I], zero but for the coefficients at their places; float32 at least."""
        c = self.get_parameter(self.name).to(torch.promote_types(dtype, torch.float32))
        outputs, inputs = self._shape
        flat = c.new_zeros(outputs * inputs)
        return flat.index_put((self.places,), c).reshape(outputs, inputs)


@lru_cache(maxsize=16)
def drawn(size: int, n: int, seed: int) -> Tensor:
    """Return n different places below `size`, those that PEFT draws from this seed."""
    return torch.randperm(size, generator=torch.Generator().manual_seed(seed))[:n].clone()
