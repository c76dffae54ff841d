"""Classification of texts: cross entropy of each row's class, of the model's scores for all.

    loss = sum_b -log softmax(logits_b)[y_b] / norm["rows"]

B rows, K classes: logits [B, K], y [B] the place of each row's label in `labels`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from inlay.core.errors import UserError
from inlay.data.collate import Batch, collate
from inlay.data.encode import Example
from inlay.data.rows import Labeled


@dataclass(frozen=True)
class Classify:
    """Train on the label of each row."""

    labels: list[str] | None = None
    """The classes in the order of the head's outputs; left out = those of the rows, sorted."""

    packing: bool = False
    """Not possible here: rows without padding between them have one result, not one each."""

    row = Labeled
    means = ("rows",)
    task = "SEQ_CLS"

    def __post_init__(self) -> None:
        """Refuse what cannot be; raises UserError naming the field, the value and the limit."""
        if self.packing:
            raise UserError(
                "train.packing is True, but a classifier has one result for a whole packed row; "
                "set packing: false"
            )
        if self.labels is not None and len(set(self.labels)) < max(2, len(self.labels)):
            raise UserError(f"objective.labels is {self.labels!r}; it must be 2 or more, each once")

    def size(self, row: Example) -> int:
        """Return the tokens of `row`."""
        return len(row.input_ids)

    def collate(self, rows: Sequence[Example], tokenizer: Any) -> Batch:
        """Return `rows` padded, with labels [B] in place of one for each token."""
        assert self.labels is not None, "a run fills the labels in from its rows"
        places = {label: i for i, label in enumerate(self.labels)}
        batch = collate(rows, tokenizer)
        targets = torch.tensor([places[str(row.label)] for row in rows])
        return Batch(batch.input_ids, targets, batch.attention_mask, None, batch.rows)

    def prepare(self, policy: nn.Module, batch: Batch) -> Batch:
        """Return `batch` as it is."""
        return batch

    def counts(self, batch: Batch) -> dict[str, Tensor]:
        """Return the rows."""
        return {"rows": torch.tensor(len(batch.labels), device=batch.labels.device)}

    def loss(self, policy: nn.Module, batch: Batch, norm: dict[str, Tensor]) -> Tensor:
        """Return the share of this micro-batch."""
        logits = policy(**batch.inputs()).logits.float()
        total = nn.functional.cross_entropy(logits, batch.labels, reduction="sum")
        return total / norm["rows"].to(total)


OBJECTIVE = Classify
