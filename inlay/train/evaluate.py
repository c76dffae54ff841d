"""The loss on held-out rows, over all their trained tokens, and its perplexity."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from inlay.model.fast import inference
from inlay.train.distributed import add_up, rank, world
from inlay.train.precision import autocast, device_of
from inlay.train.step import total_counts


@dataclass(frozen=True)
class Score:
    """A loss in nats, and what it is the mean over."""

    loss: float
    tokens: float

    @property
    def perplexity(self) -> float:
        """Exponential of the loss; infinite where that overflows."""
        return math.exp(self.loss) if self.loss < 700 else math.inf


@torch.no_grad()
def evaluate_loss(
    model: nn.Module,
    tokenizer: Any,
    objective: Any,
    examples: Sequence[Any],
    *,
    batch_size: int = 8,
    precision: torch.dtype = torch.float32,
) -> Score:
    """Return the mean loss over every counted token of `examples`, all ranks together; dropout off.

    It is a mean over tokens, not over batches, so that batch_size does not change it. Nothing
    counted: loss 0.
    """
    device = device_of(model)
    rows = sorted(examples, key=objective.size)
    cut = [rows[i : i + batch_size] for i in range(0, len(rows), batch_size)][rank() :: world()]
    with inference(model):
        batches = [
            objective.prepare(model, objective.collate(part, tokenizer).to(device)) for part in cut
        ]
        norm = total_counts(objective, batches, device)
        total = torch.zeros((), device=device)
        for batch in batches:
            with autocast(precision, device):
                total += objective.loss(model, batch, norm).float()
    return Score(float(add_up(total)), sum(float(count) for count in norm.values()))
