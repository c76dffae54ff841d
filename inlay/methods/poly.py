"""Poly: W + sum_k a_k B_k A_k / r, a set of LoRAs as skills, of which each task takes its own mix.

Ponti et al., arXiv:2202.13914; with S > 1 each skill is cut into S parts that are mixed apart
(MHR, Caccia et al., arXiv:2211.03831).  A [S, K, I/S, R], B [S, K, R, O/S], K skills; the mix
a [S, K] of a task is sigmoid(logits) over its sum, and in training a relaxed Bernoulli draw of it.
"""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn
from torch.distributions.relaxed_bernoulli import RelaxedBernoulli

from inlay.core.adapter import Method, Wrap
from inlay.core.base import Base, Kind
from inlay.core.config import PeftType
from inlay.core.limits import Rank
from inlay.core.numbers import check_divides
from inlay.core.selection import task_numbers
from inlay.core.targeted import BY_LAYER, TargetedConfig

LEAST = 1e-12
"""What a mix is at least divided by, as in PEFT."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class PolyConfig(TargetedConfig):
    """Poly's settings, under PEFT's names and with PEFT's defaults."""

    method = PeftType.POLY
    unwritten = BY_LAYER[1:]

    r: Rank = 8
    """Rank of each skill."""
    init_weights: bool = True
    """True: A Kaiming-uniform, B zero. False: both random, for tests."""
    poly_type: Literal["poly"] = "poly"
    """How tasks are mixed of skills; there is one way."""
    n_tasks: Rank = 1
    """How many tasks there are; a call says that of each row as `task_ids`."""
    n_skills: Rank = 4
    """How many skills a layer has."""
    n_splits: Rank = 1
    """Into how many parts a skill is cut, each mixed apart."""


class Poly(Wrap):
    """The skills of one layer, and what its tasks take of them."""

    on: ClassVar[frozenset[Kind]] = frozenset({"linear"})
    config: PolyConfig

    def make(self, base: Base) -> None:
        """Make A, B and the logits; UserError where a layer cannot be cut."""
        config = self.config
        (outputs, inputs), parts = base.shape, config.n_splits
        check_divides("n_splits", parts, outputs, inputs)
        self.poly_lora_A = self.parameter(parts, config.n_skills, inputs // parts, config.r)
        self.poly_lora_B = self.parameter(parts, config.n_skills, config.r, outputs // parts)
        self.module_logits = self.parameter(config.n_tasks, parts * config.n_skills)

    @torch.no_grad()
    def reset(self, base: Base) -> None:
        """Start from an update of zero, and all skills nearly alike."""
        nn.init.uniform_(self.module_logits, -1e-3, 1e-3)
        for matrix, filled in (
            (self.poly_lora_A, True),
            (self.poly_lora_B, not self.config.init_weights),
        ):
            # as PyTorch starts a linear layer of that many inputs
            bound = matrix.shape[2] ** -0.5
            nn.init.uniform_(matrix, -bound, bound) if filled else nn.init.zeros_(matrix)

    def forward(self, base: Base, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Return base(x) and what each row's mix of the skills adds, in the dtype of base(x)."""
        out: Tensor = base(x, *args, **kwargs)
        a, b = self.poly_lora_A, self.poly_lora_B
        rows = x.to(a.dtype).reshape(len(x), -1, x.shape[-1])
        mix = self._mix(x)
        down = torch.einsum("bqs,qsdr->bqdr", mix, a).flatten(1, 2)
        up = torch.einsum("bqs,qsrd->brqd", mix, b).flatten(2)
        share = rows @ down @ up / self.config.r
        return (out + share.view(out.shape)).to(out.dtype)

    def _mix(self, x: Tensor) -> Tensor:
        """Return what each row of `x` takes of the skills, [B, S, K]."""
        config = self.config
        tasks = task_numbers(self.selection, x, config.n_tasks, "n_tasks")
        logits = self.module_logits[tasks].view(len(x), config.n_splits, config.n_skills)
        if self.training:
            one = torch.ones((), device=logits.device, dtype=logits.dtype)
            taken = RelaxedBernoulli(one, logits=logits).rsample()
        else:
            taken = logits.sigmoid()
        return taken / (taken.sum(-1, keepdim=True) + LEAST)

    def keys(self, base: Base) -> dict[str, tuple[str, tuple[int, ...]]]:
        """Return PEFT's names: the logits are in its router."""
        found = super().keys(base)
        found["poly_router.module_logits"] = found.pop("module_logits")
        return found


METHOD = Method(PolyConfig, Poly)
