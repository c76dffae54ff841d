"""Which characters of a rendered conversation are trained, for any chat template.

What a model must learn to write at turn k is what the template appends to the prompt that
generation is given there:

    turn_k = render(messages[:k+1]) - render(messages[:k], generation prompt)

Two renders of the conversation so far say it exactly (`_by_prefix`), at a cost that is quadratic
over all turns. `_Marks` finds the same span at a cost that does not grow with the conversation: the
whole is rendered once more with a mark after each message that is not the assistant's, and each
turn alone after a probe question; what the turn alone adds must stand in the whole behind the mark.
Where it does not, that turn is found the exact way.

Where a prefix is not a prefix of the whole, the template rewrites history: then each trained turn
becomes an example of its own, rendered as generation would have seen it. The examples of T turns
are then quadratic in T themselves, and so are their tokens; the renders stay two a turn.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence, Set
from dataclasses import dataclass, field, replace
from typing import Any

from inlay.data.rows import Message
from inlay.data.template import ASK, MARK, MARKS, RenderError, Template

Span = tuple[int, int]


@dataclass(frozen=True)
class Rendered:
    """A conversation as text, and which of it is trained."""

    text: str
    spans: tuple[tuple[int, int, float], ...]
    """(start, end, weight) in characters, ascending, one an assistant turn that is trained."""


class Lost(Exception):
    """The template leaves out `what` of the message at `index`."""

    def __init__(self, index: int, what: str) -> None:
        super().__init__(index, what)
        self.index, self.what = index, what


def locate(
    template: Template, messages: Sequence[Message], tools: Sequence[Any], trained: Set[int]
) -> list[Rendered]:
    """Return one Rendered, or one a trained turn where the template rewrites history.

    `trained` are indices of assistant turns. Raises RenderError where the template refuses the
    conversation and Lost where it leaves out a text.
    """
    text = template.render(messages, tools)
    spans = find_spans(template, messages, tools, text)
    if spans is not None:
        whole = Rendered(
            text,
            tuple((*spans[k], messages[k].weight) for k in sorted(spans) if k in trained),
        )
        check_present(text, messages, {k: spans[k] for k in trained})
        return [whole]
    examples = []
    for k in sorted(trained):
        # a weight is the turn's own, so it stays with the example
        part = template.render(messages[: k + 1], tools)
        start, end = _turn(template, messages, tools, k, part)
        example = Rendered(part, ((start, end, messages[k].weight),))
        check_present(part, messages[: k + 1], {k: (start, end)})
        examples.append(example)
    return examples


def find_spans(
    template: Template,
    messages: Sequence[Message],
    tools: Sequence[Any],
    text: str,
    *,
    exact: bool = False,
) -> dict[int, Span] | None:
    """Return the span of every assistant turn in `text`, the render of the whole.

    None where the template rewrites history. `exact` spends two renders of the conversation so far
    on every turn.
    """
    turns = [i for i, message in enumerate(messages) if message.role == "assistant"]
    marks = None
    if not exact and len(turns) > 1:
        try:
            # the second and the last turn are checked against their prompts (the first is, where
            # its opening is learned): a template may treat the last question differently
            asked = (template.prompt(messages[:k], tools) for k in {turns[1], turns[-1]})
            if all(map(text.startswith, asked)):
                marks = _Marks(template, messages, tools, text)
        except RenderError:
            marks = None
    spans: dict[int, Span] = {}
    for k in turns:
        found = marks.find(k, spans) if marks else None
        found = found or _by_prefix(template, messages, tools, text, k)
        if found is None:
            return None
        spans[k] = found
    return spans


def _by_prefix(
    template: Template, messages: Sequence[Message], tools: Sequence[Any], text: str, k: int
) -> Span | None:
    last = k + 1 == len(messages)
    part = text if last else template.render(messages[: k + 1], tools)
    start, end = _turn(template, messages, tools, k, part)
    return (start, end) if text.startswith(part[:end]) else None


@dataclass
class _Marks:
    """Finds turns behind marks in one conversation."""

    template: Template
    messages: Sequence[Message]
    tools: Sequence[Any]
    text: str
    ends: dict[int, int] = field(init=False)
    """Where in `text` the content of each message ends that is not the assistant's."""
    openings: dict[str, str] = field(default_factory=dict)
    """What stands between such an end and the answer, by the role that spoke before."""

    def __post_init__(self) -> None:
        self.ends = _ends(self.template, self.messages, self.tools, self.text)
        self.asked = self.template.prompt([ASK])

    def find(self, k: int, spans: Mapping[int, Span]) -> Span | None:
        """Return the span of turn k, those before it being known; None where it does not fit."""
        at = self._behind(k, spans)
        if at is None:
            return None
        before = self.messages[k - 1]
        try:
            if before.role not in self.openings:
                prompt = self.template.prompt(self.messages[:k], self.tools)
                if not self.text.startswith(prompt) or len(prompt) < at:
                    return None
                self.openings[before.role] = prompt[at:]
            alone = self.template.render([ASK, self.messages[k]])
            start, end = self.template.turn(self.asked, alone)
        except RenderError:
            return None
        opening = self.openings[before.role]
        if not self.text.startswith(opening + alone[start:end], at):
            return None
        at += len(opening)
        return at, at + end - start

    def _behind(self, k: int, spans: Mapping[int, Span]) -> int | None:
        if k and k - 1 in spans:  # the assistant spoke before
            return spans[k - 1][1]
        if k == 0 or k - 1 not in self.ends:
            return None
        # a mark stands before the whitespace that ends a content, which the template may strip
        content = self.messages[k - 1].content
        space = content[len(content.rstrip()) :]
        at = self.ends[k - 1]
        return at + len(space) if self.text.startswith(space, at) else at


