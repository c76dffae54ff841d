"""Text -> token ids, with the character at which each token really begins."""

from __future__ import annotations

from typing import Any

from inlay.core.errors import UserError
from inlay.data.template import CUT


class Tokens:
    """A tokenizer that adds nothing of its own and tells where its tokens begin.

    It is a copy of the fast tokenizer's core without its post-processor: that one adds BOS (which
    the templates write themselves) and, in byte-level tokenizers, cuts the spaces off the offsets,
    so that a token " blue" would seem to begin at its "b". Raises UserError for a tokenizer without
    a fast core, which has no offsets at all.
    """

    def __init__(self, tokenizer: Any) -> None:
        core = getattr(tokenizer, "backend_tokenizer", None)
        if core is None:
            raise UserError(
                f"{type(tokenizer).__name__} gives no character offsets, so that trained and other "
                "text cannot be told apart; load the model's fast tokenizer (a tokenizer.json)"
            )
        self.core = type(core).from_str(core.to_str())
        self.core.post_processor = None
        self.core.no_padding()
        self.core.no_truncation()

    def __call__(self, text: str) -> tuple[list[int], list[int]]:
        """Return the ids of `text` and the index of each token's first character.

        A CUT in the text becomes no token, and no token spans it: a special token's text with a
        CUT inside becomes plain tokens. (A tokenizer that begins each text with a space puts one
        there.)
        """
        ids: list[int] = []
        starts: list[int] = []
        at = 0
        for piece in text.split(CUT):
            found = self.core.encode(piece, add_special_tokens=False)
            ids += found.ids
            starts += [at + start for start, _ in found.offsets]
            at += len(piece) + len(CUT)
        return ids, starts
