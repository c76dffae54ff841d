"""DoRA: diag(m / |V|) V, V = W + s B A   (Liu et al., arXiv:2402.09353); LoRA's `use_dora`.

m [O] the magnitudes, |V| [O] the norms of V's rows, one for each output: length and direction of a
row are learned apart.  |V| counts as a constant in the backward pass (section 4.3 of the paper), in
`forward` and in `reweight`.  The bias is not scaled.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from inlay.core.adapter import Reweight
from inlay.core.base import Base
from inlay.methods.lora import Lora, LoraConfig


class Dora(Reweight):
    """The direction of one layer, which a LoRA changes, and its magnitudes."""

    on = Lora.on
    config: LoraConfig

    def make(self, base: Base) -> None:
        """Make the LoRA and m [O]."""
        self.lora = Lora(self.config, base, device=self._device)
        self.magnitude = self.parameter(base.shape[0])

    def reset(self, base: Base) -> None:
        """Start from the LoRA's start and the norms that V has with it."""
        self.lora.reset(base)
        with torch.no_grad():
            self.magnitude.copy_(self._norms(base.weight()))

    def reweight(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """Return diag(m / |V|) V, and the LoRA's bias."""
        turned, bias = self.lora.reweight(weight, bias)
        scale = self.magnitude.to(weight.dtype) / turned.detach().norm(dim=1)
        return scale[:, None] * turned, bias

    def rebias(self, base: Base) -> Tensor | None:
        """Return the LoRA's bias: DoRA scales none."""
        return self.lora.rebias(base)

    def forward(self, base: Base, x: Any, *args: Any, **kwargs: Any) -> Any:
        """Return c * (W x + s B A x) + b, c = m / |V|, without making V.

        Dropout is PEFT's: what it leaves of x decides how far c moves W x from where it is, too.
        """
        below, bias = base(x, *args, **kwargs), base.bias()
        scale = self.magnitude / self._norms(base.weight())
        b, a = self.lora.factors(self.magnitude.dtype)
        plain, dropped = below, x
        if x.is_floating_point():
            dropped = x.to(a.dtype)
            if self.training and self.config.lora_dropout:
                dropped = F.dropout(dropped, self.config.lora_dropout)
                plain = base(dropped.to(x.dtype), *args, **kwargs)
        if bias is not None:
            plain = plain - base.spread(bias)
        out = below + base.spread(scale - 1) * plain
        out = out + base.spread(scale) * base.up(base.down(dropped, a), b)
        if self.lora.bias is not None and bias is not None:
            out = out + base.spread(self.lora.bias - bias)
        return out.to(below.dtype)

    @torch.no_grad()
    def _norms(self, weight: Tensor) -> Tensor:
        """Return |V| [O]: |w|^2 + 2 w A^T b + b A A^T b for each row w of W and b of s B."""
        weight = weight.to(self.magnitude.dtype)
        b, a = self.lora.factors(weight.dtype)
        crossed = 2 * weight @ a.T + b @ (a @ a.T)
        squares: Tensor = torch.linalg.vector_norm(weight, dim=1) ** 2 + (crossed * b).sum(1)
        return squares.clamp_min(0).sqrt()

    def keys(self, base: Base) -> dict[str, tuple[str, tuple[int, ...]]]:
        """Return the LoRA's keys, and PEFT's name of the magnitudes."""
        found = {key: (f"lora.{name}", s) for key, (name, s) in self.lora.keys(base).items()}
        _, (outputs, _, *kernel) = base.file_shapes(1)
        shape = (1, outputs, *[1] * len(kernel)) if base.kind == "conv" else (outputs,)
        return {**found, "lora_magnitude_vector": ("magnitude", shape)}