def _ends(
    template: Template, messages: Sequence[Message], tools: Sequence[Any], text: str
) -> dict[int, int]:
    """Return `_Marks.ends`; empty where marking changes what the template writes."""
    marked = [
        message
        if message.role == "assistant" or not message.content.strip()
        else replace(message, content=_mark(message.content, i))
        for i, message in enumerate(messages)
    ]
    ends, at, plain = {}, 0, []
    render = template.render(marked, tools)
    length = 0
    for found in MARK.finditer(render):
        plain.append(render[at : found.start()])
        length += found.start() - at
        ends[int(found.group(1))] = length
        at = found.end()
    plain.append(render[at:])
    return ends if "".join(plain) == text else {}


def _mark(content: str, index: int) -> str:
    end = len(content.rstrip())
    return f"{content[:end]}{MARKS[0]}{index}{MARKS[1]}{content[end:]}"


def _turn(
    template: Template, messages: Sequence[Message], tools: Sequence[Any], k: int, part: str
) -> tuple[int, int]:
    """Return the span of turn k at the end of `part`, the render up to and with it."""
    try:
        prompt = template.render(messages[:k], tools, generation=True)
    except RenderError:
        if k:
            raise
        # an empty conversation cannot be rendered, so the turn begins where its text does
        prompt = part[: max(part.find(messages[0].content.strip()), 0)]
    prompt = template.held(prompt, part, lambda: template.render(messages[:k], tools))
    return template.turn(prompt, part)


def check_present(text: str, messages: Sequence[Message], trained: Mapping[int, Span]) -> None:
    """Raise Lost for what a message says that the template did not write into `text`.

    Roles that the template does not know are the usual reason, and it drops them without a word;
    many templates know no tool calls.
    """
    at = 0
    for i, message in enumerate(messages):
        wanted = message.content.strip()
        thought, closed, rest = wanted.rpartition("</think>")
        if message.role == "assistant" and closed:
            # templates rewrite the lines around a thought, and strip it from earlier turns
            wanted = rest.strip()
        found = text.find(wanted, at)
        if found < 0:  # templates may write what tools return as JSON
            found = text.find(_escaped(wanted), at)
        if found < 0 and wanted not in text:
            raise Lost(i, "the text")
        own = text[slice(*trained[i])] if i in trained else text
        for call in message.tool_calls:
            for word in _words(call["function"]):
                if word not in own and _escaped(word) not in own:
                    raise Lost(i, f"{word[:40]!r} in a tool call")
        at = max(at, found)
        if i in trained:
            for reasoning in (thought.rpartition("<think>")[2], message.reasoning):
                if reasoning.strip() not in own:
                    raise Lost(i, "the reasoning")


def _words(function: Mapping[str, Any]) -> Iterator[str]:
    """Yield what must appear of a call in some form: the name, the arguments' names and texts."""
    yield function["name"]
    for key, value in function["arguments"].items():
        yield key
        if isinstance(value, str):
            yield value.strip()


def _escaped(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)[1:-1]
