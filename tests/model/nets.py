"""A small model of two blocks, and what the tests do to its adapters."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from inlay.methods.lora import LoraConfig
from inlay.model.roster import Roster


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(4, 6)
        self.down = nn.Linear(6, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.down(self.up(x).tanh())


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = Block(), Block()
        self.norm = nn.LayerNorm(4)
        self.head = nn.Linear(4, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.norm(self.second(self.first(x))))


def config(*names: str, **settings: Any) -> LoraConfig:
    return LoraConfig(target_modules=list(names), r=2, init_lora_weights=False, **settings)


def shake(roster: Roster, name: str, seed: int = 0) -> None:
    """Give the adapter values of its own, also where it starts as a copy of the base's."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for _, _, adapter in roster.adapters(name):
            for parameter in adapter.parameters():
                parameter.add_(torch.randn(parameter.shape, generator=generator) / 2)


def trace(model: nn.Module) -> Any:
    """Return all that must come back: modules, parameters, flags, modes, values."""
    return (
        [(n, id(m), m.training) for n, m in model.named_modules()],
        [(n, id(p), p.requires_grad) for n, p in model.named_parameters()],
        {n: t.tolist() for n, t in model.state_dict().items()},
    )
