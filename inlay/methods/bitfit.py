"""BitFit: b -> b', the biases [O] of the model trained in full   (Zaken et al., arXiv:2106.10199).

A model without biases (Llama) has nothing to train here.  PEFT has no such method, only
`bias="all"` beside another one.
"""

from __future__ import annotations

import dataclasses
from typing import ClassVar, Self

from torch import Tensor, nn

from inlay.core.adapter import Method
from inlay.core.base import Base
from inlay.core.beside import Bias
from inlay.core.config import PeftType
from inlay.core.errors import UserError
from inlay.core.targeted import TargetedConfig


@dataclasses.dataclass(frozen=True, kw_only=True)
class BitfitConfig(TargetedConfig):
    """BitFit's settings: the target_modules, or nothing for every layer that has a bias."""

    method = PeftType.BITFIT

    everywhere: ClassVar[bool] = False

    def filled(self, model: nn.Module) -> Self:
        """Return the settings with every layer that has a bias, where none is named."""
        if self.target_modules is not None:
            return self
        ends = {
            # a host of adapters stands for its layer
            path.removesuffix(".base_layer")
            for path, module in model.named_modules()
            if isinstance(module._parameters.get("bias"), Tensor) and ".adapters." not in path
        }
        if not ends:
            raise UserError(
                f"no layer of this {type(model).__name__} has a bias, so BitFit has nothing to "
                "train: take another method, such as ln_tuning"
            )
        return self.replace(target_modules=sorted(ends))


class Bitfit(Bias):
    """The trained bias of one layer."""

    def make(self, base: Base) -> None:
        """Make b' [O]; UserError where the layer has no bias."""
        if base.bias() is None:
            raise UserError(
                f"a {type(base.module).__name__} without a bias has nothing for BitFit to train: "
                "leave it out of target_modules, or name no target_modules"
            )
        super().make(base)


METHOD = Method(BitfitConfig, Bitfit)
