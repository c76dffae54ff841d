"""A conversation -> examples: rendered by the chat template, the assistant's turns trained."""

from __future__ import annotations

import functools
import re
from bisect import bisect_left
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from inlay.core.errors import UserError
from inlay.data.example import IGNORED, Encoded, Example, make_example, shorten
from inlay.data.rows import Chat, Message
from inlay.data.settings import DataConfig
from inlay.data.spans import Lost, Rendered, check_present, locate
from inlay.data.template import CUT, OURS, RenderError, Template
from inlay.data.tokens import Tokens


class ChatEncoder:
    """Encodes conversations for a tokenizer.

    Raises UserError, by file and line, for a row that the chat template cannot say.
    """

    def __init__(self, tokenizer: Any, tokens: Tokens, config: DataConfig) -> None:
        self.tokenizer = tokenizer
        self.tokens = tokens
        self.config = config

    @functools.cached_property
    def template(self) -> Template:
        """The chat template, looked for when the first chat needs it."""
        config = self.config
        return Template(self.tokenizer, config.chat_template, config.chat_template_kwargs)

    def encode(self, row: Chat) -> Encoded:
        """Return the examples of `row` and what became of it."""
        if any(OURS.search(message.content + message.reasoning) for message in row.messages):
            return Encoded((), "dropped", "holds U+FDD0 to U+FDD2, which are no characters")
        trained = {
            i
            for i, message in enumerate(row.messages)
            if message.role == "assistant" and message.train is not False
        }
        if not trained and self.config.train_on != "all":
            return Encoded((), "dropped", "no turn is trained")
        messages, neutralized = neutralize(row.messages, self.template)
        examples = self._render(row, messages, trained)
        fitting = [example for example in examples if self.fits(example)]
        if len(fitting) == len(examples):
            outcome, reason = "kept", ""
            if len(examples) > 1:
                outcome, reason = "split", "the template rewrites earlier turns"
        elif self.config.overlong == "split_turns":
            fitting, outcome, reason = self._split_turns(row, messages, trained, examples)
        else:
            fitting, outcome, reason = shorten(examples, self.config)
        if outcome != "dropped" and not any(example.trained for example in fitting):
            return Encoded((), "dropped", "no token is trained")
        return Encoded(tuple(fitting), outcome, reason, neutralized)

    def _render(self, row: Chat, messages: Sequence[Message], trained: set[int]) -> list[Example]:
        """Return one example, or one a trained turn where the template rewrites history."""
        if row.tools and not self.template.writes_tools:
            raise self._leaves_out(row, "the tools that the row offers")
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
            raise self._leaves_out(
                row, f"{lost.what} of message {lost.index + 1} ({message.role}: {said!r})"
            ) from lost
        return [self._label(part, row) for part in parts]

    def _leaves_out(self, row: Chat, what: str) -> UserError:
        return row.source.error(
            f"the chat template ({self.template.origin}) leaves out {what}; remove it from the "
            "row, or give another template as data.chat_template"
        )

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
        return make_example(ids, labels, row, weights if set(weights) != {1.0} else None)

    def _check_stop(self, ids: Sequence[int], row: Chat) -> None:
        """Refuse a turn that does not end in the token that the template ends turns with."""
        if self.template.stop_id is None:
            return
        if not ids or ids[-1] not in self.template.specials.values():
            raise row.source.error(
                f"an assistant's turn does not end in {self.template.stop.strip()!r}, as the chat "
                f"template ({self.template.origin}) ends others; a model would not learn to stop"
            )

    def fits(self, example: Example) -> bool:
        """Return whether the example is within max_length."""
        return len(example.input_ids) <= self.config.max_length

    def _split_turns(
        self, row: Chat, messages: Sequence[Message], trained: set[int], examples: list[Example]
    ) -> tuple[list[Example], str, str]:
        """Cut the fewest oldest turns such that the rest fits; the system prompt stays."""
        if len(examples) > 1:  # each is a turn already; those that fit stay
            return shorten(examples, self.config)
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
            if all(map(self.fits, found)):
                high, best = middle, (at - head, found)
            else:
                low = middle + 1
        if best is None or not any(example.trained for example in best[1]):
            return [], "dropped", f"longer than max_length ({self.config.max_length} tokens)"
        return best[1], "cut", f"the oldest {best[0]} messages were cut"


def neutralize(messages: Sequence[Message], template: Template) -> tuple[list[Message], int]:
    """Make special tokens inside the messages' texts plain text, and count them.

    "<|im_end|>" in a question would end the user's turn, and what follows could pass for an
    answer. In the assistant's own texts only what the template writes itself is made plain: a
    special token such as <think> or a tool's bracket may be what is to be learned. The texts stay
    the same character for character; only the tokenizer is kept from seeing them whole.
    """
    count = 0

    def plain(value: Any, pattern: re.Pattern[str]) -> Any:
        nonlocal count
        if isinstance(value, str):
            value, found = pattern.subn(_cut, value)
            count += found
        elif isinstance(value, Mapping):
            value = {plain(key, pattern): plain(inner, pattern) for key, inner in value.items()}
        elif isinstance(value, list | tuple):
            value = type(value)(plain(inner, pattern) for inner in value)
        return value

    neutral = []
    for message in messages:
        pattern = template.control if message.role == "assistant" else template.special
        names = ("content", "reasoning", "tool_calls")
        texts = {name: plain(getattr(message, name), pattern) for name in names}
        neutral.append(replace(message, **texts))
    return neutral, count


def question(
    messages: Sequence[Message], template: Template, tokens: Tokens, tools: Sequence[Any] = ()
) -> list[int]:
    """Return the ids of the prompt whose answer comes next, encoded as the rows that train are.

    Raises RenderError where the template refuses.
    """
    neutral, _ = neutralize(messages, template)
    return tokens(template.render(neutral, tools, generation=True))[0]


def _cut(match: re.Match[str]) -> str:
    return match[0][0] + CUT + match[0][1:]
