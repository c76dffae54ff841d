"""Does a value have its key's type, and what is meant by a word of the command line."""

from __future__ import annotations

import dataclasses
import re
import types
import typing
from collections.abc import Iterator, Mapping, Sequence
from functools import cache
from typing import Any, Literal

import yaml

from inlay.config.given import Given
from inlay.config.schema import Key
from inlay.core.errors import UserError, nearest

_FLOAT = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?")
_NAMES = re.compile(r"[\w.\-]+(,[\w.\-]+)+")


class Loader(yaml.SafeLoader):
    """YAML's plain types and no tags, and no dates: 2024-01-01 is a name here."""


Loader.yaml_implicit_resolvers = {
    first: [pair for pair in pairs if pair[0] != "tag:yaml.org,2002:timestamp"]
    for first, pairs in yaml.SafeLoader.yaml_implicit_resolvers.items()
}


def check(key: Key, given: Given) -> Any:
    """Return the given value in the key's type.

    Raises UserError naming the key, the value, what is expected and where it was given.
    """
    for candidate in _candidates(key.type, given):
        if fits(key.type, candidate):
            return candidate
    value = _parsed(given.value) if given.is_word else given.value
    hint = nearest(str(value), _choices(key.type)) if isinstance(value, str) else ""
    if not hint and _takes(key.type, str) and isinstance(value, bool | int | float):
        hint = " Put it in quotes."
    raise UserError(
        f"{key.name} is {_shown(value)}; it must be {expected(key.type)} ({given.origin}).{hint}"
    )


def fits(type_: Any, value: Any) -> bool:
    """Return whether `value` is of the type; an int is a float, and nothing else is converted."""
    from pydantic import ValidationError

    try:
        _validator(type_).validate_python(value, strict=True)
    except ValidationError:
        return False
    return True


def expected(type_: Any) -> str:
    """Return the type in words.

    >>> expected(list[int] | int | None)
    'a list of whole numbers, a whole number or nothing'
    """
    options = [_words(option) for option in _options(type_)]
    options = list(dict.fromkeys(options))
    return options[0] if len(options) == 1 else f"{', '.join(options[:-1])} or {options[-1]}"


def _candidates(type_: Any, given: Given) -> Iterator[Any]:
    value = given.value
    if given.is_word:
        # q_proj,v_proj for a list; everything else in a line of YAML, or as it stands
        if _takes(type_, list) and _NAMES.fullmatch(value):
            yield _parsed(f"[{value}]")
        yield _parsed(value)
    elif isinstance(value, tuple | set | frozenset):
        yield sorted(value) if isinstance(value, set | frozenset) else list(value)
    yield value
    # YAML 1.1 reads 1e-4 as text, since it has no dot
    text = value if isinstance(value, str) else ""
    if _FLOAT.fullmatch(text) and _takes(type_, float):
        yield float(text)


@cache
def _validator(type_: Any) -> Any:
    from pydantic import TypeAdapter

    return TypeAdapter(type_)


def _parsed(word: str) -> Any:
    try:
        return yaml.load(word, Loader)
    except yaml.YAMLError:
        return word


def _options(type_: Any) -> tuple[Any, ...]:
    if typing.get_origin(type_) in (types.UnionType, typing.Union):
        return tuple(option for part in typing.get_args(type_) for option in _options(part))
    return (type_,)


def _takes(type_: Any, kind: type) -> bool:
    return any((typing.get_origin(option) or option) is kind for option in _options(type_))


def _choices(type_: Any) -> list[str]:
    return [
        str(value)
        for option in _options(type_)
        if typing.get_origin(option) is Literal
        for value in typing.get_args(option)
    ]


_PLAIN = {
    bool: "true or false",
    int: "a whole number",
    float: "a number",
    str: "text",
    type(None): "nothing",
}


def _words(type_: Any) -> str:
    origin, arguments = typing.get_origin(type_), typing.get_args(type_)
    if origin is Literal:
        several = len(arguments) > 1
        return ("one of " if several else "") + ", ".join(map(str, arguments))
    if origin in (list, Sequence):
        return "a list of " + _plural(arguments[0])
    if origin in (dict, Mapping):
        return "a mapping of names" + (
            "" if arguments[1] is Any else f" to {_plural(arguments[1])}"
        )
    if dataclasses.is_dataclass(type_):
        return "a mapping of names"
    return _PLAIN.get(type_, str(type_))


def _plural(type_: Any) -> str:
    plurals = {int: "whole numbers", float: "numbers", str: "names"}
    return plurals.get(type_, "lists" if typing.get_origin(type_) else str(type_))


def _shown(value: Any) -> str:
    kind = {**_PLAIN, dict: "a mapping", list: "a list", float: "a number"}.get(type(value))
    if value is None:
        return "empty"
    if isinstance(value, bool):
        return str(value).lower()
    text = repr(value)
    return (text if len(text) <= 60 else text[:57] + "...") + (f" ({kind})" if kind else "")
