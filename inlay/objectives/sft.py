"""Supervised fine-tuning: next-token cross entropy over the tokens that the rows' masks train."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from inlay.data.collate import Batch, collate
from inlay.data.encode import Example
from inlay.data.pack import pack
from inlay.data.rows import Chat
from inlay.objectives.tokens import count_tokens, token_loss


@dataclass(frozen=True)
class Sft:
    """Train on what each row's labels say."""

    packing: bool = False
    """Join a micro-batch into one row without padding; rows do not see each other, so that only the
    speed differs."""

    fast: bool = True
    """Compute head and loss together where the head is found; false = the model's own logits."""

    row = Chat
    means = ("tokens",)
    task = "CAUSAL_LM"

    def size(self, row: Example) -> int:
        """Return the tokens of `row`."""
        return len(row.input_ids)

    def collate(self, rows: Sequence[Example], tokenizer: Any) -> Batch:
        """Return `rows` as one padded batch, or packed into one row [1, T]."""
        if self.packing:
            return pack(rows, max_tokens=sum(map(self.size, rows)))
        return collate(rows, tokenizer)

    def prepare(self, policy: nn.Module, batch: Batch) -> Batch:
        """Return `batch` as it is."""
        return batch

    def counts(self, batch: Batch) -> dict[str, Tensor]:
        """Return the trained tokens."""
        return count_tokens(batch)

    def loss(self, policy: nn.Module, batch: Batch, norm: dict[str, Tensor]) -> Tensor:
        """Return the share of this micro-batch."""
        return token_loss(policy, batch, norm, fast=self.fast)


OBJECTIVE = Sft
