"""Examples -> one padded batch.      B rows, S tokens of the longest row."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from inlay.data.encode import IGNORED, Example


@dataclass(frozen=True)
class Batch:
    """What a model and an objective read."""

    input_ids: Tensor
    """[B, S] long."""
    labels: Tensor
    """[B, S] long, aligned with input_ids, -100 where nothing is trained; or [B], a class a row."""
    attention_mask: Tensor | None
    """[B, S] long, 0 at padding; None in a packed batch, where it would join the rows."""
    position_ids: Tensor | None
    """[B, S] long in a packed batch, from 0 in each of its rows; else None."""
    rows: tuple[str, ...]
    """The rows by name, file:line."""
    weights: Tensor | None = None
    """[B, S] float32, factor of each token in the loss; None where all are 1."""

    def to(self, device: torch.device | str) -> Batch:
        """Return the batch with its tensors on `device`."""
        names = ("input_ids", "labels", "attention_mask", "position_ids", "weights")
        tensors = {name: getattr(self, name) for name in names}
        moved = {name: value.to(device) for name, value in tensors.items() if value is not None}
        return replace(self, **moved)

    def inputs(self) -> dict[str, Tensor]:
        """Return what the model's forward takes; call it with use_cache=False beside."""
        inputs = {"input_ids": self.input_ids}
        if self.attention_mask is not None:
            inputs["attention_mask"] = self.attention_mask
        if self.position_ids is not None:
            inputs["position_ids"] = self.position_ids
        return inputs


def collate(rows: Sequence[Example], tokenizer: Any) -> Batch:
    """Return `rows` padded on the right to the longest.

    What is padding is said by position alone, so a pad token that is also EOS does no harm, and a
    tokenizer without a pad token needs none.
    """
    width = max(len(row.input_ids) for row in rows)
    pad = pad_id(tokenizer)

    def padded(values: Sequence[float], fill: float) -> list[float]:
        return [*values, *[fill] * (width - len(values))]

    weights = None
    if any(row.weights for row in rows):
        weights = torch.tensor(
            [padded(row.weights or [1.0] * len(row.input_ids), 0.0) for row in rows]
        )
    return Batch(
        input_ids=torch.tensor([padded(row.input_ids, pad) for row in rows]),
        labels=torch.tensor([padded(row.labels, IGNORED) for row in rows]),
        attention_mask=torch.tensor([padded([1] * len(row.input_ids), 0) for row in rows]),
        position_ids=None,
        rows=tuple(str(row.source) for row in rows),
        weights=weights,
    )


def pad_id(tokenizer: Any) -> int:
    """Return the id to fill with: PAD, else EOS, else 0; always one that the vocabulary has."""
    for name in ("pad_token_id", "eos_token_id"):
        index = getattr(tokenizer, name, None)
        # resized tokenizers carry a PAD that the model has no row for; EOS is always inside
        if isinstance(index, int):
            return index
    return 0
