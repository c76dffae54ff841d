"""One function a format: a record of a file -> a row, or an error with file and line."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from inlay.core.errors import nearest
from inlay.data.messages import parse_messages
from inlay.data.rows import Chat, Completion, Labeled, Message, Row, Source, Text

LISTS = ("messages", "conversations", "conversation", "dialog")
PAIRS = (("prompt", "completion"), ("prompt", "response"), ("query", "response"))
KEYS = {"instruction": "alpaca", "text": "text"}
# Stanford Alpaca's two preambles (tatsu-lab/stanford_alpaca, train.py)
PREAMBLE = "Below is an instruction that describes a task"
WITH_INPUT = ", paired with an input that provides further context"
REQUEST = ". Write a response that appropriately completes the request.\n\n"


def recognize(raw: Mapping[str, Any], source: Source) -> str:
    """Return the format of a record by its keys; raises UserError where none fits."""
    if any(raw.get(key) is not None for key in ("chosen", "rejected", "rejected_response")):
        raise source.error(
            "this row holds a preference (chosen, rejected), which supervised fine-tuning cannot "
            "use; give rows with messages, or with prompt and completion"
        )
    found = _recognize(raw)
    if found is not None:
        return found
    known = [*LISTS, "prompt", "completion", "instruction", "output", "text"]
    hints = [nearest(key, known) for key in raw]
    raise source.error(
        f"no known format has the keys {', '.join(map(repr, raw)) or '(none)'}; a row has "
        "messages, conversations, prompt and completion, instruction and output, or text."
        + next(filter(None, hints), "")
    )


def recognizes(value: Any) -> bool:
    """Return whether `value` is a record of a known format."""
    return isinstance(value, Mapping) and _recognize(value) is not None


def _recognize(raw: Mapping[str, Any]) -> str | None:
    for key in LISTS:
        if isinstance(raw.get(key), list):
            first = raw[key][0] if raw[key] else {}
            return "sharegpt" if isinstance(first, Mapping) and "from" in first else "messages"
    if any(a in raw and b in raw for a, b in PAIRS):
        return "prompt_completion"
    return next((name for key, name in KEYS.items() if key in raw), None)


def messages(raw: Mapping[str, Any], source: Source) -> Chat:
    """{"messages": [{"role", "content"}, ...], "tools": [...]}; also sharegpt's from and value."""
    key = next((key for key in LISTS if key in raw), "messages")
    turns = parse_messages(_required(raw, key, source), source)
    system = _text(raw, "system", source) if raw.get("system") else ""
    if system and turns[0].role != "system":
        turns = (Message("system", system), *turns)
    elif system and turns[0].content != system:
        raise source.error("the row has two system prompts, a field and a message; keep one")
    return _chat(turns, raw, source)


def alpaca(raw: Mapping[str, Any], source: Source) -> Chat:
    """{"instruction", "input", "output"} with optional system and history, as a conversation."""
    instruction, more, output, system = _alpaca(raw, source)
    turns = [Message("system", system)] if system else []
    for pair in raw.get("history") or ():
        if not (
            isinstance(pair, Sequence) and len(pair) == 2 and all(isinstance(p, str) for p in pair)
        ):
            raise source.error(f"history holds {pair!r:.60}, not a pair [question, answer]")
        turns += [Message("user", pair[0]), Message("assistant", pair[1])]
    asked = f"{instruction}\n{more}" if more else instruction
    return _chat((*turns, Message("user", asked), Message("assistant", output)), raw, source)


def alpaca_text(raw: Mapping[str, Any], source: Source) -> Completion:
    """The same record in the words of Stanford's preamble, without a chat template."""
    instruction, more, output, system = _alpaca(raw, source)
    if raw.get("history"):
        raise source.error("alpaca_text has no place for history; use the format alpaca")
    opening = f"{system}\n\n" if system else PREAMBLE + (WITH_INPUT if more else "") + REQUEST
    extra = f"### Input:\n{more}\n\n" if more else ""
    prompt = f"{opening}### Instruction:\n{instruction}\n\n{extra}### Response:\n"
    return Completion(prompt, output, source)


def prompt_completion(raw: Mapping[str, Any], source: Source) -> Chat | Completion:
    """{"prompt", "completion"}: two texts, or two lists of messages."""
    first, second = next(((a, b) for a, b in PAIRS if a in raw and b in raw), PAIRS[0])
    prompt, completion = _required(raw, first, source), _required(raw, second, source)
    if isinstance(prompt, list) and isinstance(completion, list):
        before = [replace(turn, train=False) for turn in parse_messages(prompt, source)]
        return _chat((*before, *parse_messages(completion, source)), raw, source)
    prompt, completion = _text(raw, first, source), _text(raw, second, source)
    for key in ("system", "tools"):
        if raw.get(key):
            raise source.error(f"{key} has no place beside a plain {first}; give lists of messages")
    if not completion:
        raise source.error(f"{second} is empty, so that there is nothing to train; remove the row")
    return Completion(prompt, completion, source)


def text(raw: Mapping[str, Any], source: Source) -> Text:
    """{"text": "a document"}."""
    return Text(_text(raw, "text", source), source)


def labeled(raw: Mapping[str, Any], source: Source) -> Labeled:
    """{"text": "a document", "label": "its class"}; a class may be a whole number."""
    key = "sentence" if "sentence" in raw and "text" not in raw else "text"
    found, label = _text(raw, key, source), _required(raw, "label", source)
    if not isinstance(label, str | int) or isinstance(label, bool) or label == "":
        raise source.error(
            f"label must be the name of a class or a whole number, not {json.dumps(label)[:60]}"
        )
    return Labeled(found, str(label), source)


FORMATS: dict[str, Callable[[dict[str, Any], Source], Row]] = {
    "messages": messages,
    "sharegpt": messages,
    "alpaca": alpaca,
    "alpaca_text": alpaca_text,
    "prompt_completion": prompt_completion,
    "text": text,
    "labeled": labeled,
}


def _chat(turns: tuple[Message, ...], raw: Mapping[str, Any], source: Source) -> Chat:
    for key in ("images", "videos", "audios"):
        if raw.get(key):
            raise source.error(f"{key} cannot be trained on: only text is read; remove the field")
    tools = raw.get("tools") or []
    if isinstance(tools, str):
        try:
            tools = json.loads(tools)
        except json.JSONDecodeError as error:
            raise source.error(f"tools is a text that is no JSON: {error}") from None
    if not (isinstance(tools, list) and all(isinstance(tool, Mapping) for tool in tools)):
        raise source.error(f"tools must be a list of objects, not {tools!r:.60}")
    return Chat(turns, source, tuple(tools))


def _alpaca(raw: Mapping[str, Any], source: Source) -> tuple[str, str, str, str]:
    key = "response" if "response" in raw and "output" not in raw else "output"
    given = [_text(raw, name, source) for name in ("instruction", key)]
    optional = [_text(raw, name, source) if raw.get(name) else "" for name in ("input", "system")]
    return given[0], optional[0], given[1], optional[1]


def _required(raw: Mapping[str, Any], key: str, source: Source) -> Any:
    if key not in raw:
        raise source.error(
            f"the row has no {key!r}, only {', '.join(map(repr, raw)) or 'nothing'}; is it of "
            f"another format than the rows before it?{nearest(key, raw)}"
        )
    return raw[key]


def _text(raw: Mapping[str, Any], key: str, source: Source) -> str:
    value = _required(raw, key, source)
    if not isinstance(value, str):
        raise source.error(f"{key} must be text, not {json.dumps(value, default=str)[:60]}")
    return value
