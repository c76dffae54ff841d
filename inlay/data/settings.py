"""The `data:` block of a run: one field a setting, its docstring below it."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, Literal, get_args

from inlay.core.errors import UserError, nearest

Overlong = Literal["drop", "split_turns", "cut_end"]
TrainOn = Literal["assistant", "all"]


@dataclasses.dataclass(frozen=True)
class DataConfig:
    """Where the rows come from and what of them is trained."""

    path: str | Sequence[str] = ""
    """File (JSONL, JSON, CSV, parquet, txt) or hub data set, or a list of them, joined in order."""
    format: str = "auto"
    """Row format: auto (recognized from the first row of each file), messages, sharegpt, alpaca,
    alpaca_text, prompt_completion, text, or labeled (which `objective: classify` reads)."""
    name: str | None = None
    """Configuration of a hub data set, such as `main`."""
    split: str = "train"
    """Split of a hub data set."""
    revision: str | None = None
    """Revision of a hub data set: a branch, a tag or a commit."""
    limit: int | None = None
    """At most this many rows, chosen by content rather than from the head; None takes all."""
    eval_path: str | Sequence[str] | None = None
    """Rows for evaluation, from files of their own; rows found there are not trained."""
    eval_fraction: float = 0.0
    """Share of the rows held out for evaluation, 0 to 1, chosen by content, copies together."""
    max_length: int = 1024
    """Longest row in tokens."""
    overlong: Overlong = "drop"
    """A longer chat or completion: drop it, split_turns (cut whole oldest turns; the system prompt
    stays) or cut_end (keep the first max_length tokens). Texts are always split, losing nothing."""
    train_on: TrainOn = "assistant"
    """What is trained: the assistant's turns (and completions), or all tokens."""
    chat_template: str | None = None
    """Chat template in place of the tokenizer's: chatml, plain, a file, or Jinja text."""
    chat_template_kwargs: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    """Variables handed to the chat template, such as {enable_thinking: false}."""

    def __post_init__(self) -> None:
        """Refuse what cannot be; raises UserError naming the field, the value and the limit."""
        for field, choices in (("overlong", get_args(Overlong)), ("train_on", get_args(TrainOn))):
            value = getattr(self, field)
            if value not in choices:
                raise UserError(
                    f"data.{field}={value!r} is not one of {', '.join(choices)}."
                    f"{nearest(str(value), choices)}"
                )
        if not 0 <= self.eval_fraction < 1:
            raise UserError(
                f"data.eval_fraction={self.eval_fraction!r} is outside 0 to 1 (1 excluded); "
                "0.05 holds out one row in twenty"
            )
        if self.eval_fraction and self.eval_path:
            raise UserError(
                f"data.eval_fraction={self.eval_fraction!r} and data.eval_path={self.eval_path!r} "
                "both say which rows evaluate; keep one"
            )
        if self.max_length < 2:
            raise UserError(f"data.max_length={self.max_length!r} must be at least 2 tokens")
        if self.limit is not None and self.limit < 1:
            raise UserError(
                f"data.limit={self.limit!r} must be at least 1 row; leave it out for all"
            )

    @property
    def paths(self) -> tuple[str, ...]:
        """The training sources as a tuple."""
        return _tuple(self.path)

    @property
    def eval_paths(self) -> tuple[str, ...]:
        """The evaluation sources as a tuple."""
        return _tuple(self.eval_path or ())


def _tuple(path: str | Sequence[str]) -> tuple[str, ...]:
    return (path,) if isinstance(path, str) and path else tuple(path)
