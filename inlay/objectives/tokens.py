"""Next-token cross entropy: the share of a batch, and what it is a mean over.

    loss = sum_t w_t * -log softmax(logits_t)[input_ids_{t+1}] / norm["tokens"]      over the t
    whose label is trained

Labels are aligned with input_ids; the shift by one happens here and nowhere else, and tokens are
counted after it. B rows, S positions, N trained positions, V vocabulary.
"""

from __future__ import annotations

import inspect
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


def token_loss(
    policy: nn.Module, batch: Batch, norm: dict[str, Tensor], *, fast: bool = True
) -> Tensor:
    """Return the share of `batch` in the mean over norm["tokens"], a float32 scalar.

    Where N = 0 it is a 0 that hangs on the graph.
    """
    del fast  # there is one path so far
    trained = batch.labels[:, 1:] != IGNORED
    # the head computes only positions at which some row is trained: of assistant-only data that is
    # a fraction, and in small models the head is a large part of the time and most of the memory
    asked = trained.any(0).nonzero().squeeze(1)
    kept = {"logits_to_keep": asked} if _takes_positions(policy) else {}
    # no cache: with one, transformers takes reset position_ids for one row, and packed rows would
    # see each other
    logits = policy(**batch.inputs(), use_cache=False, **kept).logits
    if not kept:  # virtual tokens come before those of the batch
        logits = logits[:, -batch.labels.shape[1] :]
    # only the N trained rows of V numbers reach float32
    rows = logits[trained[:, asked]] if kept else logits[:, :-1][trained]
    rows, targets = rows.float(), batch.labels[:, 1:][trained]
    weights = getattr(batch, "weights", None)
    if weights is None:
        total = nn.functional.cross_entropy(rows, targets, reduction="sum")
    else:
        each = nn.functional.cross_entropy(rows, targets, reduction="none")
        total = (each * weights[:, 1:][trained].to(each)).sum()
    # a step that trains nothing at all has norm 0 and total 0
    return total / norm["tokens"].to(total).clamp(min=torch.finfo(total.dtype).tiny)


def _takes_positions(policy: nn.Module) -> bool:
    # a PeftModel hands its arguments on to the base
    base = getattr(policy, "get_base_model", None)
    model = policy if base is None else base()
    return "logits_to_keep" in inspect.signature(model.forward).parameters
