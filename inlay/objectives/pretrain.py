"""Continued pretraining: next-token cross entropy over every token, masks and weights aside."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor, nn

from inlay.data.collate import Batch, collate
from inlay.data.encode import Example
from inlay.data.pack import pack
from inlay.data.rows import Text
from inlay.objectives.tokens import count_tokens, token_loss


@dataclass(frozen=True)
class Pretrain:
    """Train on all of the text."""

    packing: bool = False
    """Join a micro-batch into one row without padding; rows do not see each other, so that only the
    speed differs."""

    fast: bool = True
    """Compute head and loss together where the head is found; false = the model's own logits."""

    row = Text
    means = ("tokens",)
    task = "CAUSAL_LM"

    def size(self, row: Example) -> int:
        """Return the tokens of `row`."""
        return len(row.input_ids)

    def collate(self, rows: Sequence[Example], tokenizer: Any) -> Batch:
        """Return `rows` with every token trained, padded, or packed into one row [1, T]."""
        unmasked = [replace(row, labels=row.input_ids, weights=None) for row in rows]
        if self.packing:
            return pack(unmasked, max_tokens=sum(map(self.size, unmasked)))
        return collate(unmasked, tokenizer)

    def prepare(self, policy: nn.Module, batch: Batch) -> Batch:
        """Return `batch` as it is."""
        return batch

    def counts(self, batch: Batch) -> dict[str, Tensor]:
        """Return all tokens but the first of each row, which nothing predicts."""
        return count_tokens(batch)

    def loss(self, policy: nn.Module, batch: Batch, norm: dict[str, Tensor]) -> Tensor:
        """Return the share of this micro-batch."""
        return token_loss(policy, batch, norm, fast=self.fast)


OBJECTIVE = Pretrain
