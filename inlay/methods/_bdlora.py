"""BD-LoRA: W + s B A with A, or B, block-diagonal of N blocks; LoRA's `use_bdlora`.

Wang et al., arXiv:2510.23346.  A [R, I] holds N blocks [R/N, I/N], kept as [R, I/N]; or B [O, R] N
blocks [O/N, R/N], kept as [O, R/N].  A server that cuts the layer over N devices then needs of the
update what is on each, and no further exchange between them.
"""

from __future__ import annotations

import torch
from torch import Tensor

from inlay.core.adapter import Delta
from inlay.core.base import Base
from inlay.core.errors import UserError
from inlay.core.numbers import check_divides
from inlay.methods._starts import BD_LISTS, BdLoraConfig
from inlay.methods.lora import LoraConfig, draw, named_as_modules


class BDLora(Delta):
    """The update of one layer, of which one factor consists of blocks."""

    on = frozenset({"linear"})
    drops = "lora_dropout"
    config: LoraConfig

    def make(self, base: Base) -> None:
        """Make the factors; UserError for a layer in both lists, or of another width."""
        (outputs, inputs), r, blocks = base.shape, self.config.r, self.config.use_bdlora
        assert isinstance(blocks, BdLoraConfig)
        found = [any(part in base.path for part in getattr(blocks, f) or ()) for f in BD_LISTS]
        if all(found) or (blocks.match_strict and not any(found)):
            raise UserError(
                f"use_bdlora: {base.path!r} is in {'both' if all(found) else 'neither'} of "
                f"{' and '.join(BD_LISTS)}: name it in one, or set match_strict to false"
            )
        self._blocks = [blocks.nblocks if cut else 1 for cut in found]
        for n, width in zip(self._blocks, (inputs, outputs), strict=True):
            check_divides("use_bdlora: nblocks", n, r, width)
        self.lora_A = self.parameter(r, inputs // self._blocks[0])
        self.lora_B = self.parameter(outputs, r // self._blocks[1])

    def reset(self, base: Base) -> None:
        """Make A random and B zero."""
        super().reset(base)
        draw(self.config, self.lora_A, self.lora_B)

    def factors(self, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Return s B and A, with zeros beside their blocks."""
        a, b = (
            torch.block_diag(*kept.to(dtype).chunk(n))  # type: ignore[no-untyped-call]
            for kept, n in zip((self.lora_A, self.lora_B), self._blocks, strict=True)
        )
        return self.config.scaling * b, a

    def keys(self, base: Base) -> dict[str, tuple[str, tuple[int, ...]]]:
        """Return PEFT's names."""
        return named_as_modules(super().keys(base))
