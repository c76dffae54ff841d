"""Whether a merged model still says what base and adapter said, on rows that were held out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from inlay.core.errors import UserError
from inlay.data.example import IGNORED, Example
from inlay.model.fast import inference
from inlay.train.precision import device_of

PROMPTS, TOKENS = 16, 32
"""Rows that are compared at most, and trained tokens of each."""


@dataclass(frozen=True)
class Agreement:
    """How far two models agree on the next token, at the tokens that the rows train."""

    rows: int
    tokens: int
    top1: float
    """Share of the tokens at which both find the same one likeliest."""
    kl: float
    """Mean of KL(first || second) in nats."""

    def told(self) -> str:
        """Return one line that says it."""
        return (
            f"{self.top1:.1%} of {self.tokens:,} tokens of {self.rows} rows as before the merge, "
            f"mean KL {self.kl:.2g}"
        )

    def require(self, least: float) -> None:
        """Raise UserError where fewer than the share `least` of the tokens agree."""
        if self.top1 < least:
            raise UserError(
                f"the merged model says {self.told()}; at least {least:.0%} must agree. Nothing "
                "was written: keep the adapter beside its base, write with --dtype float32, or set "
                "a lower --min_agreement"
            )


def examples_of(config: Any, model: Any, tokenizer: Any) -> list[Example]:
    """Return up to 16 of the rows that a run held out, or else of those it trained on."""
    from inlay.data.dataset import prepare
    from inlay.run.limits import fitting

    prepared = prepare(fitting(config.data, model, config.objective), tokenizer)
    return (prepared.eval or prepared.train)[:PROMPTS]


@torch.no_grad()
def says(model: nn.Module, examples: Sequence[Example]) -> list[Tensor]:
    """Return the log-probabilities [tokens, V] of each example, on the CPU, at what it trains.

    Of a classifier those of the classes, [1, C].
    """
    found = []
    with inference(model):
        for example in examples:
            ids = torch.tensor([example.input_ids], device=device_of(model))
            logits = model(input_ids=ids).logits
            if example.label is None:
                trained = [i - 1 for i, label in enumerate(example.labels) if label != IGNORED]
                logits = logits[0, trained[:TOKENS]]
            found.append(logits.float().log_softmax(-1).cpu())
    return found


def compare(before: Sequence[Tensor], after: Sequence[Tensor]) -> Agreement:
    """Return how far what `says` told of two models agrees."""
    same = torch.cat([(a.argmax(-1) == b.argmax(-1)) for a, b in zip(before, after, strict=True)])
    kl = torch.cat([(a.exp() * (a - b)).sum(-1) for a, b in zip(before, after, strict=True)])
    return Agreement(len(before), len(same), float(same.float().mean()), float(kl.mean()))
