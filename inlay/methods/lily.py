"""Lily: W x + s (sum_n p_n B_n)^T A x, A shared by neighboring layers, the experts B_n by all.

Zhong et al., arXiv:2407.09946.  A [R, I], one for each `stride_A` layers of a name; N experts
B_n [R, O], the same for all layers of a name; p [N] = mean over a row's tokens of softmax(Q A x),
with the router Q [N, R] of a layer's own.  The authors' code and PEFT take the mean over the whole
batch, so that a row depends on the rows beside it; here it is what it would be alone.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Annotated, Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from inlay.core.adapter import Method, Shared, Wrap
from inlay.core.base import Base, Kind
from inlay.core.config import PeftType
from inlay.core.limits import Rank, Scale, Whole
from inlay.core.targeted import TargetedConfig


@dataclasses.dataclass(frozen=True, kw_only=True)
class LilyConfig(TargetedConfig):
    """Lily's settings, under PEFT's names and with PEFT's defaults."""

    method = PeftType.LILY

    r: Rank = 32
    """Rank of the update: higher than LoRA's, for there are fewer matrices."""
    stride_A: Rank = 1
    """How many layers that follow each other, of those of one name, share an A."""
    num_B: Annotated[int, Whole(least=2)] = 2
    """How many experts the layers of one name share."""
    scaling: Scale = 1.0
    """The factor s of the update."""
    init_weights: bool = True
    """True: B zero. False: B random too, for tests."""


class Experts(Shared):
    """The matrices A and B, and which of them each layer takes, in the layers' order."""

    def __init__(self, config: LilyConfig, bases: Sequence[Base], device: torch.device | None):
        """Make them for all layers; without memory on the meta device."""
        super().__init__()
        self.names: list[tuple[str, str]] = []
        counts: dict[tuple[str, tuple[int, ...]], int] = {}
        groups: dict[tuple[str, tuple[int, ...]], int] = {}
        for base in bases:
            key = _name(config.target_modules, base.path), tuple(base.shape)
            group, number = groups.setdefault(key, len(groups)), counts.get(key, 0)
            counts[key] = number + 1
            a, b = f"A_{group}_{number // config.stride_A}", f"B_{group}"
            outputs, inputs = base.shape
            shapes = {a: (config.r, inputs), b: (config.num_B * config.r, outputs)}
            for name, shape in shapes.items():
                if name not in self._parameters:
                    empty = torch.empty(
                        shape, device=device or base.device, dtype=base.adapter_dtype
                    )
                    self.register_parameter(name, nn.Parameter(empty))
                    _start(empty, filled=name == a or not config.init_weights)
            self.names.append((a, b))


def _name(targets: list[str] | str | None, path: str) -> str:
    """Return the name that the layer at `path` was chosen by; layers of one name share."""
    if isinstance(targets, str):
        return targets
    return max((t for t in targets or () if f".{path}".endswith(f".{t}")), key=len, default="")


def _start(matrix: Tensor, *, filled: bool) -> None:
    if not matrix.is_meta:
        nn.init.kaiming_uniform_(matrix, a=math.sqrt(5)) if filled else nn.init.zeros_(matrix)


class Lily(Wrap):
    """The router of one layer."""

    on: ClassVar[frozenset[Kind]] = frozenset({"linear"})
    sees_rows = True  # a router's mean over the row's tokens
    config: LilyConfig

    @classmethod
    def share(
        cls, config: Any, bases: Sequence[Base], *, device: torch.device | None = None
    ) -> Experts:
        """Return A and B of all layers."""
        return Experts(config, bases, device)

    def make(self, base: Base) -> None:
        """Make Q [N, R]."""
        self.router = self.parameter(self.config.num_B, self.config.r)

    def reset(self, base: Base) -> None:
        """Start Q at random; that nothing is added is B's doing."""
        nn.init.kaiming_uniform_(self.router, a=math.sqrt(5))

    @property
    def _names(self) -> tuple[str, str]:
        """What this layer's A and B are called in what the layers share."""
        (held,) = self._held
        assert isinstance(held, Experts)
        return held.names[self.number]

    def _matrices(self) -> tuple[Tensor, Tensor]:
        """Return A [R, I] and the experts, one under the other [N R, O]."""
        a, b = (self._held[0].get_parameter(name) for name in self._names)
        return a, b

    def forward(self, base: Base, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Return base(x) and the update by each row's mix of the experts, in its dtype."""
        out: Tensor = base(x, *args, **kwargs)
        a, b = self._matrices()
        h = base.down(x.to(a.dtype), a).reshape(len(x), -1, self.config.r)
        mix = F.linear(h, self.router).softmax(-1).mean(1)
        experts = b.view(self.config.num_B, self.config.r, -1)
        share = h @ (mix @ experts.flatten(1)).view(len(x), self.config.r, -1)
        return (out + self.config.scaling * share.view(out.shape)).to(out.dtype)

    def keys(self, base: Base) -> dict[str, tuple[str, tuple[int, ...]]]:
        """Return PEFT's names; its files hold what layers share once for each of them."""
        del base
        a, b = zip(self._names, self._matrices(), strict=True)
        return {
            "lily_A.weight": (f"{Shared.lent_as}.{a[0]}", tuple(a[1].shape)),
            "lily_B.weight": (f"{Shared.lent_as}.{b[0]}", tuple(b[1].shape)),
            "lily_router.weight": ("router", tuple(self.router.shape)),
        }


METHOD = Method(LilyConfig, Lily)
