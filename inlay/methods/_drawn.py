"""Frozen matrices that all layers share, drawn once from a seed: a file holds them, or the seed."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from inlay.core.adapter import Shared
from inlay.core.base import Base


def largest(bases: Sequence[Base]) -> tuple[int, int]:
    """Return the largest O and the largest I, which need not be one layer's."""
    outputs, inputs = (max(base.shape[side] for base in bases) for side in (0, 1))
    return outputs, inputs


class Drawn(Shared):
    """Buffers by name, drawn in their order from `config.projection_prng_key`."""

    def __init__(
        self,
        config: Any,
        bases: Sequence[Base],
        device: torch.device | None,
        **shapes: tuple[int, ...],
    ) -> None:
        """Draw all, or on the meta device only say their sizes."""
        super().__init__()
        self.config, self._device, self._dtype = config, bases[0].device, bases[0].adapter_dtype
        for name, shape in shapes.items():
            empty = torch.empty(shape, device="meta", dtype=self._dtype)
            self.register_buffer(name, empty, persistent=config.save_projection)
        if device is None or device.type != "meta":
            self.complete()

    def draw(self, shape: torch.Size, generator: torch.Generator) -> Tensor:
        """Return one of them: uniform of variance 2 / its last dimension."""
        return nn.init.kaiming_uniform_(torch.empty(shape), generator=generator)

    def complete(self) -> None:
        """Draw what has no memory yet: all, for a file has all or none."""
        if not all(buffer.is_meta for buffer in self.buffers()):
            return
        # on the CPU and in float32 wherever they go, so that a seed means the same numbers
        generator = torch.Generator().manual_seed(self.config.projection_prng_key)
        for name, empty in dict(self.named_buffers()).items():
            setattr(self, name, self.draw(empty.shape, generator).to(self._device, self._dtype))

    def keys(self) -> dict[str, tuple[str, tuple[int, ...]]]:
        """Return PEFT's names, where they are saved."""
        if not self.config.save_projection:
            return {}
        return {name: (name, tuple(tensor.shape)) for name, tensor in self.named_buffers()}
