"""VB-LoRA: W + B A, cut into vectors that are mixed from a few of one bank   (arXiv:2405.15179).

Li et al., NeurIPS 2024.  Each V numbers of A [R, I] along I, and of B [O, R] along O, are
sum_k softmax(z)_k bank_k over the K largest of their logits z [N].  The bank [N, V] is shared by
all layers; it and the logits train: A's [R, I/V, N], B's [O/V, R, N].

As the paper does, it starts beside the base: a bank of zeros would have no gradient.
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
from inlay.core.limits import Dropout, Rank, Scale
from inlay.core.numbers import check_divides
from inlay.core.targeted import TargetedConfig

FEW = {torch.uint8: 2**8, torch.int16: 2**15}
"""The dtypes that PEFT's files hold indices in, with the vectors each is good for; else int32."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class VBLoRAConfig(TargetedConfig):
    """VB-LoRA's settings, under PEFT's names and with PEFT's defaults."""

    method = PeftType.VBLORA

    r: Rank = 4
    """Rank of B A."""
    num_vectors: Rank = 256
    """Vectors in the bank, N."""
    vector_length: Rank = 256
    """Length of each, V, which must divide both sides of every adapted layer."""
    topk: Rank = 2
    """Vectors that one stretch is mixed from, K."""
    save_only_topk_weights: bool = False
    """Whether a file holds only the K weights of each stretch: it is small, and cannot train on."""
    vblora_dropout: Dropout = 0.0
    """Probability of zeroing an input of the update in training."""
    fan_in_fan_out: bool = False
    """PEFT's note that a weight is stored [in, out]; read from the layer, kept for the files."""
    bias: Literal["none", "all", "vblora_only"] = "none"
    """Which biases train too: none, every one of the model, or those of the adapted layers."""
    init_vector_bank_bound: Scale = 0.02
    """The bank starts evenly between minus this and this."""
    init_logits_std: Scale = 0.1
    """Standard deviation that the logits start with."""

    def __post_init__(self) -> None:
        """Refuse more vectors than the bank has, and starts below 0."""
        super().__post_init__()
        if self.topk > self.num_vectors:
            raise UserError(f"topk={self.topk} is more than the num_vectors={self.num_vectors}")
        for name in ("init_vector_bank_bound", "init_logits_std"):
            if not getattr(self, name) >= 0:
                raise UserError(f"{name}={getattr(self, name)!r} must be at least 0")


class Bank(Shared):
    """The vectors [N, V]."""

    def __init__(self, config: VBLoRAConfig, base: Base, device: torch.device | None) -> None:
        """Make them, and draw them unless they are on the meta device."""
        super().__init__()
        shape, bound = (config.num_vectors, config.vector_length), config.init_vector_bank_bound
        start = torch.empty(shape, device=device or base.device, dtype=base.adapter_dtype)
        self.vblora_vector_bank = nn.Parameter(nn.init.uniform_(start, -bound, bound))

    def keys(self) -> dict[str, tuple[str, tuple[int, ...]]]:
        """Return PEFT's name of the bank."""
        return {"vblora_vector_bank": ("vblora_vector_bank", tuple(self.vblora_vector_bank.shape))}


