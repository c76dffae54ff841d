"""PEANuT: W + s (f(W^T) B^T)^T, f a small network over W itself (Zhong et al., arXiv:2410.01870).

f(v) for a column v of W [O]: h = act(A v); then for each layer of `depth` h = act(E_i h), and back
again h = act(D_i h) + what h was before the matching E.   A [R, O], E_i and D_i [R, R], B [O, R].
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from inlay.core.adapter import Method, Reweight
from inlay.core.base import Base
from inlay.core.config import PeftType
from inlay.core.limits import Rank, Scale
from inlay.core.numbers import check_one_of, check_whole
from inlay.core.targeted import TargetedConfig

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": F.relu,
    "gelu": F.gelu,
    "gelu_new": lambda x: F.gelu(x, approximate="tanh"),
    "gelu_pytorch_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "leaky_relu": F.leaky_relu,
    "linear": lambda x: x,
    "mish": F.mish,
    "relu2": lambda x: F.relu(x).square(),
    "relu6": F.relu6,
    "sigmoid": torch.sigmoid,
    "silu": F.silu,
    "swish": F.silu,
    "tanh": torch.tanh,
}
"""transformers' names of activations -> what they are."""
MOST_DEPTH = 64
"""Largest depth: a network deeper than the model it adapts only costs memory."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class PeanutConfig(TargetedConfig):
    """PEANuT's settings, under PEFT's names and with PEFT's defaults."""

    method = PeftType.PEANUT

    r: Rank = 32
    """Width R of the network."""
    depth: int = 0
    """Hidden layers on each side of the network's middle."""
    act_fn: str = "relu"
    """The network's activation, by transformers' name."""
    scaling: Scale = 1.0
    """The factor s of the update."""
    init_weights: bool = True
    """True: all Kaiming-uniform, but B zero. False: B random too, for tests."""

    def __post_init__(self) -> None:
        """Refuse widths, depths and activations that cannot be."""
        super().__post_init__()
        check_whole("depth", self.depth, least=0, most=MOST_DEPTH)
        check_one_of("act_fn", self.act_fn, ACTIVATIONS)


class Peanut(Reweight):
    """The network over one layer's weight."""

    keeps_bias = True
    on = frozenset({"linear"})
    config: PeanutConfig

    def make(self, base: Base) -> None:
        """Make A [R, O], the hidden layers [depth, R, R] and B [O, R]."""
        config = self.config
        r, outputs = config.r, base.shape[0]
        self.peanut_A = self.parameter(r, outputs)
        self.peanut_B = self.parameter(outputs, r)
        for part in ("encoders", "decoders"):
            for i in range(config.depth):
                self.register_parameter(f"peanut_{part}_{i}", self.parameter(r, r))

    def reset(self, base: Base) -> None:
        """Draw all at random but B, which is zero: an untrained update changes nothing."""
        del base
        for parameter in self.parameters():
            nn.init.kaiming_uniform_(parameter, a=math.sqrt(5))
        if self.config.init_weights:
            nn.init.zeros_(self.peanut_B)

    def _hidden(self, part: str, i: int, h: Tensor) -> Tensor:
        layer = self.get_parameter(f"peanut_{part}_{i}").to(h.dtype)
        return ACTIVATIONS[self.config.act_fn](F.linear(h, layer))

    def reweight(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """Return W + s (f(W^T) B^T)^T, and the bias as it is."""
        config = self.config
        h = ACTIVATIONS[config.act_fn](weight.T @ self.peanut_A.to(weight.dtype).T)  # [I, R]
        before = []
        for i in range(config.depth):
            before.append(h)
            h = self._hidden("encoders", i, h)
        for i in range(config.depth):
            h = self._hidden("decoders", i, h) + before.pop()
        return weight + config.scaling * (self.peanut_B.to(weight.dtype) @ h.T), bias

    def keys(self, base: Base) -> dict[str, tuple[str, tuple[int, ...]]]:
        """Return PEFT's names: each part is a linear layer, the hidden ones in a list."""
        return {
            name.replace("coders_", "coders.") + ".weight": slot
            for name, slot in super().keys(base).items()
        }


METHOD = Method(PeanutConfig, Peanut)
