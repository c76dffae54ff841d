"""A chat template and what can be learned of it by rendering probes.

A template is a program, so nothing is read off its text. What ends an assistant's turn, what it
says when no system prompt is given and how an answer is asked for are read off short renders.
"""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from inlay.core.errors import UserError
from inlay.data.rows import Message

# Noncharacters, which Unicode keeps for a program's own use: no template strips them.
CUT = "\ufdd0"
MARKS = ("\ufdd1", "\ufdd2")
MARK = re.compile(f"{MARKS[0]}(\\d+){MARKS[1]}")
OURS = re.compile(f"[{CUT}{''.join(MARKS)}]")

BUILT_IN = {
    "chatml": (
        "{% for message in messages %}<|im_start|>{{ message.role }}\n"
        "{{ message.content }}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    ),
    # needs no token but EOS, so that it fits every tokenizer
    "plain": (
        "{{ bos_token or '' }}{% for message in messages %}### {{ message.role | capitalize }}:\n"
        "{{ message.content }}{{ eos_token if message.role == 'assistant' else '' }}\n\n"
        "{% endfor %}{% if add_generation_prompt %}### Assistant:\n{% endif %}"
    ),
}
ASK, ANSWER, SYSTEM = (Message("user", "Qprobe7"), Message("assistant", "Aprobe7"), "Sprobe7")


class RenderError(Exception):
    """The template refused a conversation; holds its own words."""


class Template:
    """A tokenizer's chat template, or the one given in its place.

    `given` is None, the name of a built-in template, a file, or Jinja text; `kwargs` are variables
    handed to every render. Raises UserError where there is no template or it refuses a question
    with its answer.
    """

    def __init__(
        self, tokenizer: Any, given: str | None = None, kwargs: Mapping[str, Any] | None = None
    ) -> None:
        self.tokenizer = tokenizer
        self.kwargs = dict(kwargs or {})
        self.text, self.origin = _resolve(tokenizer, given)

    def render(
        self, messages: Sequence[Message], tools: Sequence[Any] = (), *, generation: bool = False
    ) -> str:
        """Return the conversation as text; `generation` adds the header of the next answer.

        Raises RenderError with the template's words where it refuses.
        """
        from jinja2 import TemplateError

        fields = [message.fields() for message in messages]
        for arguments_as_text in (False, True):
            if arguments_as_text:
                fields = [_with_text_arguments(turn) for turn in fields]
            try:
                # a template that joins strings (DeepSeek-V3) fails on arguments that are objects
                return str(
                    self.tokenizer.apply_chat_template(
                        fields,
                        tools=list(tools) or None,
                        chat_template=self.text,
                        add_generation_prompt=generation,
                        tokenize=False,
                        **self.kwargs,
                    )
                )
            except TypeError as error:
                if arguments_as_text or not any("tool_calls" in turn for turn in fields):
                    raise RenderError(str(error)) from error
            except (TemplateError, ValueError) as error:
                raise RenderError(str(error)) from error
        raise AssertionError("the second pass returns or raises")

    @functools.cached_property
    def specials(self) -> dict[str, int]:
        """The texts of the tokenizer's special tokens and their ids."""
        return special_tokens(self.tokenizer)

    @functools.cached_property
    def special(self) -> re.Pattern[str]:
        """Matches each special token; the longest first, as the tokenizer does."""
        return _any(self.specials)

    @functools.cached_property
    def control(self) -> re.Pattern[str]:
        """Matches the special tokens that the template itself writes, and BOS, EOS and PAD."""
        written = {text for text in self.specials if text in self.probe + self.asked}
        own = (getattr(self.tokenizer, f"{name}_token", None) for name in ("bos", "eos", "pad"))
        return _any(written | {text for text in own if text})

    @functools.cached_property
    def probe(self) -> str:
        """A question with its answer, rendered."""
        try:
            return self.render([ASK, ANSWER])
        except RenderError as error:
            raise UserError(
                f"the chat template ({self.origin}) refuses a question with its answer: {error}; "
                "give another one as data.chat_template"
            ) from error

    @functools.cached_property
    def asked(self) -> str:
        """The question with the header of the answer, where generation begins."""
        return self.render([ASK], generation=True)

    @functools.cached_property
    def stop(self) -> str:
        """What ends an assistant's turn: a special token, else text, else "" (nothing does)."""
        tail = self.probe[self.probe.rindex(ANSWER.content) + len(ANSWER.content) :]
        found = self.special.search(tail)
        if found and not tail[: found.start()].strip():
            # what follows is written once, after the last turn (Phi-3 adds EOS there)
            return tail[: found.end()]
        return tail.rstrip()

    @functools.cached_property
    def stop_id(self) -> int | None:
        """The id of the token that ends an assistant's turn; None where no single token does."""
        return self.specials.get(self.stop.strip())

    @functools.cached_property
    def default_system(self) -> str:
        """The system prompt that the template writes when the conversation has none, or ""."""
        try:
            given = self.render([Message("system", SYSTEM), ASK])
        except RenderError:
            return ""
        before, found, after = given.partition(SYSTEM)
        plain = self.render([ASK])
        inside = len(plain) - len(before) - len(after)
        if found and inside > 0 and plain.startswith(before) and plain.endswith(after):
            return plain[len(before) : len(before) + inside].strip()
        return ""

    def turn(self, asked: str, answered: str) -> tuple[int, int]:
        """Return where the trained text of a turn begins and ends in `answered`.

        `asked` is the render up to the turn with its generation prompt, `answered` the render with
        the turn. What generation is given is not trained. The token that ends the turn is, the
        whitespace after it is not.
        """
        start = len(asked)
        if not answered.startswith(asked):
            # generation is given more than the rows hold (DeepSeek-R1 opens a <think>): train from
            # where they part, moved back to the end of a special token or of a word
            start = next(
                (i for i, (a, b) in enumerate(zip(asked, answered, strict=False)) if a != b),
                min(len(asked), len(answered)),
            )
            ends = tuple(self.specials)
            while start and not (
                answered[start - 1].isspace() or answered.endswith(ends, 0, start)
            ):
                start -= 1
        found = answered.rfind(self.stop, start) if self.stop else -1
        end = found + len(self.stop)
        if found < 0 or self.special.sub("", answered[end:]).strip():
            end = len(answered.rstrip())  # a tool call may end in a token of its own
        return start, max(start, end)

    def prompt(self, messages: Sequence[Message], tools: Sequence[Any] = ()) -> str:
        """Return the render with its generation prompt, as far as the rows hold that one."""
        return self.render(messages, tools, generation=True).removesuffix(self.surplus)

    @functools.cached_property
    def surplus(self) -> str:
        """What generation is given beyond the header that the rows hold, or ""."""
        return self.asked[self.turn(self.asked, self.probe)[0] :]


def special_tokens(tokenizer: Any) -> dict[str, int]:
    """Return the texts of the special tokens of `tokenizer` and their ids."""
    found = {
        token.content: index
        for index, token in tokenizer.added_tokens_decoder.items()
        if token.special
    }
    for name in ("bos", "eos", "pad"):
        text = getattr(tokenizer, f"{name}_token", None)
        if text:
            found[text] = getattr(tokenizer, f"{name}_token_id")
    return found


def _any(texts: Iterable[str]) -> re.Pattern[str]:
    ordered = sorted((text for text in texts if text), key=len, reverse=True)
    return re.compile("|".join(map(re.escape, ordered)) or r"(?!)")


def _with_text_arguments(turn: dict[str, Any]) -> dict[str, Any]:
    if "tool_calls" not in turn:
        return turn
    calls = []
    for call in turn["tool_calls"]:
        function = dict(call["function"])
        function["arguments"] = json.dumps(function["arguments"], ensure_ascii=False)
        calls.append({**call, "function": function})
    return {**turn, "tool_calls": calls}


def _resolve(tokenizer: Any, given: str | None) -> tuple[str, str]:
    """Return the template's text and where it comes from."""
    if given is None:
        found = getattr(tokenizer, "chat_template", None)
        if isinstance(found, Mapping):
            found = found.get("default")
        if not found:
            raise UserError(
                "the tokenizer has no chat template, so that conversations cannot be rendered; set "
                f"data.chat_template to {', '.join(BUILT_IN)}, a file or Jinja text"
            )
        return str(found), "the tokenizer's"
    if given in BUILT_IN:
        return BUILT_IN[given], f"built-in {given}"
    if "{%" in given or "{{" in given:
        return given, "given as text"
    if not Path(given).expanduser().is_file():
        raise UserError(
            f"data.chat_template={given!r:.80} is no file, no Jinja text and none of "
            f"{', '.join(BUILT_IN)}"
        )
    return Path(given).expanduser().read_text(encoding="utf-8"), given
