"""A row -> examples: token ids, and a label for each token that is trained.

Labels stand at their token (label[i] == input_ids[i]); the shift by one is the objective's. The
first label is never set, since nothing predicts the first token. A token is trained where its first
character is: one that straddles the boundary of prompt and completion belongs to the prompt.
"""

from __future__ import annotations

import re
from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from inlay.data.rows import Chat, Completion, Message, Row, Source, Text
from inlay.data.settings import DataConfig
from inlay.data.spans import Lost, Rendered, check_present, locate
from inlay.data.template import CUT, OURS, RenderError, Template, special_tokens
from inlay.data.tokens import Tokens

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

    @property
    def trained(self) -> int:
        """The number of trained tokens."""
        return sum(label != IGNORED for label in self.labels)


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


def encode(row: Row, tokenizer: Any, *, max_length: int = 1024, **settings: Any) -> list[Example]:
    """Return the examples of one row; `settings` are fields of DataConfig. Empty where dropped."""
    config = DataConfig(max_length=max_length, **settings)
    return list(Encoder(tokenizer, config).encode(row).examples)


class Encoder:
    """Encodes rows one by one for a tokenizer.

    Raises UserError, by file and line, for a row that the chat template cannot say.
    """

    def __init__(self, tokenizer: Any, config: DataConfig) -> None:
        self.tokenizer = tokenizer
        self.config = config
        self.tokens = Tokens(tokenizer)
        self.specials = special_tokens(tokenizer)
        self._template: Template | None = None

    @property
    def template(self) -> Template:
        """The chat template, looked for when the first chat needs it."""
        if self._template is None:
            given, kwargs = self.config.chat_template, self.config.chat_template_kwargs
            self._template = Template(self.tokenizer, given, kwargs)
        return self._template

    def encode(self, row: Row) -> Encoded:
        """Return the examples of `row` and what became of it."""
        if isinstance(row, Chat):
            return self._chat(row)
        if isinstance(row, Completion):
            return self._completion(row)
        return self._text(row)

    # --- chats

    def _chat(self, row: Chat) -> Encoded:
        if any(OURS.search(message.content + message.reasoning) for message in row.messages):
            return Encoded((), "dropped", "holds U+FDD0 to U+FDD2, which are no characters")
        trained = {
            i
            for i, message in enumerate(row.messages)
            if message.role == "assistant" and message.train is not False
        }
        if not trained and self.config.train_on != "all":
            return Encoded((), "dropped", "no turn is trained")
        messages, neutralized = self._neutralize(row.messages)
        examples = self._render(row, messages, trained)
        fitting = [example for example in examples if self._fits(example)]
        if len(fitting) == len(examples):
            outcome, reason = "kept", ""
            if len(examples) > 1:
                outcome, reason = "split", "the template rewrites earlier turns"
        elif self.config.overlong == "split_turns":
            fitting, outcome, reason = self._split_turns(row, messages, trained, examples)
        else:
            fitting, outcome, reason = self._shorten(examples)
        if outcome != "dropped" and not any(example.trained for example in fitting):
            return Encoded((), "dropped", "no token is trained")
        return Encoded(tuple(fitting), outcome, reason, neutralized)

    def _neutralize(self, messages: Sequence[Message]) -> tuple[list[Message], int]:
        """Make special tokens inside the messages' texts plain text, and count them.

        "<|im_end|>" in a question would end the user's turn, and what follows could pass for an
        answer. In the assistant's own texts only what the template writes itself is made plain: a
        special token such as <think> or a tool's bracket may be what is to be learned. The texts
        stay the same character for character; only the tokenizer is kept from seeing them whole.
        """
        count = 0
        neutral = []
        for message in messages:
            pattern = self.template.special
            if message.role == "assistant":
                pattern = self.template.control
            content, found = pattern.subn(_cut, message.content)
            reasoning, more = pattern.subn(_cut, message.reasoning)
            count += found + more
            neutral.append(replace(message, content=content, reasoning=reasoning))
        return neutral, count

    def _render(self, row: Chat, messages: Sequence[Message], trained: set[int]) -> list[Example]:
        """Return one example, or one a trained turn where the template rewrites history."""
        try:
            if self.config.train_on == "all":
                text = self.template.render(messages, row.tools)
                check_present(text, messages, {})
                parts = [Rendered(text, ())]
            else:
                parts = locate(self.template, messages, row.tools, trained)
        except RenderError as error:
            raise row.source.error(
                f"the chat template ({self.template.origin}) refuses this conversation: {error}; "
                "change the row, or give another template as data.chat_template"
            ) from error
        except Lost as lost:
            message = row.messages[lost.index]
            said = (message.content or message.reasoning)[:40]
            raise row.source.error(
                f"the chat template ({self.template.origin}) leaves out the {lost.what} of message "
                f"{lost.index + 1} ({message.role}: {said!r}); remove it from the row, or give "
                "another template as data.chat_template"
            ) from lost
        return [self._label(part, row) for part in parts]

    def _label(self, part: Rendered, row: Chat) -> Example:
        ids, starts = self.tokens(part.text)
        bos = self.tokenizer.bos_token_id
        if bos is not None and ids[:2] == [bos, bos]:
            raise row.source.error(
                f"the chat template ({self.template.origin}) writes the token that begins a text "
                f"twice ({self.tokenizer.bos_token!r}); correct the template"
            )
        labels = [IGNORED] * len(ids)
        weights = [1.0] * len(ids)
        if self.config.train_on == "all":
            labels = list(ids)
        for start, end, weight in part.spans:
            first, last = bisect_left(starts, start), bisect_left(starts, end)
            labels[first:last] = ids[first:last]
            weights[first:last] = [weight] * (last - first)
            self._check_stop(ids[first:last], row)
        return _example(ids, labels, row, weights if set(weights) != {1.0} else None)

    def _check_stop(self, ids: Sequence[int], row: Chat) -> None:
        """Refuse a turn that does not end in the token that the template ends turns with."""
        if self.template.stop_id is None:
            return
        if not ids or ids[-1] not in self.template.specials.values():
            raise row.source.error(
                f"an assistant's turn does not end in {self.template.stop.strip()!r}, as the chat "
                f"template ({self.template.origin}) ends others; a model would not learn to stop"
            )

    # --- rows that are too long

    def _fits(self, example: Example) -> bool:
        return len(example.input_ids) <= self.config.max_length

    def _shorten(self, examples: Sequence[Example]) -> tuple[list[Example], str, str]:
        limit = self.config.max_length
        longest = max(len(example.input_ids) for example in examples)
        reason = f"longer than max_length ({longest} > {limit} tokens)"
        if self.config.overlong == "cut_end":
            examples = [cut_end(example, limit) for example in examples]
        kept = [example for example in examples if self._fits(example) and example.trained]
        if not kept:
            if self.config.overlong == "cut_end":
                reason += ", nothing trained is left"
            return [], "dropped", reason
        if len(kept) < len(examples):
            reason = f"{len(examples) - len(kept)} of {len(examples)} turns {reason}"
        return kept, "cut", reason

    def _split_turns(
        self, row: Chat, messages: Sequence[Message], trained: set[int], examples: list[Example]
    ) -> tuple[list[Example], str, str]:
        """Cut the fewest oldest turns such that the rest fits; the system prompt stays."""
        if len(examples) > 1:  # each is a turn already; those that fit stay
            return self._shorten(examples)
        head = 0
        while head < len(messages) and messages[head].role == "system":
            head += 1
        starts = [i for i in range(head + 1, len(messages)) if messages[i].role == "user"]
        # later starts give shorter rows, so the first that fits is found by halving
        low, high, best = 0, len(starts), None
        while low < high:
            middle = (low + high) // 2
            at = starts[middle]
            left = {i - at + head for i in trained if i >= at}
            found = self._render(row, [*messages[:head], *messages[at:]], left)
            if all(map(self._fits, found)):
                high, best = middle, (at - head, found)
            else:
                low = middle + 1
        if best is None or not any(example.trained for example in best[1]):
            return [], "dropped", f"longer than max_length ({self.config.max_length} tokens)"
        return best[1], "cut", f"the oldest {best[0]} messages were cut"

    # --- completions and texts

    def _completion(self, row: Completion) -> Encoded:
        joint = row.prompt + row.completion
        ids, starts = self._plain(joint)
        first = 0 if self.config.train_on == "all" else bisect_left(starts, len(row.prompt))
        labels = [IGNORED] * first + ids[first:]
        example = _example(ids, labels, row)
        specials = self._specials(joint)
        if not example.trained:
            return Encoded((), "dropped", "no token is trained", specials=specials)
        if self._fits(example):
            return Encoded((example,), "kept", specials=specials)
        kept, outcome, reason = self._shorten([example])
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
        examples = tuple(_example(part, list(part), row) for part in parts)
        outcome = "split" if len(examples) > 1 else "kept"
        reason = "longer than max_length" if len(examples) > 1 else ""
        return Encoded(examples, outcome, reason, specials=self._specials(row.text))

    def _plain(self, text: str) -> tuple[list[int], list[int]]:
        """Return ids and starts of `text` with BOS where the tokenizer adds one, and with EOS.

        Neither is added to a text that has it already.
        """
        ids, starts = self.tokens(OURS.sub("\ufffd", text))
        bos, eos = self.tokenizer.bos_token_id, self.tokenizer.eos_token_id
        if bos is not None and self.tokenizer("").input_ids[:1] == [bos] and ids[:1] != [bos]:
            ids, starts = [bos, *ids], [-1, *starts]
        if eos is not None and ids[-1:] != [eos]:
            ids, starts = [*ids, eos], [*starts, len(text)]
        return ids, starts

    def _specials(self, text: str) -> int:
        return sum(text.count(special) for special in self.specials)


def _cut(match: re.Match[str]) -> str:
    return match[0][0] + CUT + match[0][1:]


def cut_end(example: Example, limit: int) -> Example:
    """Return the first `limit` tokens of `example`."""
    weights = example.weights and example.weights[:limit]
    ids, labels = example.input_ids[:limit], example.labels[:limit]
    return replace(example, input_ids=ids, labels=labels, weights=weights)


def _example(
    ids: list[int], labels: list[int], row: Row, weights: list[float] | None = None
) -> Example:
    return Example(ids, [IGNORED, *labels[1:]], row.id, row.source, weights)
