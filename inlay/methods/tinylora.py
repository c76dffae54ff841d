"""TinyLoRA: W + B (sum_u v_u P_u) A, v shared by layers, all else fixed   (arXiv:2602.04118).

B A is the part of W in its first R singular vectors, with the roots of its singular values in both:
A [R, I], B [O, R].  P [U, R, R] is drawn once from a seed; v [U] trains, one for each group of
layers.  Of an embedding PEFT's files hold A and B of the transposed weight: [R, O] and [I, R].
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor, nn

from inlay.core.adapter import Delta, Method, Shared
from inlay.core.base import Base
from inlay.core.config import PeftType
from inlay.core.errors import UserError
from inlay.core.limits import Dropout, Rank, Scale, Seed
from inlay.core.targeted import TargetedConfig


@dataclasses.dataclass(frozen=True, kw_only=True)
class TinyLoraConfig(TargetedConfig):
    """TinyLoRA's settings, under PEFT's names and with PEFT's defaults."""

    method = PeftType.TINYLORA
    unwritten = ("exclude_modules",)

    r: Rank = 2
    """Singular vectors of a weight that are mixed; at most as many as it has."""
    u: Rank = 64
    """Numbers in one v."""
    weight_tying: Scale = 0.0
    """From 0, where every layer has its own v, to 1, where all share one."""
    projection_seed: Seed = 42
    """Seed of P; layer n of the model draws from the seed plus n."""
    save_projection: bool = True
    """Whether a file holds P; without, it is drawn from the seed again."""
    init_v_bound: Scale = 0.02
    """Where init_weights is "uniform", v starts evenly between minus this and this."""
    tinylora_dropout: Dropout = 0.0
    """Probability of zeroing an input of the update in training."""
    fan_in_fan_out: bool = False
    """PEFT's note that a weight is stored [in, out]; read from the layer, kept for the files."""
    bias: Literal["none", "all", "tinylora_only"] = "none"
    """Which biases train too: none, every one of the model, or those of the adapted layers."""
    init_weights: bool | Literal["uniform"] = True
    """True: v zero. "uniform": small and random. False: normal, for tests."""

    def __post_init__(self) -> None:
        """Refuse shares below 0 or above 1, and bounds below 0."""
        super().__post_init__()
        if not 0 <= self.weight_tying <= 1:
            raise UserError(f"weight_tying={self.weight_tying!r} must be from 0 to 1")
        if not self.init_v_bound >= 0:
            raise UserError(f"init_v_bound={self.init_v_bound!r} must be at least 0")


class Vectors(Shared):
    """v [U] of each group: layers that follow each other."""

    def __init__(
        self, config: TinyLoraConfig, bases: Sequence[Base], device: torch.device | None
    ) -> None:
        """Make them, and draw them unless they are on the meta device."""
        super().__init__()
        self._groups = max(1, round(len(bases) * (1 - config.weight_tying)))
        self._size = len(bases) // self._groups
        for group in range(self._groups):
            where, dtype = device or bases[0].device, bases[0].adapter_dtype
            start = torch.zeros(config.u, device=where, dtype=dtype)
            if config.init_weights == "uniform":
                nn.init.uniform_(start, -config.init_v_bound, config.init_v_bound)
            elif not config.init_weights:
                nn.init.normal_(start)
            self.register_parameter(f"v_{group}", nn.Parameter(start))

    def of(self, number: int) -> nn.Parameter:
        """Return the v of a layer."""
        return self.get_parameter(f"v_{min(number // self._size, self._groups - 1)}")

    def keys(self) -> dict[str, tuple[str, tuple[int, ...]]]:
        """Return PEFT's names, which number the groups."""
        return {f"tinylora_v.{n[2:]}": (n, tuple(v.shape)) for n, v in self.named_parameters()}


class TinyLora(Delta):
    """The update of one layer."""

    on = frozenset({"linear", "embedding"})
    drops = "tinylora_dropout"
    config: TinyLoraConfig
    tinylora_A: Tensor
    tinylora_B: Tensor
    tinylora_P: Tensor

    @classmethod
    def share(
        cls, config: TinyLoraConfig, bases: Sequence[Base], *, device: torch.device | None = None
    ) -> Vectors:
        """Return the vectors of all groups."""
        return Vectors(config, bases, device)

    def make(self, base: Base) -> None:
        """Make room for A, B and P, none of which trains."""
        outputs, inputs = base.shape
        self.lies = base.kind == "embedding"
        if self.lies:
            outputs, inputs = inputs, outputs
        r = min(self.config.r, *base.shape)
        shapes = {"A": (r, inputs), "B": (outputs, r), "P": (self.config.u, r, r)}
        for name, shape in shapes.items():
            empty = torch.empty(shape, dtype=base.adapter_dtype, device="meta")
            kept = name != "P" or self.config.save_projection
            self.register_buffer(f"tinylora_{name}", empty, persistent=kept)

    def complete(self, base: Base) -> None:
        """Find A and B in the weight, and draw P, where no file holds them."""
        device, dtype, r = base.device, base.adapter_dtype, len(self.tinylora_A)
        if self.tinylora_A.is_meta:
            weight = base.weight().detach().float()
            left, values, right = torch.linalg.svd(weight.T if self.lies else weight, False)
            roots = values[:r].sqrt()
            self.tinylora_A = (roots[:, None] * right[:r]).to(dtype)
            self.tinylora_B = (left[:, :r] * roots).to(dtype)
        if self.tinylora_P.is_meta:
            # on the CPU and in float32 wherever it goes, so that a seed means the same numbers
            generator = torch.Generator().manual_seed(self.config.projection_seed + self.number)
            drawn = torch.normal(0.0, r**-0.5, self.tinylora_P.shape, generator=generator)
            self.tinylora_P = drawn.to(device, dtype)

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of v."""
        return self._v.dtype

    @property
    def _v(self) -> nn.Parameter:
        (vectors,) = self._held
        assert isinstance(vectors, Vectors)
        return vectors.of(self.number)

    def factors(self, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Return B (sum_u v_u P_u) [O, R] and A [R, I]; of an embedding the transposed product."""
        p = self.tinylora_P.to(dtype)
        mixed = torch.tensordot(self._v.to(p.device, dtype), p, 1)
        a, b = self.tinylora_A.to(dtype), self.tinylora_B.to(dtype)
        return ((mixed @ a).T, b.T) if self.lies else (b @ mixed, a)

    def keys(self, base: Base) -> dict[str, tuple[str, tuple[int, ...]]]:
        """Return PEFT's names: of A and B, and of P where it is saved."""
        names = ("A", "B", "P") if self.config.save_projection else ("A", "B")
        buffers = {n: self.get_buffer(n) for n in (f"tinylora_{name}" for name in names)}
        return super().keys(base) | {n: (n, tuple(b.shape)) for n, b in buffers.items()}


METHOD = Method(TinyLoraConfig, TinyLora)
