"""The fast paths of a run, put on its model for as long as it trains (`train.fast`)."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from inlay.model import fast
from inlay.train.precision import autocast, device_of

TOKENS = 16
"""Tokens of a row that the model is shown to see what its layers are fed."""


@contextmanager
def fast_paths(
    model: nn.Module, tokenizer: Any, objective: Any, row: Any, precision: torch.dtype
) -> Iterator[None]:
    """Let `model` compute by fast paths for a `with` block; the results are those of the plain.

    row: an example, whose first tokens show what each layer is fed.
    """

    def run() -> None:
        batch = _beginning(objective.collate([row], tokenizer)).to(device_of(model))
        with autocast(precision, device_of(model)):
            objective.loss(model, objective.prepare(model, batch), objective.counts(batch))

    with torch.no_grad(), fast.inference(model):
        run()  # what an objective tries of a model the first time is not to be seen below
    with fast.fast_paths(model, run), settled_heap():
        yield


@contextmanager
def settled_heap() -> Iterator[None]:
    """Let Python's collector pass by what is there already, for a `with` block.

    Modules, tokenizer and model are a million objects that stay; to look through them takes a
    quarter of a second, which some steps would pay. Who has frozen objects already is left alone.
    """
    if gc.get_freeze_count():
        yield
        return
    gc.collect()
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()


def _beginning(batch: Any) -> Any:
    """Return the batch with the first tokens of its rows alone."""
    by_token = {name: t for name, t in vars(batch).items() if isinstance(t, Tensor) and t.ndim > 1}
    return replace(batch, **{name: t[:, :TOKENS] for name, t in by_token.items()})
