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

from inlay.kernels.linear_cross_entropy import linear_cross_entropy
from inlay.model.output import find_output, takes_positions

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

    Where N = 0 it is a 0 that hangs on the graph. fast: where the model's head can be told apart,
    it is computed together with the loss, for the trained positions alone.
    """
    trained = batch.labels[:, 1:] != IGNORED
    targets, weights = batch.labels[:, 1:][trained], getattr(batch, "weights", None)
    factors = None if weights is None else weights[:, 1:][trained]
    # no cache: with one, transformers takes reset position_ids for one row, and packed rows would
    # see each other
    call = {**batch.inputs(), "use_cache": False}
    output = find_output(policy, call) if fast else None
    # the head computes only positions at which some row is trained: of assistant-only data that is
    # a fraction, and in small models the head is a large part of the time and most of the memory
    asked = trained.any(0).nonzero().squeeze(1)
    if takes_positions(policy):
        call, trained = {**call, "logits_to_keep": asked}, trained[:, asked]
    if output is None:
        rows = _at(policy(**call).logits, trained)
        total = _cross_entropy(rows.float(), targets, factors)
    else:
        total = linear_cross_entropy(
            _at(output.states(policy, call), trained),
            output.head.weight,
            targets,
            bias=output.head.bias,
            factors=factors,
            scale=output.scale,
            cap=output.cap,
        )
    # a step that trains nothing at all has norm 0 and total 0
    return total / norm["tokens"].to(total).clamp(min=torch.finfo(total.dtype).tiny)


def _at(found: Tensor, trained: Tensor) -> Tensor:
    """Return the N trained rows of `found` [B, more than S, X]; trained [B, S].

    What it has more is virtual tokens at the beginning, and the last position.
    """
    width = trained.shape[1]
    if found.shape[1] != width:
        found = found[:, -width - 1 : -1]
    return found[trained]


def _cross_entropy(rows: Tensor, targets: Tensor, factors: Tensor | None) -> Tensor:
    if factors is None:
        return nn.functional.cross_entropy(rows, targets, reduction="sum")
    each = nn.functional.cross_entropy(rows, targets, reduction="none")
    return (each * factors.to(each)).sum()
