"""Which characters of a rendered conversation are trained, for any chat template.

What a model must learn to write at turn k is what the template appends to the prompt that
generation is given there:

    turn_k = render(messages[:k+1]) - render(messages[:k], generation prompt)

Two renders a turn say it exactly (`by_prefixes`), at a cost quadratic in the conversation.
`by_marks` gives the same spans for a linear cost: one render of the whole, one with a mark after
each message that is not the assistant's, and one short render a turn (the turn alone after a probe
question), which must be found in the whole right behind the mark. What it cannot verify goes to
`by_prefixes`, and where a prefix is not a prefix of the whole, the template rewrites history: then
each trained turn becomes an example of its own, rendered as generation would have seen it.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence, Set
from dataclasses import dataclass, replace

from inlay.data.rows import Message
from inlay.data.template import ASK, MARK, MARKS, RenderError, Template


@dataclass(frozen=True)
class Rendered:
    """A conversation as text, and which of it is trained."""

    text: str
    spans: tuple[tuple[int, int, float], ...]
    """(start, end, weight) in characters, ascending, one an assistant turn that is trained."""


class Lost(Exception):
    """The template leaves out a text of the message at `index`: its `what`, text or reasoning."""

    def __init__(self, index: int, what: str) -> None:
        super().__init__(index, what)
        self.index, self.what = index, what


def locate(
    template: Template, messages: Sequence[Message], tools: Sequence[object], trained: Set[int]
) -> list[Rendered]:
    """Return one Rendered, or one a trained turn where the template rewrites history.

    `trained` are indices of assistant turns. Raises RenderError where the template refuses the
    conversation and Lost where it leaves out a text.
    """
    text = template.render(messages, tools)
    turns = [i for i, message in enumerate(messages) if message.role == "assistant"]
    spans = by_marks(template, messages, tools, text, turns) if len(turns) > 1 else None
    if spans is None:
        spans = by_prefixes(template, messages, tools, text, turns)
    if spans is not None:
        whole = Rendered(
            text, tuple((*spans[k], messages[k].weight) for k in turns if k in trained)
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


def by_prefixes(
    template: Template,
    messages: Sequence[Message],
    tools: Sequence[object],
    text: str,
    turns: Sequence[int],
) -> dict[int, tuple[int, int]] | None:
    """Return each turn's span from two renders a turn; None where the template rewrites history."""
    spans = {}
    for k in turns:
        last = k + 1 == len(messages)
        part = text if last else template.render(messages[: k + 1], tools)
        start, end = _turn(template, messages, tools, k, part)
        if not text.startswith(part[:end]):
            return None
        spans[k] = (start, end)
    return spans


def by_marks(
    template: Template,
    messages: Sequence[Message],
    tools: Sequence[object],
    text: str,
    turns: Sequence[int],
) -> dict[int, tuple[int, int]] | None:
    """Return each turn's span from one short render a turn; None where anything does not fit."""
    try:
        ends = _ends(template, messages, tools, text)
        # three turns are checked as by_prefixes does (the first below, where its opening is
        # learned): a template may treat the last question differently, or only later ones
        for k in {*turns[1:2], turns[-1]}:
            if not text.startswith(template.prompt(messages[:k], tools)):
                return None
    except RenderError:
        return None
    asked = template.prompt([ASK])
    openings: dict[str, str] = {}
    spans = {}
    for k in turns:
        before = messages[k - 1]
        if k == 0 or k - 1 not in ends:
            return None
        at = ends[k - 1]
        # a mark stands before the whitespace that ends a content, which the template may strip
        space = before.content[len(before.content.rstrip()) :]
        at += len(space) if text.startswith(space, at) else 0
        try:
            if before.role not in openings:
                prompt = template.prompt(messages[:k], tools)
                if not text.startswith(prompt) or len(prompt) < at:
                    return None
                openings[before.role] = prompt[at:]
            alone = template.render([ASK, messages[k]])
        except RenderError:
            return None
        start, end = template.turn(asked, alone)
        opening = openings[before.role]
        if not text.startswith(opening + alone[start:end], at):
            return None
        at += len(opening)
        spans[k] = (at, at + end - start)
    return spans


def _ends(
    template: Template, messages: Sequence[Message], tools: Sequence[object], text: str
) -> dict[int, int]:
    """Return where in `text` the content of each message ends that is not the assistant's.

    Empty where marking changes what the template writes.
    """
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
    template: Template, messages: Sequence[Message], tools: Sequence[object], k: int, part: str
) -> tuple[int, int]:
    """Return the span of turn k at the end of `part`, the render up to and with it."""
    try:
        prompt = template.render(messages[:k], tools, generation=True)
    except RenderError:
        if k:
            raise
        # an empty conversation cannot be rendered, so the turn begins where its text does
        prompt = part[: max(part.find(messages[0].content.strip()), 0)]
    return template.turn(prompt, part)


def check_present(
    text: str, messages: Sequence[Message], trained: Mapping[int, tuple[int, int]]
) -> None:
    """Raise Lost for a message whose text the template did not write into `text`.

    Roles that the template does not know are the usual reason, and it drops them without a word.
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
            found = text.find(json.dumps(wanted, ensure_ascii=False)[1:-1], at)
        if found < 0 and wanted not in text:
            raise Lost(i, "text")
        at = max(at, found)
        if i in trained:
            own = text[slice(*trained[i])]
            for reasoning in (thought.rpartition("<think>")[2], message.reasoning):
                if reasoning.strip() not in own:
                    raise Lost(i, "reasoning")
