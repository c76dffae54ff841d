"""Next-token cross entropy: the share of a batch, and what it is a mean over.

    loss = sum_t w_t * -log softmax(logits_t)[input_ids_{t+1}] / norm["tokens"]      over the t
    whose label is trained

Labels are aligned with input_ids; the shift by one happens here and nowhere else, and tokens are
counted after it. B rows, S positions, N trained positions, V vocabulary.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from inlay.data.collate import Batch

IGNORED = -100


def count_tokens(batch: Batch) -> dict[str, Tensor]:
    """Return {"tokens": weights of the trained tokens, summed} (their number without weights)."""
    trained = batch.labels[:, 1:] != IGNORED
    weights = getattr(batch, "weights", None)
    total = trained.sum() if weights is None else weights[:, 1:][trained].sum()
    return {"tokens": total}


def token_loss(policy: nn.Module, batch: Batch, norm: dict[str, Tensor]) -> Tensor:
    """Return the share of `batch` in the mean over norm["tokens"], a float32 scalar.

    Where N = 0 it is a 0 that hangs on the graph.
    """
    # no cache: with one, transformers takes reset position_ids for one row, and packed rows would
    # see each other
    logits = policy(**batch.inputs(), use_cache=False).logits
    trained = batch.labels[:, 1:] != IGNORED
    # only the N trained rows of V numbers reach float32: on assistant-only data that is most of the
    # memory saved
    rows = logits[:, :-1][trained].float()
    targets = batch.labels[:, 1:][trained]
    weights = getattr(batch, "weights", None)
    if weights is None:
        total = nn.functional.cross_entropy(rows, targets, reduction="sum")
    else:
        each = nn.functional.cross_entropy(rows, targets, reduction="none")
        total = (each * weights[:, 1:][trained].to(each)).sum()
    # a step that trains nothing at all has norm 0 and total 0
    return total / norm["tokens"].to(total).clamp(min=torch.finfo(total.dtype).tiny)
