"""PVeRA: diag(b) B z, z drawn from a normal in training, its mean else   (arXiv:2512.07703).

VeRA whose features between the two random matrices are drawn: diag(d) A x holds mean and log
variance [R each] of z. Out of training it is VeRA with the first half of d and A.
A [2R, I] and B [O, R] are drawn once for all layers as VeRA's are; d [2R], b [O].
"""

from __future__ import annotations

import dataclasses
from typing import ClassVar, Literal

import torch
from torch import Tensor

from inlay.core.adapter import Method
from inlay.core.config import PeftType
from inlay.core.limits import Dropout, Rank, Scale, Seed
from inlay.core.targeted import TargetedConfig
from inlay.methods.vera import Vera


@dataclasses.dataclass(frozen=True, kw_only=True)
class PveraConfig(TargetedConfig):
    """PVeRA's settings, under PEFT's names and with PEFT's defaults."""

    method = PeftType.PVERA
    unwritten = ("exclude_modules",)
    not_yet: ClassVar[dict[str, str]] = {
        "sample_at_inference": "out of training the mean is computed, which is what merges",
        "generator_seed": "the draws come from torch's own generator, so from the run's seed",
    }

    r: Rank = 256
    """Rank of the update: higher than LoRA's, for a rank costs one number a layer."""
    projection_prng_key: Seed = 0
    """Seed that A and B are drawn from."""
    save_projection: bool = True
    """Whether a file holds A and B; without, they are drawn from the seed again."""
    pvera_dropout: Dropout = 0.0
    """Probability of zeroing an input of the update in training."""
    d_initial: Scale = 0.1
    """What d starts at."""
    fan_in_fan_out: bool = False
    """PEFT's note that a weight is stored [in, out]; read from the layer, kept for the files."""
    bias: Literal["none", "all", "pvera_only"] = "none"
    """Which biases train too: none, every one of the model, or those of the adapted layers."""
    sample_at_inference: bool = False
    """Whether to draw out of training too; only False, for no weight can say it."""
    generator_seed: int | None = None
    """Seed of the draws in PEFT; only None: they come from torch's own generator."""
    init_weights: bool = True
    """True: b zero and d d_initial. False: b ones and d random, for tests."""


class Pvera(Vera):
    """The update of one layer."""

    drops = "pvera_dropout"
    prefix = "pvera"
    rows = 2

    def middle(self, h: Tensor) -> Tensor:
        """Return z: drawn in training, else its mean."""
        mean, log_variance = h.chunk(2, dim=-1)
        if not self.training:
            return mean
        return mean + torch.randn_like(mean) * (log_variance / 2).exp()


METHOD = Method(PveraConfig, Pvera)
