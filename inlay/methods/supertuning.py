"""Super-Tuning: W + S + s B A, S with entries where |W| is largest only   (arXiv:2607.09287).

S [O, I] has N = (1 - sparsity) O I entries that train, at the places of the largest |W| (or the
smallest).  With a rank r ("Supra") a LoRA is added: A [R, I], B [O, R], s = lora_alpha / r.
"""

from __future__ import annotations

import dataclasses
import math

import torch
from torch import Tensor, nn

from inlay.core.adapter import Delta, Method
from inlay.core.base import Base
from inlay.core.config import PeftType
from inlay.core.errors import UserError
from inlay.core.limits import Dropout, Rank, Scale
from inlay.core.targeted import BY_LAYER, TargetedConfig


@dataclasses.dataclass(frozen=True, kw_only=True)
class SupertuningConfig(TargetedConfig):
    """Super-Tuning's settings, under PEFT's names and with PEFT's defaults."""

    method = PeftType.SUPERTUNING

    sparsity: Dropout = 0.99
    """Share of the weight's entries that stay: 0.99 trains one in a hundred."""
    select_top: bool = True
    """True: the entries of largest magnitude train. False: those of the smallest."""
    r: Rank | None = None
    """Rank of a LoRA beside the entries; unset = none."""
    lora_alpha: Scale | None = None
    """Numerator of the LoRA's scale; unset = 2 r."""
    lora_dropout: Dropout = 0.0
    """Probability of zeroing an input of the LoRA in training."""
    init_weights: bool = True
    """True: the entries and B start at zero. False: all random, for tests."""
    save_precomputed_indices: bool = True
    """Whether a file holds the places; without, they are found in the weight again."""

    unwritten = BY_LAYER

    def __post_init__(self) -> None:
        """Give the LoRA its usual scale; refuse one without a rank."""
        super().__post_init__()
        if self.r is None and self.lora_alpha is not None:
            raise UserError(f"lora_alpha={self.lora_alpha!r} needs r, the rank of the LoRA")
        if self.r is not None and self.lora_alpha is None:
            object.__setattr__(self, "lora_alpha", 2 * self.r)


class Supertuning(Delta):
    """The sparse update of one layer, and its LoRA where there is one."""

    on = frozenset({"linear"})
    drops = "lora_dropout"
    config: SupertuningConfig
    supertuning_indices: Tensor

    def make(self, base: Base) -> None:
        """Make the entries [N], their places [N] counted row by row, A and B."""
        config, self._shape = self.config, base.shape
        count = int(math.prod(self._shape) * (1 - config.sparsity))
        if count < 1:
            raise UserError(
                f"sparsity={config.sparsity} leaves no entry of a layer {list(self._shape)} to "
                f"train: take at most {1 - 1 / math.prod(self._shape):.6f}"
            )
        self.supertuning_values = self.parameter(count)
        found = torch.empty(count, dtype=torch.int32, device=self._device)
        if not found.is_meta or not config.save_precomputed_indices:
            size = base.weight().detach().abs().flatten()
            found = size.topk(count, largest=config.select_top).indices.to(torch.int32)
        kept = config.save_precomputed_indices
        self.register_buffer("supertuning_indices", found, persistent=kept)
        r = config.r or 0
        self.supertuning_lora_A = self.parameter(r, base.shape[1]) if r else None
        self.supertuning_lora_B = self.parameter(base.shape[0], r) if r else None

    def reset(self, base: Base) -> None:
        """Start from entries of zero and a LoRA of zero."""
        super().reset(base)
        nn.init.normal_(self.supertuning_values, std=0.0 if self.config.init_weights else 1.0)
        if self.supertuning_lora_A is not None and self.supertuning_lora_B is not None:
            nn.init.kaiming_uniform_(self.supertuning_lora_A, a=math.sqrt(5))
            nn.init.kaiming_uniform_(self.supertuning_lora_B, a=math.sqrt(5))
            if self.config.init_weights:
                nn.init.zeros_(self.supertuning_lora_B)

    def _sparse(self, dtype: torch.dtype) -> Tensor:
        """Return S [O, I]."""
        empty = torch.zeros(math.prod(self._shape), device=self.supertuning_values.device)
        values = self.supertuning_values.to(dtype)
        places = self.supertuning_indices.long()
        return empty.to(dtype).index_put((places,), values, accumulate=True).reshape(self._shape)

    def _lora(self, dtype: torch.dtype) -> tuple[Tensor, Tensor] | None:
        """Return s B and A, where there is a LoRA."""
        if self.supertuning_lora_A is None or self.supertuning_lora_B is None:
            return None
        scale = (self.config.lora_alpha or 0) / (self.config.r or 1)
        return scale * self.supertuning_lora_B.to(dtype), self.supertuning_lora_A.to(dtype)

    def delta(self, dtype: torch.dtype) -> Tensor:
        """Return S + s B A [O, I]."""
        lora = self._lora(dtype)
        return self._sparse(dtype) if lora is None else self._sparse(dtype) + lora[0] @ lora[1]

    def update(self, base: Base, x: Tensor) -> Tensor:
        """Return S x + s B (A x); only the LoRA's input is dropped."""
        lora, dtype = self._lora(self.dtype), self.dtype
        out = base.apply(x.to(dtype), self._sparse(dtype))
        return out if lora is None else out + base.up(base.down(self.dropped(x), lora[1]), lora[0])

    def keys(self, base: Base) -> dict[str, tuple[str, tuple[int, ...]]]:
        """Return PEFT's names: a LoRA's factors are linear layers, and the places are saved too."""
        found = {
            name + ".weight" * name.startswith("supertuning_lora"): slot
            for name, slot in super().keys(base).items()
        }
        if self.config.save_precomputed_indices:
            places = tuple(self.supertuning_indices.shape)
            found["supertuning_indices"] = ("supertuning_indices", places)
        return found


METHOD = Method(SupertuningConfig, Supertuning)
