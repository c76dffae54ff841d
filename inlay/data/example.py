"""One sequence of tokens with its labels, and what became of the row it was made of.

Labels stand at their token (label[i] == input_ids[i]); the shift by one is the objective's.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from inlay.data.rows import Row, Source
from inlay.data.settings import DataConfig

IGNORED = -100


@dataclass(frozen=True)
class Example:
    """One sequence of tokens."""

    input_ids: list[int]
    labels: list[int]
    """The token's own id where it is trained, else -100."""
    row_id: str
    source: Source
    weights: list[float] | None = None
    """Factor of each token in the loss; None where all are 1."""
    label: str | None = None
    """The class of the whole row, where that is what is trained; `labels` is empty then."""

    @property
    def trained(self) -> int:
        """The number of trained tokens; of a row with a class, that one."""
        return sum(label != IGNORED for label in self.labels) + (self.label is not None)


@dataclass(frozen=True)
class Encoded:
    """What became of a row."""

    examples: tuple[Example, ...]
    outcome: str
    """kept (whole), split (into several, whole together), cut (something is lost) or dropped."""
    reason: str = ""
    neutralized: int = 0
    """Special tokens in its texts that were made plain text."""
    specials: int = 0
    """Special tokens in its texts that were left as they are (completions and texts)."""


def make_example(
    ids: list[int], labels: list[int], row: Row, weights: list[float] | None = None
) -> Example:
    """Return the example of `row`; nothing predicts the first token, so it is not trained."""
    return Example(ids, [IGNORED, *labels[1:]], row.id, row.source, weights)


def shorten(examples: Sequence[Example], config: DataConfig) -> tuple[list[Example], str, str]:
    """Return what is left of a row that is too long, its outcome and the reason.

    Cuts the end under `cut_end`; examples that are still too long, or train nothing, are left out.
    """
    limit = config.max_length
    longest = max(len(example.input_ids) for example in examples)
    reason = f"longer than max_length ({longest} > {limit} tokens)"
    if config.overlong == "cut_end":
        examples = [cut_end(example, limit) for example in examples]
    kept = [row for row in examples if len(row.input_ids) <= limit and row.trained]
    if not kept:
        if config.overlong == "cut_end":
            reason += ", nothing trained is left"
        return [], "dropped", reason
    if len(kept) < len(examples):
        reason = f"{len(examples) - len(kept)} of {len(examples)} turns {reason}"
    return kept, "cut", reason


def cut_end(example: Example, limit: int) -> Example:
    """Return the first `limit` tokens of `example`."""
    weights = example.weights and example.weights[:limit]
    ids, labels = example.input_ids[:limit], example.labels[:limit]
    return replace(example, input_ids=ids, labels=labels, weights=weights)
