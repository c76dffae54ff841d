"""Next-token cross entropy: the share of a batch, and what it is a mean over.

    loss = sum_t w_t * -log softmax(logits_t)[input_ids_{t+1}] / norm["tokens"]      over the t
    whose label is trained

Labels are aligned with input_ids; the shift by one happens here and nowhere else, and tokens are
counted after it. B rows, S positions, N trained positions, V vocabulary.
"""

from __future__ import annotations

import math
import weakref
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from inlay.core.errors import UserError
from inlay.kernels.linear_cross_entropy import linear_cross_entropy
from inlay.model.fast import inference
from inlay.model.output import Output, base_of, find_output, shortened, takes_positions
from inlay.model.ranks import penalties

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
    # no cache: with one, transformers takes reset position_ids for one row, and packed rows would
    # see each other
    call = {**batch.inputs(), "use_cache": False}
    output = find_output(policy, call) if fast else None
    total = _summed(policy, call, batch.labels, getattr(batch, "weights", None), output)
    # a step that trains nothing at all has norm 0 and total 0
    return total / norm["tokens"].to(total).clamp(min=torch.finfo(total.dtype).tiny)


def _summed(
    policy: nn.Module,
    call: dict[str, Any],
    labels: Tensor,
    weights: Tensor | None,
    output: Output | None,
) -> Tensor:
    """Return the sum over the trained tokens of policy(**call), its head `output` if there is one.

    labels, weights [B, S].
    """
    trained = labels[:, 1:] != IGNORED
    targets = labels[:, 1:][trained]
    factors = None if weights is None else weights[:, 1:][trained]
    # the head computes only positions at which some row is trained: of assistant-only data that is
    # a fraction, and in small models the head is a large part of the time and most of the memory
    asked = trained.any(0).nonzero().squeeze(1)
    if takes_positions(policy):
        call, trained = {**call, "logits_to_keep": asked}, trained[:, asked]
    if output is None:
        rows = _at(policy(**call).logits, trained)
        return _cross_entropy(rows.float(), targets, factors)
    return linear_cross_entropy(
        _at(output.states(policy, call), trained),
        output.head.weight,
        targets,
        bias=output.head.bias,
        factors=factors,
        scale=output.scale,
        cap=output.cap,
    )


def causal_lm_loss(model: nn.Module, batch: Mapping[str, Any]) -> Tensor:
    """Return model(**batch).loss, of a decoder without the logits of all its tokens.

    batch: arguments of a call by name, as transformers takes them: input_ids and labels [B, S], and
    num_items_in_batch where the mean is over more than this batch. Head and loss are computed
    together for the trained tokens. Where the model's own loss is another than that of next tokens,
    as trying it once tells, or where its head cannot be told apart, this is its own.

    UserError without labels.
    """
    labels = batch.get("labels")
    if not isinstance(labels, Tensor):
        raise UserError(
            "the batch has no tensor of labels: give labels=input_ids to train on every token, "
            "-100 in the places of the others"
        )
    call = {k: v for k, v in batch.items() if k not in ("labels", "num_items_in_batch")}
    output = _known_output(model, call, labels)
    if output is None:
        own: Tensor = model(**batch).loss
        return own
    total = _summed(model, call, labels, None, output)
    count = batch.get("num_items_in_batch")
    loss = total / ((labels[:, 1:] != IGNORED).sum() if count is None else count)
    roster = getattr(model, "roster", None)
    if model.training and torch.is_grad_enabled() and roster is not None:
        loss = sum((penalty() for penalty in penalties(roster)), loss)
    return loss


_NEXT_TOKEN: weakref.WeakKeyDictionary[nn.Module, bool] = weakref.WeakKeyDictionary()
"""Model -> whether its loss is the mean over the next tokens."""


@torch.no_grad()
def _known_output(model: nn.Module, call: dict[str, Any], labels: Tensor) -> Output | None:
    """Return the head of a model whose loss is that of next tokens; None of any other."""
    ids, base = call.get("input_ids"), base_of(model)
    if not isinstance(ids, Tensor) or ids.shape != labels.shape or ids.shape[1] < 2:
        return None
    if _is_changed(model, call):
        return None
    output = find_output(model, call)
    if output is not None and base not in _NEXT_TOKEN:
        _NEXT_TOKEN[base] = _gives_their_mean(model, call, output)
    return output if output is not None and _NEXT_TOKEN[base] else None


def _gives_their_mean(model: nn.Module, call: Mapping[str, Any], output: Output) -> bool:
    """Return whether the loss that `model` gives itself is the mean over the next tokens."""
    # a beginning that is padding tells nothing
    short = shortened({k: v for k, v in call.items() if k != "attention_mask"})
    ids = short["input_ids"]
    with inference(model):
        own = float(model(**short, labels=ids).loss)
        mean = float(_summed(model, short, ids, None, output)) / ids[:, 1:].numel()
    # accelerate puts an autocast of its own around a model's forward
    half = torch.is_autocast_enabled(ids.device.type) or "forward" in vars(model)
    near = 0.02 if half or output.head.weight.dtype.itemsize < 4 else 1e-4
    return math.isclose(own, mean, rel_tol=near)


def _is_changed(model: nn.Module, call: Mapping[str, Any]) -> bool:
    """Return whether the loss is to be another than the architecture's own over the next tokens."""
    base, roster = base_of(model), getattr(model, "roster", None)
    config: Any = getattr(base, "config", None)
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    return (
        not {"logits_to_keep", "shift_labels", "output_router_logits"}.isdisjoint(call)
        or getattr(text, "output_router_logits", False)
        or "_loss_function" in vars(base)  # one that was set
        or (roster is not None and "" in roster.hosts)  # virtual tokens: the last predicts one too
    )


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
