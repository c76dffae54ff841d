"""AdaLoRA: W + s B diag(e) A, s = alpha / (R + 1e-5)   (Zhang et al., arXiv:2303.10512).

A [K, I], B [O, K], e [K, 1]; R = init_r, the rank that every layer starts with.  In training the
entries of e that matter least over all layers are set to zero, so that ranks go where they serve;
the file keeps the K that are left, and the mask [R] of which these were.  Each triple is a singular
value with its vectors, held near orthogonal by a term of the loss.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Mapping
from typing import ClassVar, Self

import torch
from torch import Tensor, nn

from inlay.core.adapter import Delta, Method
from inlay.core.base import Base
from inlay.core.config import PeftType
from inlay.core.errors import UserError
from inlay.core.limits import Rank, Scale, Steps
from inlay.core.numbers import check_one_of, check_whole
from inlay.core.targeted import TargetedConfig
from inlay.methods.lora import LoraConfig

SHARED = ("r", "lora_alpha", "lora_dropout", "fan_in_fan_out", "bias", "init_lora_weights")
"""LoRA's own fields that AdaLoRA has a use for (r, which it has none for, is in every file)."""
UNUSED = {f.name for f in dataclasses.fields(LoraConfig)} - {
    *SHARED,
    "rank_pattern",
    *(f.name for f in dataclasses.fields(TargetedConfig)),
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class AdaLoraConfig(LoraConfig):
    """AdaLoRA's settings, under PEFT's names and with PEFT's defaults; r has no part in it."""

    method = PeftType.ADALORA

    target_r: Rank = 8
    """Rank a layer is left with, on average."""
    init_r: Rank = 12
    """Rank that every layer starts with."""
    tinit: Steps = 0
    """Steps before any rank is taken away."""
    tfinal: Steps = 0
    """Last steps, in which the ranks no longer change."""
    deltaT: Rank = 1
    """Steps from one choice of ranks to the next."""
    beta1: Scale = 0.85
    """Smoothing of an entry's importance, above 0 and below 1."""
    beta2: Scale = 0.85
    """Smoothing of how much that importance varies, above 0 and below 1."""
    orth_reg_weight: Scale = 0.5
    """Weight in the loss of A and B being orthogonal."""
    total_step: int | None = None
    """Steps of the whole training, which the schedule of ranks needs."""
    rank_pattern: dict[str, list[bool]] | None = None  # type: ignore[assignment]
    """What was chosen: `<module path>.lora_E` -> for each of init_r ranks whether it is kept."""

    by_site: ClassVar[Mapping[str, str]] = {}
    not_yet: ClassVar[dict[str, str]] = dict.fromkeys(UNUSED, "AdaLoRA has no such thing")

    def __post_init__(self) -> None:
        """Refuse ranks, schedules and switches that cannot be."""
        super(LoraConfig, self).__post_init__()  # LoRA's own checks are of another rank_pattern
        check_one_of("init_lora_weights", self.init_lora_weights, (True, False))
        for name in ("beta1", "beta2"):
            if not 0 < getattr(self, name) < 1:
                raise UserError(f"{name}={getattr(self, name)!r} must be above 0 and below 1")
        if self.orth_reg_weight < 0:
            raise UserError(f"orth_reg_weight={self.orth_reg_weight!r} must be at least 0")
        if self.total_step is not None:
            check_whole("total_step", self.total_step, most=2**53)
            if self.tinit >= self.total_step - self.tfinal:
                raise UserError(
                    f"tinit={self.tinit} and tfinal={self.tfinal} leave no step of "
                    f"total_step={self.total_step} to choose ranks in: lower them"
                )
        for name, mask in (self.rank_pattern or {}).items():
            fits = isinstance(mask, list) and len(mask) == self.init_r
            if not fits or not all(isinstance(kept, bool) for kept in mask):
                raise UserError(
                    f"rank_pattern of {name!r:.200} must be {self.init_r} times true or false, "
                    "as init_r says"
                )

    @property
    def scaling(self) -> float:
        """The factor of the update; the small number is PEFT's, which keeps rank 0 finite."""
        return (self.lora_alpha if self.lora_alpha > 0 else self.init_r) / (self.init_r + 1e-5)

    def at(self, site: str) -> Self:
        """Return the settings at `site`: r is the rank that is left there."""
        here = copy.copy(self)
        mask = (self.rank_pattern or {}).get(f"{site}.lora_E")
        object.__setattr__(here, "r", self.init_r if mask is None else sum(mask))
        return here


class AdaLora(Delta):
    """The update s B diag(e) A of one layer, of rank config.r."""

    on = frozenset({"linear", "conv"})
    drops = "lora_dropout"
    config: AdaLoraConfig

    def make(self, base: Base) -> None:
        """Make A [K, I], B [O, K] and e [K, 1]."""
        config = self.config
        self.lora_A = self.parameter(config.r, base.shape[1])
        self.lora_B = self.parameter(base.shape[0], config.r)
        self.lora_E = self.parameter(config.r, 1)

    def reset(self, base: Base) -> None:
        """Draw the vectors, and start the values e at zero: an untrained update changes nothing."""
        super().reset(base)
        small = 0.02 if self.config.init_lora_weights else 1.0
        nn.init.normal_(self.lora_A, std=small)
        nn.init.normal_(self.lora_B, std=small)
        nn.init.normal_(self.lora_E, std=0.0 if self.config.init_lora_weights else 1.0)

    def factors(self, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Return s B [O, K] and diag(e) A [K, I]."""
        a, b, e = (p.to(dtype) for p in (self.lora_A, self.lora_B, self.lora_E))
        return self.config.scaling * b, a * e

    def update(self, base: Base, x: Tensor) -> Tensor:
        """Return s B (diag(e) A x), never the product of the two."""
        if not len(self.lora_A):  # every rank of this layer was taken away
            return x.new_zeros((), dtype=self.dtype)
        return super().update(base, x)


METHOD = Method(AdaLoraConfig, AdaLora)
