"""KaSA: W - D + s B diag(d) A, D the parts of W of its R smallest singular values; `kasa_config`.

Wang et al., arXiv:2412.06071.  A [R, I], B [O, R], d [R]; D = U_0 V_0, U_0 [O, R], V_0 [R, I].  The
base stays whole, for the other adapters: D is taken off beside the update.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from inlay.core.adapter import Delta
from inlay.core.base import Base
from inlay.core.errors import UserError
from inlay.methods._starts import KasaConfig
from inlay.methods.lora import LoraConfig, draw, named_as_modules


class Kasa(Delta):
    """The update of one layer, and what it takes off the weight before it is trained."""

    on = frozenset({"linear"})
    drops = "lora_dropout"
    starts_neutral = False
    config: LoraConfig
    lost_A: Tensor | None
    lost_B: Tensor | None

    def make(self, base: Base) -> None:
        """Make A [R, I], B [O, R] and d [R]; UserError where the rank would leave nothing of W."""
        (outputs, inputs), r = base.shape, self.config.r
        if r >= min(outputs, inputs):
            raise UserError(
                f"kasa_config takes {r} singular values off a weight {[outputs, inputs]}, and has "
                f"to leave some: r={min(outputs, inputs) - 1} at most"
            )
        self.lora_A = self.parameter(r, inputs)
        self.lora_B = self.parameter(outputs, r)
        self.lora_diag = self.parameter(r)
        self.register_buffer("lost_A", None, persistent=False)
        self.register_buffer("lost_B", None, persistent=False)

    @torch.no_grad()
    def complete(self, base: Base) -> None:
        """Find D."""
        weight = base.weight()
        wide = weight.to(torch.promote_types(weight.dtype, torch.float32))
        u, s, v = torch.linalg.svd(wide, full_matrices=False)
        own, r = base.adapter_dtype, self.config.r
        self.lost_B = (u[:, -r:] * s[-r:]).to(own).contiguous()
        self.lost_A = v[-r:].to(own).contiguous()

    def reset(self, base: Base) -> None:
        """Make A and d random, and B zero."""
        super().reset(base)
        draw(self.config, self.lora_A, self.lora_B)
        nn.init.normal_(self.lora_diag)

    def factors(self, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Return [s B diag(d), -U_0] and [A; V_0]."""
        lost_b, lost_a = self._lost()
        scaled = self.config.scaling * (self.lora_B.to(dtype) * self.lora_diag.to(dtype))
        b = torch.cat([scaled, -lost_b.to(dtype)], dim=1)
        return b, torch.cat([self.lora_A.to(dtype), lost_a.to(dtype)])

    def update(self, base: Base, x: Tensor) -> Tensor:
        """Return s B (d * A x), less D x, which dropout leaves alone."""
        lost_b, lost_a = self._lost()
        lost = base.up(base.down(x.to(self.dtype), lost_a), lost_b)
        inner = base.down(self.dropped(x), self.lora_A) * self.lora_diag
        return base.up(inner, self.lora_B) * self.config.scaling - lost

    def _lost(self) -> tuple[Tensor, Tensor]:
        b, a = self.lost_B, self.lost_A
        assert b is not None
        assert a is not None
        return b, a

    def penalty(self) -> Tensor:
        """Return beta |d|^2 + gamma (|B^T B - I| + |A A^T - I|), in float32."""
        told, d = self.config.kasa_config, self.lora_diag.float()
        assert isinstance(told, KasaConfig)
        a, b, one = self.lora_A.float(), self.lora_B.float(), torch.eye(len(d), device=d.device)
        apart = (b.T @ b - one).norm() + (a @ a.T - one).norm()
        total: Tensor = told.beta * d.square().sum() + told.gamma * apart
        return total

    def keys(self, base: Base) -> dict[str, tuple[str, tuple[int, ...]]]:
        """Return PEFT's names."""
        return named_as_modules(super().keys(base))
