"""A chat template and what can be learned of it by rendering probes.

A template is a program, so nothing is read off its text. What ends an assistant's turn, what it
says when no system prompt is given and how an answer is asked for are read off short renders.
"""

from __future__ import annotations

import datetime
import functools
import json
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
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
CALLED = {"name": "Nprobe7", "arguments": {"Kprobe7": "Vprobe7"}}
# nine characters, which is what Mistral's templates ask of an id
CALLS = Message(
    "assistant", "", tool_calls=({"id": "Iprobe777", "type": "function", "function": CALLED},)
)
OFFER = {
    "type": "function",
    "function": {
        "name": "Oprobe7",
        "description": "D",
        "parameters": {
            "type": "object",
            "properties": {"x": {"type": "string", "description": "D"}},
            "required": ["x"],
        },
    },
}


@dataclass(frozen=True)
class CallForm:
    """How tool calls are handed to a template."""

    as_text: bool
    """The arguments are JSON text, not an object."""

    def fields(self, message: Message) -> dict[str, Any]:
        """Return what the template reads of `message`."""
        fields = message.fields()
        if self.as_text and message.tool_calls:
            fields["tool_calls"] = [_with_text(call) for call in fields["tool_calls"]]
        return fields


FORMS = (CallForm(as_text=False), CallForm(as_text=True))


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
        calls = any(message.tool_calls for message in messages)
        form = self.call_form if calls else FORMS[0]
        return self._render(messages, tools, generation, form)

    def _render(
        self, messages: Sequence[Message], tools: Sequence[Any], generation: bool, form: CallForm
    ) -> str:
        from jinja2 import TemplateError

        try:
            return str(
                self.tokenizer.apply_chat_template(
                    [form.fields(message) for message in messages],
                    tools=list(tools) or None,
                    chat_template=self.text,
                    add_generation_prompt=generation,
                    tokenize=False,
                    **self.kwargs,
                )
            )
        except (TemplateError, TypeError, ValueError) as error:
            raise RenderError(str(error)) from error

    @functools.cached_property
    def call_form(self) -> CallForm:
        """The form in which the template writes most of a tool call.

        Templates differ: some join the arguments to a text, and fail on an object or print it as
        Python does.
        """

        def written(form: CallForm) -> int:
            try:
                text = self._render([ASK, CALLS], (), False, form)
            except RenderError:
                return -1
            if str(CALLED["arguments"]) in text:
                return 0
            return sum(word in text for word in ("Nprobe7", "Kprobe7", "Vprobe7"))

        return max(FORMS, key=written)  # the first of the best

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
            text = self.render([ASK, ANSWER])
        except RenderError as error:
            raise UserError(
                f"the chat template ({self.origin}) refuses a question with its answer: {error}; "
                "give another one as data.chat_template"
            ) from error
        if ANSWER.content not in text:  # those of vision models read lists of parts alone
            raise UserError(
                f"the chat template ({self.origin}) leaves out the answer to a question, when it "
                "is a plain text; give another one as data.chat_template"
            )
        return text

    @functools.cached_property
    def asked(self) -> str:
        """The question with the header of the answer, where generation begins."""
        return self.render([ASK], generation=True)

    @functools.cached_property
    def stop(self) -> str:
        """What ends an assistant's turn: special tokens, else text, else "" (nothing does)."""
        tail = _behind(self.probe, ANSWER.content)
        found = self.special.search(tail)
        if not found or tail[: found.start()].strip():
            return tail.rstrip()
        # a turn may end in several (Cohere's do); what is written once, after the last turn, is not
        # its end (Phi-3 adds EOS there)
        end = found.end()
        try:
            middle = _behind(self.render([ASK, ANSWER, ASK]), ANSWER.content)
        except RenderError:
            middle = ""
        for more in self.special.finditer(tail, end):
            if tail[end : more.start()].strip() or not middle.startswith(tail[: more.end()]):
                break
            end = more.end()
        return tail[:end]

    @functools.cached_property
    def stop_id(self) -> int | None:
        """The id of the token that ends an assistant's turn; None where no special token does."""
        ends = [text for text in self.specials if self.stop.endswith(text)]
        return self.specials[max(ends, key=len)] if ends else None

    @functools.cached_property
    def writes_tools(self) -> bool:
        """Whether the tools that a conversation offers are written into it."""
        try:
            return "Oprobe7" in self.render([ASK], [OFFER])
        except RenderError:
            return True  # it reads them, and wants something else around them

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

    @functools.cached_property
    def dates(self) -> list[str]:
        """Today's dates that the template writes by itself (Llama 3.1, gpt-oss)."""
        today = datetime.date.today()
        forms = ("%d %b %Y", "%d %B %Y", "%B %d, %Y", "%Y-%m-%d", "%d-%m-%Y", "%m/%d/%Y")
        return [said for said in map(today.strftime, forms) if said in self.probe]

    def turn(self, asked: str, answered: str) -> tuple[int, int]:
        """Return where the trained text of a turn begins and ends in `answered`.

        `asked` is the render up to the turn with its generation prompt, `answered` the render with
        the turn, which begins with it. What generation is given is not trained. The token that ends
        the turn is, the whitespace after it is not.
        """
        start = len(asked)
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
        return self.asked[self._parting(self.asked, self.probe) :]

    def held(self, asked: str, answered: str, before: Callable[[], str]) -> str:
        """Return what of the prompt `asked` the rows hold, for `answered` to begin with it.

        Generation may be given more than that (DeepSeek-R1 opens a <think>). `before` renders the
        prompt without the header of the answer. Raises RenderError where the answer changes what
        stands before that header: then no text is what generation would have to write.
        """
        if answered.startswith(asked):
            return asked
        held = asked.removesuffix(self.surplus)
        if answered.startswith(held):
            return held
        plain = before()
        if not (asked.startswith(plain) and answered.startswith(plain)):
            raise RenderError("an answer changes what it writes before that answer")
        return asked[: max(len(plain), self._parting(asked, answered))]

    def _parting(self, asked: str, answered: str) -> int:
        """Return where the two part, moved back to the end of a special token or of a word."""
        if answered.startswith(asked):
            return len(asked)
        pairs = enumerate(zip(asked, answered, strict=False))
        shorter = min(len(asked), len(answered))
        start = next((i for i, (one, other) in pairs if one != other), shorter)
        ends = tuple(self.specials)
        while start and not (answered[start - 1].isspace() or answered.endswith(ends, 0, start)):
            start -= 1
        return start


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


def _behind(text: str, word: str) -> str:
    return text[text.rindex(word) + len(word) :]


def _any(texts: Iterable[str]) -> re.Pattern[str]:
    ordered = sorted((text for text in texts if text), key=len, reverse=True)
    return re.compile("|".join(map(re.escape, ordered)) or r"(?!)")


def _with_text(call: Mapping[str, Any]) -> dict[str, Any]:
    function = dict(call["function"])
    function["arguments"] = json.dumps(function["arguments"], ensure_ascii=False)
    return {**call, "function": function}


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
