"""The class that a classifier gives each row, and how often it is the right one.

F1 of a class is 2 TP / (2 TP + FP + FN), macro-F1 its mean over the classes of the rows.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from inlay.model.fast import inference
from inlay.train.precision import autocast, device_of


@torch.no_grad()
def predict(
    model: nn.Module,
    tokenizer: Any,
    objective: Any,
    examples: Sequence[Any],
    *,
    batch_size: int,
    dtype: torch.dtype = torch.float32,
) -> list[str]:
    """Return the likeliest label of each of `examples`, in their order; dropout off."""
    device = device_of(model)
    found = [""] * len(examples)
    # rows of like length together: less padding
    order = sorted(range(len(examples)), key=lambda i: objective.size(examples[i]))
    with inference(model):
        for at in range(0, len(order), batch_size):
            part = order[at : at + batch_size]
            batch = objective.collate([examples[i] for i in part], tokenizer).to(device)
            with autocast(dtype, device):
                logits = model(**batch.inputs()).logits
            for i, best in zip(part, logits.argmax(-1).tolist(), strict=True):
                found[i] = objective.labels[best]
    return found


def macro_f1(found: Sequence[str], labels: Sequence[str]) -> float:
    """Return the mean F1 over the classes in `labels`; one that was only found by mistake has none.

    >>> round(macro_f1(["a", "a", "b", "b"], ["a", "b", "b", "b"]), 4)
    0.7333
    """
    right = Counter(a for a, b in zip(found, labels, strict=True) if a == b)
    given, there = Counter(found), Counter(labels)
    # TP + FP is how often it was given, TP + FN how often it is there
    return sum(2 * right[name] / (given[name] + there[name]) for name in there) / len(there)
