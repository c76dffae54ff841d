"""What an example says, as text."""

from __future__ import annotations

from typing import Any

from inlay.data.encode import IGNORED, Example


def trained(example: Example, tokenizer: Any) -> str:
    """Return the text of the trained tokens alone."""
    return tokenizer.decode([label for label in example.labels if label != IGNORED])


def written(example: Example, tokenizer: Any) -> str:
    """Return the text of all tokens."""
    return tokenizer.decode(example.input_ids)
