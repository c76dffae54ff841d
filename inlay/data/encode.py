"""A row -> examples: token ids, and a label for each token that is trained.

A token is trained where its first character is: one that straddles the boundary of prompt and
completion belongs to the prompt, since generation from the prompt alone never writes it.
"""

from __future__ import annotations

from bisect import bisect_left
from typing import Any

from inlay.data.chats import ChatEncoder
from inlay.data.example import IGNORED, Encoded, Example, make_example, shorten
from inlay.data.rows import Chat, Completion, Labeled, Row, Text
from inlay.data.settings import DataConfig
from inlay.data.template import OURS, Template, special_tokens
from inlay.data.tokens import Tokens


def encode(row: Row, tokenizer: Any, *, max_length: int = 1024, **settings: Any) -> list[Example]:
    """Return the examples of one row; `settings` are fields of DataConfig. Empty where dropped."""
    config = DataConfig(max_length=max_length, **settings)
    return list(Encoder(tokenizer, config).encode(row).examples)


class Encoder:
    """Encodes rows of any kind, one by one, for a tokenizer."""

    def __init__(self, tokenizer: Any, config: DataConfig) -> None:
        self.tokenizer = tokenizer
        self.config = config
        self.tokens = Tokens(tokenizer)
        self.specials = special_tokens(tokenizer)
        self.chats = ChatEncoder(tokenizer, self.tokens, config)
        bos = tokenizer.bos_token_id
        self._adds_bos = bos is not None and tokenizer("").input_ids[:1] == [bos]

    @property
    def template(self) -> Template:
        """The chat template; raises UserError where there is none."""
        return self.chats.template

    def encode(self, row: Row) -> Encoded:
        """Return the examples of `row` and what became of it."""
        if isinstance(row, Chat):
            return self.chats.encode(row)
        if isinstance(row, Completion):
            return self._completion(row)
        if isinstance(row, Labeled):
            return self._labeled(row)
        return self._text(row)

    def _completion(self, row: Completion) -> Encoded:
        joint = row.prompt + row.completion
        ids, starts = self._plain(joint)
        first = 0 if self.config.train_on == "all" else bisect_left(starts, len(row.prompt))
        labels = [IGNORED] * first + ids[first:]
        example = make_example(ids, labels, row)
        specials = self._specials(joint)
        if not example.trained:
            return Encoded((), "dropped", "no token is trained", specials=specials)
        if len(ids) <= self.config.max_length:
            return Encoded((example,), "kept", specials=specials)
        kept, outcome, reason = shorten([example], self.config)
        return Encoded(tuple(kept), outcome, reason, specials=specials)

    def _text(self, row: Text) -> Encoded:
        """Split a long text; each part begins with the last token of the one before.

        That token is not trained twice, and every token but the first is predicted once.
        """
        ids, _ = self._plain(row.text)
        step = self.config.max_length - 1
        parts = [ids[at : at + step + 1] for at in range(0, max(len(ids) - 1, 1), step)]
        if len(ids) < 2 or not row.text.strip():
            return Encoded((), "dropped", "the text is empty")
        examples = tuple(make_example(part, list(part), row) for part in parts)
        outcome = "split" if len(examples) > 1 else "kept"
        reason = "longer than max_length" if len(examples) > 1 else ""
        return Encoded(examples, outcome, reason, specials=self._specials(row.text))

    def _labeled(self, row: Labeled) -> Encoded:
        """Encode as the tokenizer does by itself: [CLS] and [SEP], where it has them, stay."""
        if not row.text.strip():
            return Encoded((), "dropped", "the text is empty")
        text, limit = OURS.sub("\ufffd", row.text), self.config.max_length
        ids = self.tokenizer(text, truncation=False, verbose=False).input_ids
        outcome, reason = "kept", ""
        if len(ids) > limit:
            reason = f"longer than max_length ({len(ids)} > {limit} tokens)"
            if self.config.overlong == "drop":
                return Encoded((), "dropped", reason, specials=self._specials(text))
            ids = self.tokenizer(text, truncation=True, max_length=limit).input_ids
            outcome = "cut"
        example = Example(ids, [], row.id, row.source, label=row.label)
        return Encoded((example,), outcome, reason, specials=self._specials(text))

    def _plain(self, text: str) -> tuple[list[int], list[int]]:
        """Return ids and starts of `text` with BOS where the tokenizer adds one, and with EOS.

        Neither is added to a text that has it already.
        """
        ids, starts = self.tokens(OURS.sub("\ufffd", text))
        bos, eos = self.tokenizer.bos_token_id, self.tokenizer.eos_token_id
        if self._adds_bos and ids[:1] != [bos]:
            ids, starts = [bos, *ids], [-1, *starts]
        if eos is not None and ids[-1:] != [eos]:
            ids, starts = [*ids, eos], [*starts, len(text)]
        return ids, starts

    def _specials(self, text: str) -> int:
        return sum(text.count(special) for special in self.specials)
