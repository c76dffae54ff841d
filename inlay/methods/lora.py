"""LoRA: W + s B A, with s = alpha / r, or alpha / sqrt(r).   A [R, I], B [O, R].

Hu et al., arXiv:2106.09685; the square root is rsLoRA's, arXiv:2312.03732.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from inlay.core.adapter import Adapter, Delta, Method
from inlay.core.base import Base
from inlay.methods._lora_config import LoraConfig as LoraConfig


class Lora(Delta):
    """The update s B A of one layer; where it has a start B_0 A_0 of the base's, s (B A - B_0 A_0).

    Subtracting the start is the same as taking it off the base, which then need not change.
    """

    config: LoraConfig
    start_A: Tensor | None
    start_B: Tensor | None

    def make(self, base: Base) -> None:
        """Make A [R, I] and B [O, R]."""
        out_features, in_features = base.shape
        self.lora_A = self.parameter(self.config.r, in_features)
        self.lora_B = self.parameter(out_features, self.config.r)
        if self.config.init_lora_weights == "mica":
            self.frozen = ("lora_B",)
        self.register_buffer("start_A", None, persistent=False)
        self.register_buffer("start_B", None, persistent=False)

    def reset(self, base: Base) -> None:
        """Make one factor random and the other zero: an untrained update changes nothing.

        On an embedding it is A, the side of the ids, that is zero, so that a token's first step is
        its own.
        """
        super().reset(base)
        if base.kind != "embedding":
            draw(self.config, self.lora_A, self.lora_B)
            return
        nn.init.normal_(self.lora_B)
        zero = nn.init.zeros_ if self.config.init_lora_weights else nn.init.normal_
        zero(self.lora_A)

    def delta(self, dtype: torch.dtype) -> Tensor:
        """Return s B A [O, I], less the start."""
        product = self.lora_B.to(dtype) @ self.lora_A.to(dtype)
        if self.start_A is not None and self.start_B is not None:
            product = product - self.start_B.to(dtype) @ self.start_A.to(dtype)
        return self.config.scaling * product

    def factors(self, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Return s B [O, R] and A [R, I]; with a start, [s B, -s B_0] and [A; A_0]."""
        b, a = self.lora_B.to(dtype), self.lora_A.to(dtype)
        if self.start_A is not None and self.start_B is not None:
            b = torch.cat([b, -self.start_B.to(dtype)], dim=1)
            a = torch.cat([a, self.start_A.to(dtype)])
        return self.config.scaling * b, a

    def update(self, base: Base, x: Tensor) -> Tensor:
        """Return s B (A x), never the product of the two; less the start's, undropped."""
        begun = None
        if x.is_floating_point():
            x = x.to(self.lora_A.dtype)
            if self.start_A is not None and self.start_B is not None:
                begun = base.up(base.down(x, self.start_A), self.start_B)
            if self.config.lora_dropout:  # at 0 torch would still draw a mask and keep it
                x = F.dropout(x, self.config.lora_dropout, self.training)
        # scaled last, in PEFT's order: the same bits for the same adapter
        out = base.up(base.down(x, self.lora_A), self.lora_B)
        return (out if begun is None else out - begun) * self.config.scaling

    def lent(self) -> dict[str, Tensor]:
        """Return the factors of the transposed update, which a tied head has."""
        return dict(zip(NAMES, (self.lora_B.T, self.lora_A.T), strict=True))

    def keys(self, base: Base) -> dict[str, tuple[str, tuple[int, ...]]]:
        """Return PEFT's names; a convolution's factors are convolutions in the file."""
        found = super().keys(base)
        del found["lora_A"], found["lora_B"]
        names = ("lora_embedding_A", "lora_embedding_B") if base.kind == "embedding" else NAMES
        for key, name, shape in zip(
            names, ("lora_A", "lora_B"), base.file_shapes(self.config.r), strict=True
        ):
            found[key] = (name, shape)
        return found


NAMES = ("lora_A.weight", "lora_B.weight")


def draw(config: LoraConfig, a: Tensor, b: Tensor) -> None:
    """Fill A [R, I] at random and B [O, R] with zeros, where the settings do not say otherwise."""
    init = config.init_lora_weights
    if init == "gaussian":
        nn.init.normal_(a, std=1 / config.r)
    else:
        nn.init.kaiming_uniform_(a, a=math.sqrt(5))
    nn.init.zeros_(b) if init else nn.init.kaiming_uniform_(b, a=math.sqrt(5))


def named_as_modules(
    keys: Mapping[str, tuple[str, tuple[int, ...]]],
) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Return an adapter's keys with those of A and B as PEFT has them, of modules."""
    return {f"{key}.weight" if key in ("lora_A", "lora_B") else key: keys[key] for key in keys}


def _chosen(config: LoraConfig) -> type[Adapter]:
    """Return what the configuration makes of LoRA; the files of its variants need this one."""
    if config.init_lora_weights == "loftq":
        from inlay.methods._loftq import LoftQ

        return LoftQ
    if config.use_dora:
        from inlay.methods._dora import Dora

        return Dora
    if config.lora_bias:
        from inlay.methods._lora_bias import BiasedLora

        return BiasedLora
    if config.use_qalora:
        from inlay.methods._qalora import QALora

        return QALora
    if config.use_bdlora:
        from inlay.methods._bdlora import BDLora

        return BDLora
    if config.kasa_config:
        from inlay.methods._kasa import Kasa

        return Kasa
    if config.alora_invocation_tokens:
        from inlay.methods._alora import ALora

        return ALora
    return Lora


METHOD = Method(LoraConfig, Lora, _chosen)
