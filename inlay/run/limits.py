"""Do base, tokenizer and rows fit together: what a recipe's base must be, and what it can read."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from inlay.config.schema import RunConfig, objective_name
from inlay.core.errors import UserError
from inlay.data.dataset import Prepared
from inlay.data.rows import Labeled
from inlay.data.settings import DataConfig
from inlay.model.load import most_tokens


def check_base(base: Any, tokenizer: Any, config: RunConfig) -> None:
    """Raise UserError for a base without a tokenizer, and for an encoder with a decoder."""
    if tokenizer is None:
        raise UserError(f"base_model {config.base_model!r} has no tokenizer beside it")
    if getattr(base.config, "is_encoder_decoder", False):
        raise UserError(
            f"base_model {config.base_model!r} is a {type(base).__name__}, an encoder with a "
            "decoder; recipes train causal language models and classifiers. Give another, or use "
            "get_peft_model in Python"
        )


def readable(data: DataConfig, objective: Any) -> DataConfig:
    """Return `data` with the format that `objective` reads; UserError where it is another."""
    labeled = objective.row is Labeled
    if labeled and data.format == "auto":
        return replace(data, format="labeled")
    if labeled != (data.format == "labeled"):
        name = objective_name(objective)
        raise UserError(
            f"data.format is {data.format!r}, which objective {name} does not read; "
            + ("leave it out" if labeled else "set objective: classify, or leave it out")
        )
    return data


def fitting(data: DataConfig, base: Any, objective: Any) -> DataConfig:
    """Return `data` as `objective` reads it, rows no longer than the base has positions for."""
    data, limit = readable(data, objective), most_tokens(base)
    return data if limit is None else replace(data, max_length=min(data.max_length, limit))


def check_tokens(data: Prepared, tokenizer: Any, vocabulary: int) -> None:
    """Raise UserError where a row has a token that the base has no embedding for."""
    largest = max(max(example.input_ids) for example in (*data.train, *data.eval))
    if largest >= vocabulary:
        raise UserError(
            f"the tokenizer makes token {largest} ({tokenizer.convert_ids_to_tokens(largest)!r}) "
            f"of the rows, but the base has embeddings for {vocabulary} tokens only; give the base "
            "with the tokenizer it was trained with"
        )
