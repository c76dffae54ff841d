"""OSF: U_h S_h V_h + U S V, where W = U_h S_h V_h + U_0 S_0 V_0   (arXiv:2504.07097).

Of W's singular vectors the K of the largest values, U_h [O, K] and V_h [K, I], stay; the M that are
left start as W's own, U [O, M], S [M], V [M, I], and train, their gradients kept orthogonal to
those that stay: what earlier tasks taught is not unlearned.  As an update: U S V - U_0 S_0 V_0.
"""

from __future__ import annotations

import copy
import dataclasses
from typing import Self

import torch
from torch import Tensor, nn

from inlay.core import patterns
from inlay.core.adapter import Delta, Method
from inlay.core.base import Base
from inlay.core.config import PeftType
from inlay.core.errors import UserError
from inlay.core.targeted import BY_LAYER, TargetedConfig


@dataclasses.dataclass(frozen=True, kw_only=True)
class OSFConfig(TargetedConfig):
    """OSF's settings, under PEFT's names and with PEFT's defaults."""

    method = PeftType.OSF

    effective_rank: int | float | None = None
    """Singular vectors K that stay: a count, a share of the smaller side (a number with a point, at
    most 1.0), or nothing: half of them."""
    rank_pattern: dict[str, int | float] | None = None
    """effective_rank of the modules in whose path the key (a regular expression) is found."""
    init_weights: bool | None = True
    """True: what trains starts as W's own. False: random, for tests."""
    target_svd_config: dict[str, int] | None = None
    """PEFT's field, which has no effect there either."""

    unwritten = BY_LAYER

    def __post_init__(self) -> None:
        """Refuse ranks that are none."""
        super().__post_init__()
        given = {"effective_rank": self.effective_rank, **(self.rank_pattern or {})}
        for name, rank in given.items():
            share = isinstance(rank, float) and 0 < rank <= 1
            count = isinstance(rank, int) and not isinstance(rank, bool) and rank >= 1
            if not (rank is None and name == "effective_rank") and not share and not count:
                raise UserError(
                    f"{name}={rank!r} must be a whole number from 1, or a share above 0 and up to "
                    "1.0"
                )

    def at(self, site: str) -> Self:
        """Return the settings at `site`, its own rank resolved; PEFT's keys match anywhere."""
        for key, rank in (self.rank_pattern or {}).items():
            if patterns.fullmatch(f".*(?:{key}).*", site):
                here = copy.copy(self)
                object.__setattr__(here, "effective_rank", rank)
                return here
        return self


class OSF(Delta):
    """The small singular vectors of one layer."""

    on = frozenset({"linear"})
    config: OSFConfig

    def make(self, base: Base) -> None:
        """Make U, S and V; find what they start as, and what stays, which no file holds."""
        most, rank = min(base.shape), self.config.effective_rank
        kept = most // 2 if rank is None else int(most * rank) if isinstance(rank, float) else rank
        kept = min(max(kept, 1), most)
        self.U = self.parameter(base.shape[0], most - kept)
        self.S = self.parameter(most - kept)
        self.V = self.parameter(most - kept, base.shape[1])
        weight = base.weight().detach().to(base.adapter_dtype)
        if weight.is_meta:  # only the sizes count
            outputs, inputs = base.shape
            u, s, v = (weight.new_empty(n) for n in ((outputs, most), (most,), (most, inputs)))
        else:
            u, s, v = torch.linalg.svd(weight, full_matrices=False)
        buffers = {"U0": u[:, kept:], "S0": s[kept:], "V0": v[kept:]}
        # where the small vectors span all that is orthogonal to the large ones, these are not kept
        buffers |= {"Uh": u[:, :kept]} if len(u) > most else {}
        buffers |= {"Vh": v[:kept]} if v.shape[1] > most else {}
        for name, value in buffers.items():
            self.register_buffer(name, value.contiguous(), persistent=False)

    def reset(self, base: Base) -> None:
        """Start from the weight's own vectors: an untrained update changes nothing."""
        super().reset(base)
        for name in "USV":
            parameter, start = self.get_parameter(name), self.get_buffer(f"{name}0")
            if self.config.init_weights is False:
                nn.init.normal_(parameter)
            else:
                with torch.no_grad():
                    parameter.copy_(start)

    def _pairs(self, dtype: torch.dtype) -> list[tuple[Tensor, Tensor]]:
        """Return U S [O, M] and V [M, I]: as they are, and as they were."""
        held = {name: buffer.to(dtype) for name, buffer in self.named_buffers()}
        u0, v0 = held["U0"], held["V0"]
        u = _apart(self.U.to(dtype), u0, held.get("Uh"))
        v = _apart(self.V.to(dtype).T, v0.T, held["Vh"].T if "Vh" in held else None).T
        return [(u * self.S.to(dtype), v), (u0 * held["S0"], v0)]

    def factors(self, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Return [U S, -U_0 S_0] [O, 2 M] and [V; V_0] [2 M, I]."""
        (b, a), (b0, a0) = self._pairs(dtype)
        return torch.cat((b, -b0), 1), torch.cat((a, a0))

    def delta(self, dtype: torch.dtype) -> Tensor:
        """Return U S V - U_0 S_0 V_0, each by itself: exactly zero before training."""
        now, then = (b @ a for b, a in self._pairs(dtype))
        return now - then

    def update(self, base: Base, x: Tensor) -> Tensor:
        """Return the update's share, each product by itself."""
        now, then = (base.up(base.down(x.to(a), a), b) for b, a in self._pairs(self.dtype))
        return now - then

    def keys(self, base: Base) -> dict[str, tuple[str, tuple[int, ...]]]:
        """Return PEFT's names."""
        return {f"osf_svd_params.{name}_low": slot for name, slot in super().keys(base).items()}


def _apart(u: Tensor, small: Tensor, large: Tensor | None) -> Tensor:
    """Return `u` as it is, its gradient without what lies in the large vectors' space.

    Where these are not at hand, what is left of it is its part in the space of the small ones.
    """
    moved = u - u.detach()  # zero, but for the gradient
    if large is None:
        return u.detach() + small @ (small.T @ moved)
    return u.detach() + moved - large @ (large.T @ moved)


METHOD = Method(OSFConfig, OSF)
