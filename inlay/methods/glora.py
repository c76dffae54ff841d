"""GLoRA: W + W * A + B and b + b * D + E + W C   (Chavan et al., arXiv:2306.07967).

Products marked * are taken entry by entry.  A and B [O, I] are low-rank (Xd Xu), a column [O, 1], a
number, or nothing; C [I, 1] is low-rank, a column or nothing; D and E [O] are vectors, numbers or
nothing.  C, D and E are nothing where the layer has no bias.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from inlay.core.adapter import Method, Reweight
from inlay.core.base import Base
from inlay.core.config import PeftType
from inlay.core.limits import Rank
from inlay.core.targeted import BY_LAYER, TargetedConfig


@dataclasses.dataclass(frozen=True, kw_only=True)
class GloraConfig(TargetedConfig):
    """GLoRA's settings, under PEFT's names and with PEFT's defaults."""

    method = PeftType.GLORA

    r: Rank = 8
    """Rank of the parts that are low-rank."""
    bias: str = "none"
    """PEFT's field for training biases in full."""
    config_A_B: Literal["lora", "vector", "constant", "none"] = "lora"
    """What A and B are: low-rank, one number an output, one number, or nothing."""
    config_C: Literal["lora", "vector", "none"] = "lora"
    """What C is: low-rank, one number an input, or nothing."""
    config_D_E: Literal["vector", "constant", "none"] = "constant"
    """What D and E are: one number an output, one number, or nothing."""
    init_weights: bool = True
    """True: no change; of what is low-rank, one factor is random. False: all is, for tests."""

    not_yet: ClassVar[dict[str, str]] = {"bias": "E trains a layer's bias; say config_D_E='vector'"}
    unwritten = BY_LAYER


class Glora(Reweight):
    """The five parts of one layer."""

    on = frozenset({"linear"})
    config: GloraConfig

    def make(self, base: Base) -> None:
        """Make the parts; one that is nothing is zeros that do not train, as files have them."""
        config = self.config
        outputs, inputs = base.shape
        biased = base.bias() is not None
        forms = {
            "A": (config.config_A_B, (outputs, inputs)),
            "B": (config.config_A_B, (outputs, inputs)),
            "C": (config.config_C if biased else "none", (inputs, 1)),
            "D": (config.config_D_E if biased else "none", (outputs,)),
            "E": (config.config_D_E if biased else "none", (outputs,)),
        }
        for part, (form, shape) in forms.items():
            if form == "lora":
                self.register_parameter(f"{part}_Xd", self.parameter(shape[0], config.r))
                self.register_parameter(f"{part}_Xu", self.parameter(config.r, shape[1]))
            elif form == "vector":
                column = (shape[0], 1) if len(shape) == 2 else shape
                self.register_parameter(f"{part}_X", self.parameter(*column))
            elif form == "constant":
                self.register_parameter(f"{part}_X", self.parameter(1))
            else:
                like = self.parameter(0)
                zeros = torch.zeros(shape, device=like.device, dtype=like.dtype)
                self.register_buffer(f"{part}_zeros", zeros)

    def reset(self, base: Base) -> None:
        """Start from no change."""
        del base
        for name, parameter in self.named_parameters():
            if self.config.init_weights and not name.endswith("Xu"):
                nn.init.zeros_(parameter)
            elif parameter.ndim == 1:
                nn.init.normal_(parameter, std=0.02)
            else:
                nn.init.kaiming_uniform_(parameter, a=math.sqrt(5))

    def _part(self, part: str, dtype: torch.dtype) -> Tensor:
        held: Any = self._parameters | self._buffers
        if f"{part}_Xd" in held:
            down, up = held[f"{part}_Xd"], held[f"{part}_Xu"]
            return torch.mm(down.to(dtype), up.to(dtype))
        one: Tensor = held.get(f"{part}_X", held.get(f"{part}_zeros"))
        return one.to(dtype)

    def reweight(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """Return W + W * A + B, and b + b * D + E + W C where there is a bias."""
        a, b, c, d, e = (self._part(part, weight.dtype) for part in "ABCDE")
        own = None if bias is None else bias + bias * d + e + (weight @ c).squeeze(-1)
        return weight + weight * a + b, own

    def keys(self, base: Base) -> dict[str, tuple[str, tuple[int, ...]]]:
        """Return PEFT's names: each part is a module with its tensors, zeros included."""
        del base
        held = [*self.named_parameters(), *self.named_buffers()]
        return {f"glora_{n.replace('_', '.', 1)}": (n, tuple(t.shape)) for n, t in held}


METHOD = Method(GloraConfig, Glora)
