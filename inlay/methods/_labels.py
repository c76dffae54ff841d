"""CPT's loss: the labels of the context count beside the input's, those far before it less.

V tokens of context, T of input; a token's type counts on by 4 from example to example.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

LABEL, INPUT = 0, 2
"""The types of a label's and of an input's tokens, modulo 4; the others are of templates."""


def widened(
    labels: Tensor, types: Tensor | None, ids: Tensor, own: Tensor
) -> tuple[Tensor, Tensor]:
    """Return labels and types [B, V + T] of context and input; no labels but label tokens.

    labels [B, T]; types [B, T] of the input, all label tokens where unset; ids and own [V] the
    context's tokens and their types.
    """
    types = torch.full_like(labels, 4) if types is None else types.to(labels)
    types = F.pad(types, (labels.shape[1] - types.shape[1], 0))
    # the input's come after the context's; PEFT loses the label type where the last is no 4
    last = int(own.max() + 3) // 4 * 4
    types = torch.cat([own.expand(len(labels), -1), torch.where(types > 0, types + last, 0)], 1)
    whole = torch.cat([ids.expand(len(labels), -1), labels], 1)
    return torch.where((types > 0) & (types % 4 == LABEL), whole, -100), types


def weighted(logits: Tensor, labels: Tensor, types: Tensor, factor: float) -> Tensor:
    """Return the mean cross entropy of the labels, `factor` for each example after a label's own.

    logits [B, more than V + T, vocabulary], of which the last count; labels, types [B, V + T].
    """
    logits = logits[:, -labels.shape[1] :][:, :-1].float()
    labels, types = labels[:, 1:], types[:, 1:]
    losses = F.cross_entropy(logits.transpose(1, 2), labels, reduction="none")
    seen = labels != -100
    return (losses * _weights(types, factor) * seen).sum() / seen.sum()


def _weights(types: Tensor, factor: float) -> Tensor:
    weights = torch.ones(types.shape, device=types.device)
    if factor != 1.0:
        for row, own in enumerate(types):
            labels = own[(own > 0) & (own % 4 == LABEL)].unique()
            later = len(labels) - 1 - torch.searchsorted(labels, own)
            weights[row] = factor ** later.clamp(min=0)
    return weights
