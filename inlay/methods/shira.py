"""SHiRA: W + S, where S has entries in few places only (Bhardwaj et al., arXiv:2406.13175).

N = r (I + O) places, drawn once at random, hold the values; as many as a LoRA of rank r trains.
"""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor, nn

from inlay.core.adapter import Delta, Method
from inlay.core.base import Base
from inlay.core.config import PeftType
from inlay.core.errors import UserError
from inlay.core.limits import Rank, Seed
from inlay.core.targeted import BY_LAYER, TargetedConfig


@dataclasses.dataclass(frozen=True, kw_only=True)
class ShiraConfig(TargetedConfig):
    """SHiRA's settings, under PEFT's names and with PEFT's defaults."""

    method = PeftType.SHIRA

    r: Rank = 32
    """Rank of a LoRA with as many parameters: r (I + O) entries of the weight train."""
    mask_type: str = "random"
    """How the places are chosen: "random". A file with another kind carries its places along."""
    random_seed: Seed | None = None
    """Seed of the places, the same for layers of one size; None draws them from torch's own."""
    fan_in_fan_out: bool = False
    """PEFT's note that a weight is stored [in, out]; read from the layer, kept for the files."""
    init_weights: bool = True
    """True: the entries start at zero. False: random, for tests."""

    unwritten = BY_LAYER


class Shira(Delta):
    """The sparse update of one layer."""

    config: ShiraConfig
    shira_indices: Tensor

    def make(self, base: Base) -> None:
        """Make the values [N] and their places [2, N]; UserError where the layer has too few."""
        config = self.config
        outputs, inputs = base.shape
        count, most = config.r * (inputs + outputs), inputs * outputs
        if count > most:
            raise UserError(
                f"r={config.r} trains {count} entries, but a layer [{outputs}, {inputs}] has "
                f"{most}: lower it, to at most {most // (inputs + outputs)}"
            )
        self._shape = base.shape
        self.shira_weight = self.parameter(count)
        places = _places(torch.arange(count, device=self.shira_weight.device), inputs)
        self.register_buffer("shira_indices", places)

    def reset(self, base: Base) -> None:
        """Draw the places, and start every entry at zero."""
        super().reset(base)
        config, (outputs, inputs) = self.config, self._shape
        if config.mask_type != "random":
            raise UserError(
                f"mask_type={config.mask_type!r} cannot be drawn: a new adapter takes 'random'"
            )
        generator = None
        if config.random_seed is not None:
            generator = torch.Generator().manual_seed(config.random_seed)
        drawn = torch.randperm(outputs * inputs, generator=generator)[: len(self.shira_weight)]
        self.shira_indices.copy_(_places(drawn.sort().values, inputs))
        nn.init.normal_(self.shira_weight, std=0.0 if config.init_weights else 1.0)

    def delta(self, dtype: torch.dtype) -> Tensor:
        """Return S [O, I]; dense, for a product faster than a sparse one at these densities."""
        rows, columns = self.shira_indices.long()
        empty = torch.zeros(self._shape, device=self.shira_weight.device, dtype=dtype)
        # a file may name a place twice: both entries count
        return empty.index_put((rows, columns), self.shira_weight.to(dtype), accumulate=True)

    def keys(self, base: Base) -> dict[str, tuple[str, tuple[int, ...]]]:
        """Return PEFT's names: the values', and the places'."""
        places = ("shira_indices", tuple(self.shira_indices.shape))
        return {**super().keys(base), "shira_indices": places}


def _places(numbers: Tensor, inputs: int) -> Tensor:
    """Return row and column [2, N] of the entries with these numbers, in PEFT's dtype."""
    return torch.stack((numbers // inputs, numbers % inputs)).to(torch.int32)


METHOD = Method(ShiraConfig, Shira)
