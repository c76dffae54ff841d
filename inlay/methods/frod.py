"""FRoD: W = U L V^T becomes U (L' + S) V^T, L' diagonal and S sparse   (AAAI 2026).

Full-rank efficient fine-tuning with rotational degrees, doi.org/10.1609/aaai.v40i31.39813.
V [I, I] is found once for all layers of one role, from their weights; then U [O, I], with columns
of norm 1, and L are a layer's own.  L' [I] and S's entries, at places drawn once from a seed,
train.  What runs is W + U (L' - L + S) V^T: the same, and at the start exactly W.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from inlay.core.adapter import Delta, Method
from inlay.core.base import Base
from inlay.core.config import PeftType
from inlay.core.errors import UserError
from inlay.core.limits import Dropout, Scale, Seed
from inlay.core.targeted import TargetedConfig
from inlay.methods._roles import Roles


@dataclasses.dataclass(frozen=True, kw_only=True)
class FrodConfig(TargetedConfig):
    """FRoD's settings, under PEFT's names and with PEFT's defaults."""

    method = PeftType.FROD
    unwritten = ("exclude_modules",)
    not_yet: ClassVar[dict[str, str]] = {
        "runtime_offload_base_weight": "the base's weight is part of what runs, so it stays"
    }

    projection_prng_key: Seed = 0
    """Seed that the places of S's entries are drawn from."""
    save_projection: bool = True
    """Whether a file holds V and the places; without, they are found again in the base."""
    frod_dropout: Dropout = 0.0
    """Probability of zeroing an input of the update in training."""
    fan_in_fan_out: bool = False
    """PEFT's note that a weight is stored [in, out]; read from the layer, kept for the files."""
    bias: Literal["none", "all", "frod_only"] = "none"
    """Which biases train too: none, every one of the model, or those of the adapted layers."""
    init_weights: bool = True
    """True: L' starts at L and S at zero. False: both random, for tests."""
    sparse_rate: Scale = 0.01
    """Share of S's entries, those on the diagonal left out, that train."""
    regularization_alpha: Scale = 1e-3
    """What is added to a matrix before it is inverted in finding V."""
    progressbar: bool = True
    """PEFT's note that it shows its progress in finding V; kept for the files."""
    runtime_offload_base_weight: bool = False
    """Whether PEFT keeps the base's weight on the CPU; only False."""

    def __post_init__(self) -> None:
        """Refuse shares below 0 or above 1, and a regularization below 0."""
        super().__post_init__()
        if not 0 <= self.sparse_rate <= 1:
            raise UserError(f"sparse_rate={self.sparse_rate!r} must be from 0 to 1")
        if not self.regularization_alpha >= 0:
            raise UserError(f"regularization_alpha={self.regularization_alpha!r} must not be < 0")

    def entries(self, inputs: int) -> int:
        """Return how many entries S [I, I] has."""
        most = inputs * (inputs - 1)
        return min(max(int(inputs * inputs * self.sparse_rate), self.sparse_rate > 0), most)


class Frod(Delta):
    """The update of one layer."""

    on = frozenset({"linear"})
    drops = "frod_dropout"
    config: FrodConfig
    U: Tensor
    start: Tensor

    @classmethod
    def share(
        cls, config: FrodConfig, bases: Sequence[Base], *, device: torch.device | None = None
    ) -> Roles:
        """Return V and the places, of every role."""
        return Roles(config, bases, device)

    def make(self, base: Base) -> None:
        """Make L' [I] and S's entries [N], and room for U [O, I] and L [I]."""
        inputs, dtype = base.shape[1], base.adapter_dtype
        self.frod_lambda_l = self.parameter(inputs)
        self.frod_lambda_s_values = self.parameter(self.config.entries(inputs))
        for name, shape in {"U": base.shape, "start": (inputs,)}.items():
            empty = torch.empty(shape, dtype=dtype, device="meta")
            self.register_buffer(name, empty, persistent=False)

    def complete(self, base: Base) -> None:
        """Find U and L, which no file holds, for V as it is."""
        weight, v = base.weight().detach().double().cpu(), self._v.double().cpu()
        try:
            product = torch.linalg.solve(v, weight.T).T
        except torch.linalg.LinAlgError:
            product = weight @ torch.linalg.pinv(v, rtol=1e-6).T
        norms = product.norm(dim=0)
        self.U = torch.where(norms > 1e-12, product / norms, 0).to(base.device, self.dtype)
        self.start = norms.to(base.device, self.dtype)

    def reset(self, base: Base) -> None:
        """Start from an update of zero."""
        super().reset(base)
        random = 0.0 if self.config.init_weights else 0.1
        nn.init.normal_(self.frod_lambda_s_values, std=random)
        with torch.no_grad():
            self.frod_lambda_l.copy_(self.start + random * torch.randn_like(self.start))

    def _of(self, name: str) -> Tensor:
        (roles,) = self._held
        assert isinstance(roles, Roles)
        return roles.get_buffer(f"{name}_{roles.role_of[self.number]}")

    @property
    def _v(self) -> Tensor:
        return self._of("V")

    def _middle(self, dtype: torch.dtype) -> Tensor:
        """Return L' - L + S [I, I]; dense, for a product faster than a sparse one."""
        change = torch.diag((self.frod_lambda_l - self.start).to(dtype))
        rows, columns = self._of("s_indices").to(change.device)
        return change.index_put((rows, columns), self.frod_lambda_s_values.to(dtype), True)

    def factors(self, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Return U (L' - L + S) [O, I] and V^T [I, I]."""
        u = self.U.to(dtype)
        return u @ self._middle(dtype), self._v.to(u.device, dtype).T

    def update(self, base: Base, x: Tensor) -> Tensor:
        """Return the update's share, from the input's side: the middle is the smaller."""
        h = base.down(self.dropped(x), self._v.to(self.U.device, self.dtype).T)
        return base.up(F.linear(h, self._middle(self.dtype)), self.U)


METHOD = Method(FrodConfig, Frod)
