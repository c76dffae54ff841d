"""What one line of training data is, whatever file and format it came from."""

from __future__ import annotations

import functools
import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from inlay.core.errors import UserError

ROLES = ("system", "user", "assistant", "tool")


@dataclass(frozen=True)
class Source:
    """Where a row stands: the file (or data set) and its line, counted from 1.

    In CSV, parquet and hub data sets the line is the row's number; CSV counts the header.
    """

    file: str
    line: int

    def __str__(self) -> str:
        return f"{self.file}:{self.line}"

    def error(self, message: str) -> UserError:
        """Return the user's mistake `message`, placed here."""
        return UserError(f"{self}: {message}")


@dataclass(frozen=True)
class Message:
    """One turn of a conversation."""

    role: str
    """One of ROLES."""
    content: str
    """The text; empty only beside tool calls or where the row had an empty one."""
    train: bool | None = None
    """Whether the turn is trained; None leaves it to the role."""
    weight: float = 1.0
    """Factor of this turn's tokens in the loss."""
    reasoning: str = ""
    """What was thought before the content, where the row keeps it in a field of its own."""
    tool_calls: tuple[Mapping[str, Any], ...] = ()
    """Calls in the form {"id", "type": "function", "function": {"name", "arguments": {...}}}."""
    name: str | None = None
    """Name of the speaker or of the tool that answers."""
    tool_call_id: str | None = None
    """The call that a tool's turn answers."""

    def fields(self) -> dict[str, Any]:
        """Return what chat templates read: role, content and the optional fields that are set."""
        optional = {
            "reasoning_content": self.reasoning,
            "tool_calls": [dict(call) for call in self.tool_calls],
            "name": self.name,
            "tool_call_id": self.tool_call_id,
        }
        given = {key: value for key, value in optional.items() if value}
        return {"role": self.role, "content": self.content, **given}


@dataclass(frozen=True)
class Chat:
    """A conversation, rendered through a chat template."""

    messages: tuple[Message, ...]
    source: Source
    tools: tuple[Mapping[str, Any], ...] = ()

    @functools.cached_property
    def id(self) -> str:
        """Hash of what is said; flags and weights are left out, so copies share it."""
        said = [message.fields() for message in self.messages]
        return digest("chat", said, list(self.tools), source=self.source)


@dataclass(frozen=True)
class Completion:
    """A prompt and what follows it, both plain text; the completion is trained."""

    prompt: str
    completion: str
    source: Source

    @functools.cached_property
    def id(self) -> str:
        """Hash of the two texts."""
        return digest("completion", self.prompt, self.completion, source=self.source)


@dataclass(frozen=True)
class Text:
    """A plain text; all of it is trained."""

    text: str
    source: Source

    @functools.cached_property
    def id(self) -> str:
        """Hash of the text."""
        return digest("text", self.text, source=self.source)


@dataclass(frozen=True)
class Labeled:
    """A text and the class that it belongs to."""

    text: str
    label: str
    source: Source

    @functools.cached_property
    def id(self) -> str:
        """Hash of the text alone: its copies stay on one side, whatever they are labeled."""
        return digest("labeled", self.text, source=self.source)


Row = Chat | Completion | Text | Labeled
Raw = tuple[dict[str, Any], Source]
"""A record as a file holds it, and its place."""


def digest(*parts: Any, source: Source) -> str:
    """Return 16 hex digits of SHA-256 over `parts` as JSON with sorted keys.

    Raises UserError where a text holds half of a surrogate pair, which no tokenizer can encode.
    """
    text = json.dumps(parts, sort_keys=True, ensure_ascii=False, default=str)
    try:
        return hashlib.sha256(text.encode()).hexdigest()[:16]
    except UnicodeEncodeError as error:
        bad = text[error.start].encode("unicode_escape").decode()
        raise source.error(
            f"the text holds {bad}, half of a surrogate pair, which is no character; "
            "write the character itself or both halves"
        ) from None