class VBLora(Delta):
    """The update of one layer."""

    on = frozenset({"linear"})
    starts_neutral = False  # the paper's start: a bank of zeros would have no gradient
    drops = "vblora_dropout"
    config: VBLoRAConfig
    final = False
    """Whether a file held the weights of the K vectors alone, so that no other can be learned."""

    @classmethod
    def share(
        cls, config: VBLoRAConfig, bases: Sequence[Base], *, device: torch.device | None = None
    ) -> Bank:
        """Return the bank."""
        return Bank(config, bases[0], device)

    def make(self, base: Base) -> None:
        """Make the logits, of A [R, I/V, N] and of B [O/V, R, N]."""
        config, (outputs, inputs) = self.config, base.shape
        length = config.vector_length
        check_divides("vector_length", length, outputs, inputs)
        self.vblora_logits_A = self.parameter(config.r, inputs // length, config.num_vectors)
        self.vblora_logits_B = self.parameter(outputs // length, config.r, config.num_vectors)
        if config.save_only_topk_weights:
            kind = next((d for d, most in FEW.items() if config.num_vectors < most), torch.int32)
            for name, logits in self._logits().items():
                shape, k = logits.shape[:-1], config.topk
                chosen = torch.empty(*shape, k, dtype=kind, device="meta")
                weights = torch.empty(*shape, k - 1, dtype=logits.dtype, device="meta")
                self.register_buffer(f"{name}_topk_indices", chosen, persistent=False)
                self.register_buffer(f"{name}_topk_weights", weights, persistent=False)

    def _logits(self) -> dict[str, nn.Parameter]:
        return {name: self.get_parameter(name) for name in ("vblora_logits_A", "vblora_logits_B")}

    def reset(self, base: Base) -> None:
        """Start from random logits."""
        super().reset(base)
        for logits in self._logits().values():
            nn.init.normal_(logits, std=self.config.init_logits_std)

    def complete(self, base: Base) -> None:
        """Find the logits where a file holds the weights of the K vectors alone."""
        if not self.config.save_only_topk_weights:
            return
        for name, old in self._logits().items():
            chosen = self.get_buffer(f"{name}_topk_indices")
            if chosen.is_meta:
                return
            weights = self.get_buffer(f"{name}_topk_weights")
            if not 0 <= int(chosen.min()) <= int(chosen.max()) < self.config.num_vectors:
                raise UserError(f"{name}_topk_indices names vectors that the bank has not")
            # the weights sum to 1, so that the last one is not in the file; rounded, it may be < 0
            last = (1 - weights.sum(-1, keepdim=True)).clamp(min=0)
            logits = torch.full(old.shape, -torch.inf, dtype=old.dtype, device=chosen.device)
            logits.scatter_(-1, chosen.long(), torch.cat([weights, last], -1).log())
            self.register_parameter(name, nn.Parameter(logits, old.requires_grad))
        self.final = True

    def _mixed(self, logits: Tensor, dtype: torch.dtype) -> Tensor:
        """Return the vectors [.., V] of logits [.., N]."""
        # chosen before a narrower dtype can make two logits equal
        top, chosen = logits.topk(self.config.topk)
        bank = self._held[0].get_parameter("vblora_vector_bank").to(logits.device, dtype)
        return (top.to(dtype).softmax(-1)[..., None] * bank[chosen]).sum(-2)

    def factors(self, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Return B [O, R] and A [R, I]."""
        if self.final and self.training and self.vblora_logits_A.requires_grad:
            raise UserError(
                "an adapter saved with save_only_topk_weights cannot be trained further: load it "
                "without is_trainable, or train one that was saved with all its logits"
            )
        a, b = (self._mixed(logits, dtype) for logits in self._logits().values())
        return b.transpose(1, 2).flatten(0, 1), a.flatten(1)

    def keys(self, base: Base) -> dict[str, tuple[str, tuple[int, ...]]]:
        """Return PEFT's names; those of the K vectors' weights are made anew from the logits."""
        found = super().keys(base)
        if not self.config.save_only_topk_weights:
            return found
        for name, logits in self._logits().items():
            if not self.final and not logits.is_meta:
                top, chosen = logits.detach().topk(self.config.topk)
                indices = self.get_buffer(f"{name}_topk_indices")
                setattr(self, f"{name}_topk_indices", chosen.to(indices.dtype))
                setattr(self, f"{name}_topk_weights", top.softmax(-1)[..., :-1])
            del found[name]
            for part in (f"{name}_topk_indices", f"{name}_topk_weights"):
                found[part] = (part, tuple(self.get_buffer(part).shape))
        return found


METHOD = Method(VBLoRAConfig, VBLora)
