"""Heads that no checkpoint brings: drawn from a seed, so that a run can be told again.

W ~ N(0, initializer_range^2), b = 0, as transformers draws them (Devlin et al., arXiv:1810.04805);
but of a seed of their own, and anew where several runs share one loaded base.
"""

from __future__ import annotations

import hashlib
from collections.abc import Collection
from typing import Any

import torch
from torch import nn


def head_seed(seed: int) -> int:
    """Return the seed of the heads of a run with this seed, unlike that of its adapter."""
    return int.from_bytes(hashlib.sha256(f"head {seed}".encode()).digest()[:8], "big") >> 1


@torch.no_grad()
def draw_heads(model: nn.Module, names: Collection[str], seed: int) -> None:
    """Fill the parameters of `model` called `names` from `seed` alone."""
    config: Any = getattr(model, "config", None)
    deviation = float(getattr(config, "initializer_range", None) or 0.02)
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in sorted(model.named_parameters()):
        if name not in names:
            continue
        if parameter.ndim > 1:
            drawn = torch.empty(parameter.shape).normal_(0.0, deviation, generator=generator)
            parameter.copy_(drawn)
        else:  # a norm's scale is called weight too
            parameter.fill_(1.0 if name.endswith("weight") else 0.0)
