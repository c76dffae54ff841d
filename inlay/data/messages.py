"""The turns of a conversation as other tools write them -> Message."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from inlay.core.errors import nearest
from inlay.data.rows import ROLES, Message, Source

ALIASES = {
    "human": "user",
    "prompter": "user",
    "gpt": "assistant",
    "bot": "assistant",
    "model": "assistant",
    "chatgpt": "assistant",
    "developer": "system",
    "observation": "tool",
    "function": "tool",
    "tool_response": "tool",
    "ipython": "tool",
    "function_call": "function_call",
}
# The names of the per-turn flag: axolotl; ms-swift; OpenAI and LLaMA-Factory.
FLAGS = ("train", "training", "loss")
WEIGHTS = ("weight", "loss_weight", "loss_scale")
REASONING = ("reasoning_content", "reasoning", "thinking")


def parse_messages(value: Any, source: Source) -> tuple[Message, ...]:
    """Return the turns of a list of {"role", "content"} or {"from", "value"}."""
    if not isinstance(value, list):
        raise source.error(f"messages must be a list, not {_shown(value)}")
    if not value:
        raise source.error("messages is empty; a conversation needs at least one turn")
    return tuple(_message(turn, f"message {i}", source) for i, turn in enumerate(value, 1))


def _message(turn: Any, where: str, source: Source) -> Message:
    if not isinstance(turn, Mapping):
        raise source.error(f"{where} must be an object with role and content, not {_shown(turn)}")
    role, key = _role(turn, where, source)
    train, weight = _trained(turn, where, source)
    content = turn.get(key)
    if role == "function_call":
        call = json.loads(str(content)) if _is_json(content) else content
        return Message(
            "assistant", "", train, weight, tool_calls=parse_calls([call], where, source)
        )
    calls = parse_calls(turn.get("tool_calls") or [], where, source)
    if train and role != "assistant":
        raise source.error(
            f"{where} is a {role} turn with a flag that trains it; only assistant turns can be "
            "trained one by one. Remove the flag, or set data.train_on: all"
        )
    return Message(
        role=role,
        content="" if content is None and calls else _content(content, where, source),
        train=train,
        weight=weight,
        reasoning=next((str(turn[name]) for name in REASONING if turn.get(name)), ""),
        tool_calls=calls,
        name=turn.get("name"),
        tool_call_id=turn.get("tool_call_id"),
    )


def _role(turn: Mapping[str, Any], where: str, source: Source) -> tuple[str, str]:
    """Return the canonical role and the key that holds the content."""
    name, key = ("from", "value") if "from" in turn and "role" not in turn else ("role", "content")
    given = turn.get(name)
    role = ALIASES.get(str(given).lower(), str(given).lower())
    if role not in (*ROLES, "function_call"):
        choices = [*ROLES, *ALIASES]
        raise source.error(
            f"{where} has the unknown {name} {given!r}; known are {', '.join(choices)}."
            f"{nearest(str(given), choices)}"
        )
    return role, key


def _content(content: Any, where: str, source: Source) -> str:
    if isinstance(content, str):
        return content
    if content is None:
        raise source.error(
            f'{where} has null content; give it a text (an empty one is ""), or tool_calls'
        )
    if isinstance(content, list):
        for part in content:
            if not (isinstance(part, Mapping) and isinstance(part.get("text"), str)):
                raise source.error(f"{where} holds a part that is not text: {_shown(part)}")
        return "".join(part["text"] for part in content)
    raise source.error(f"{where} has content that is not text: {_shown(content)}")


def _trained(turn: Mapping[str, Any], where: str, source: Source) -> tuple[bool | None, float]:
    """Return the flag (None where the turn says nothing) and the weight."""
    train: bool | None = None
    weight = 1.0
    for name in (*FLAGS, *WEIGHTS, "masked"):
        value = turn.get(name)
        if value is None:
            continue
        if isinstance(value, bool) or (name in FLAGS and value in (0, 1)):
            said = not value if name == "masked" else bool(value)
        elif name in WEIGHTS and isinstance(value, int | float) and 0 <= value < float("inf"):
            said, weight = value > 0, float(value) or 1.0
        else:
            kind = "a number of at least 0" if name in WEIGHTS else "true or false"
            raise source.error(f"{where}: {name} must be {kind}, not {_shown(value)}")
        if train is not None and said != train:
            raise source.error(f"{where}: its flags disagree; keep one of {name} and the others")
        train = said
    return train, weight


def parse_calls(calls: Any, where: str, source: Source) -> tuple[Mapping[str, Any], ...]:
    """Return tool calls in one form, their arguments as a dict."""
    if not isinstance(calls, list):
        raise source.error(f"{where}: tool_calls must be a list, not {_shown(calls)}")
    parsed = []
    for call in calls:
        function = call.get("function", call) if isinstance(call, Mapping) else None
        if not (isinstance(function, Mapping) and isinstance(function.get("name"), str)):
            raise source.error(f"{where} holds a tool call without a name: {_shown(call)}")
        arguments = function.get("arguments", function.get("parameters", {}))
        if _is_json(arguments):
            arguments = json.loads(arguments)
        if not isinstance(arguments, Mapping):
            raise source.error(f"{where}: arguments must be an object, not {_shown(arguments)}")
        rest = {"id": call["id"]} if call.get("id") else {}
        parsed.append(
            {
                **rest,
                "type": "function",
                "function": {"name": function["name"], "arguments": arguments},
            }
        )
    return tuple(parsed)


def _is_json(value: Any) -> bool:
    if not isinstance(value, str):
        return False
    try:
        json.loads(value)
    except (ValueError, RecursionError):
        return False
    return True


def _shown(value: Any) -> str:
    return json.dumps(value, default=str, ensure_ascii=False)[:60]
