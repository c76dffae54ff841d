"""Uni-LoRA: W + B A, every entry of B and A one of D numbers that the whole model trains.

Li et al., NeurIPS 2025, arXiv:2506.00799.  A [R, I] and B [O, R] of all layers in a row are P t:
t [D] trains; each row of P has one entry that is not 0, drawn once from a seed, so that entry k is
t[j] / sqrt(n[j]) with j = index[k], and n[j] the entries that take t[j].

Uni-LoRA itself starts beside the base, for t = 0 would have no gradient: B A is not 0.
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
class UniLoraConfig(TargetedConfig):
    """Uni-LoRA's settings, under PEFT's names and with PEFT's defaults."""

    method = PeftType.UNILORA
    unwritten = ("exclude_modules",)

    r: Rank = 4
    """Rank of B A."""
    proj_seed: Seed = 42
    """Seed that the place of each entry in t is drawn from."""
    theta_d_length: Rank = 256
    """Numbers in t: all that train, in the whole model."""
    unilora_dropout: Dropout = 0.0
    """Probability of zeroing an input of the update in training."""
    fan_in_fan_out: bool = False
    """PEFT's note that a weight is stored [in, out]; read from the layer, kept for the files."""
    bias: Literal["none", "all", "unilora_only"] = "none"
    """Which biases train too: none, every one of the model, or those of the adapted layers."""
    init_theta_d_bound: Scale = 0.02
    """t starts evenly between minus this and this."""
    init_weights: bool = True
    """True: t starts in these bounds. False: normal, for tests."""
    save_indices: bool = False
    """Whether a file holds each entry's place; without, they are drawn from the seed again."""

    def __post_init__(self) -> None:
        """Refuse bounds that are not above 0."""
        super().__post_init__()
        if not self.init_theta_d_bound > 0:
            raise UserError(f"init_theta_d_bound={self.init_theta_d_bound!r} must be above 0")


class Theta(Shared):
    """t [D], and where the entries of A and B of each layer lie in it."""

    def __init__(
        self, config: UniLoraConfig, bases: Sequence[Base], device: torch.device | None
    ) -> None:
        """Make t, and draw it unless it is on the meta device."""
        super().__init__()
        where = device or bases[0].device
        length, bound = config.theta_d_length, config.init_theta_d_bound
        start = torch.empty(length, device=where, dtype=bases[0].adapter_dtype)
        if config.init_weights:
            nn.init.uniform_(start, -bound, bound)
        else:
            nn.init.normal_(start)
        self.unilora_theta_d = nn.Parameter(start)
        self._seed, self._sizes = config.proj_seed, [config.r * sum(base.shape) for base in bases]
        self._parts: dict[int, tuple[Tensor, Tensor]] = {}

    def part(self, number: int) -> tuple[Tensor, Tensor]:
        """Return the place in t, and its factor, of each entry of A and B of one layer [R (I + O)].

        They are drawn for all layers at once, and given to each once.
        """
        if number not in self._parts:
            places = _places(sum(self._sizes), len(self.unilora_theta_d), self._seed)
            factors = places.bincount(minlength=len(self.unilora_theta_d)).float().rsqrt()[places]
            parts = zip(*(torch.split(t, self._sizes) for t in (places, factors)), strict=True)
            self._parts = dict(enumerate(parts))
        return self._parts.pop(number)

    def keys(self) -> dict[str, tuple[str, tuple[int, ...]]]:
        """Return PEFT's name of t."""
        return {"unilora_theta_d": ("unilora_theta_d", tuple(self.unilora_theta_d.shape))}


def _places(count: int, length: int, seed: int) -> Tensor:
    """Return `count` places in t [length], each as often as any other or once more, shuffled."""
    import numpy as np  # its generator's numbers are what a seed means in PEFT's files

    generator = np.random.default_rng(seed)
    often, rest = divmod(count, length)
    places = np.repeat(np.arange(length), often)
    if rest:
        places = np.concatenate([places, generator.choice(length, size=rest, replace=False)])
    generator.shuffle(places)
    return torch.from_numpy(places).long()


class UniLora(Delta):
    """The update of one layer."""

    on = frozenset({"linear"})
    starts_neutral = False  # the paper's start: at t = 0 there is no gradient
    drops = "unilora_dropout"
    config: UniLoraConfig
    unilora_indices_A: Tensor
    unilora_indices_B: Tensor
    unilora_scales_A: Tensor
    unilora_scales_B: Tensor

    @classmethod
    def share(
        cls, config: UniLoraConfig, bases: Sequence[Base], *, device: torch.device | None = None
    ) -> Theta:
        """Return t, and the places in it."""
        return Theta(config, bases, device)

    def make(self, base: Base) -> None:
        """Make room for the places of A [R, I] and B [O, R], and for their factors."""
        (outputs, inputs), r = base.shape, self.config.r
        # no file says how large A and B are, so that its rank alone could fill the memory
        if r > max(base.shape):
            raise UserError(f"r={r} is more than a layer {list(base.shape)} has: lower it")
        for name, shape in {"A": (r, inputs), "B": (outputs, r)}.items():
            places = torch.empty(shape, dtype=torch.long, device="meta")
            factors = torch.empty(shape, dtype=base.adapter_dtype, device="meta")
            kept = self.config.save_indices
            self.register_buffer(f"unilora_indices_{name}", places, persistent=kept)
            self.register_buffer(f"unilora_scales_{name}", factors, persistent=kept)

    def complete(self, base: Base) -> None:
        """Draw the places that no file holds; refuse those of a file that are outside of t."""
        if not self.unilora_indices_A.is_meta:
            for name in "AB":
                places = self.get_buffer(f"unilora_indices_{name}")
                if not 0 <= int(places.min()) <= int(places.max()) < self.config.theta_d_length:
                    raise UserError(f"{base.path}.unilora_indices_{name} has places outside of t")
            return
        (theta,) = self._held
        assert isinstance(theta, Theta)
        sizes = [self.unilora_indices_A.numel(), self.unilora_indices_B.numel()]
        kinds = {"indices": torch.long, "scales": base.adapter_dtype}
        for (kind, dtype), drawn in zip(kinds.items(), theta.part(self.number), strict=True):
            for name, part in zip("AB", torch.split(drawn, sizes), strict=True):
                shape = self.get_buffer(f"unilora_{kind}_{name}").shape
                setattr(self, f"unilora_{kind}_{name}", part.view(shape).to(base.device, dtype))

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of t."""
        return self._theta.dtype

    @property
    def _theta(self) -> Tensor:
        return self._held[0].get_parameter("unilora_theta_d")

    def factors(self, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Return B [O, R] and A [R, I]."""
        theta = self._theta.to(self.unilora_indices_A.device, dtype)
        a = theta[self.unilora_indices_A] * self.unilora_scales_A.to(dtype)
        b = theta[self.unilora_indices_B] * self.unilora_scales_B.to(dtype)
        return b, a

    def keys(self, base: Base) -> dict[str, tuple[str, tuple[int, ...]]]:
        """Return PEFT's names, of the places where they are saved."""
        buffers = dict(self.named_buffers(recurse=False)) if self.config.save_indices else {}
        return super().keys(base) | {name: (name, tuple(b.shape)) for name, b in buffers.items()}


METHOD = Method(UniLoraConfig, UniLora)
