"""What a field of a configuration may hold: its annotation says it, and one place checks it.

A field of `bool` or `Literal[...]` holds one of its choices; `Rank`, `Dropout` and the others below
are numbers with limits. In a list or a mapping the limit is each entry's; with `| None` a field may
be unset. What is annotated otherwise is left to the class.
"""

from __future__ import annotations

import dataclasses
import types
import typing
from functools import cache
from typing import Annotated, Any, Literal

from inlay.core.numbers import MOST_RANK, check_dropout, check_finite, check_one_of, check_whole


@dataclasses.dataclass(frozen=True)
class Whole:
    """A whole number from `least` to `most`."""

    least: int = 1
    most: int = MOST_RANK

    def __call__(self, name: str, value: Any) -> None:
        """Raise UserError unless `value` is one."""
        check_whole(name, value, least=self.least, most=self.most)


Rank = Annotated[int, Whole()]
"""A whole number from 1, no larger than a layer is wide."""
Count = Annotated[int, Whole(least=0)]
"""A whole number from 0, no larger than a layer is wide."""
Seed = Annotated[int, Whole(least=0, most=2**63 - 1)]
"""A seed of torch's generators."""
Token = Annotated[int, Whole(least=0, most=2**31 - 1)]
"""The id of a token."""
Steps = Annotated[int, Whole(least=0, most=2**53)]
"""A number of training steps."""
Scale = Annotated[float, check_finite]
"""A finite number."""
Dropout = Annotated[float, check_dropout]
"""A probability below 1."""


def check(config: Any) -> None:
    """Raise UserError naming the first field of `config` that holds what its annotation excludes.

    A choice that came as a member of another library's enum is set to its value.
    """
    cls: Any = type(config)
    for name, hint in _hints(cls).items():
        value = getattr(config, name)
        if _choices(hint) and hasattr(value, "value"):
            object.__setattr__(config, name, value.value)
            value = value.value
        _check(name, value, hint)


@cache
def _hints(cls: Any) -> dict[str, Any]:
    """Return the annotations of the fields, those that say nothing left out."""
    hints = typing.get_type_hints(cls, include_extras=True)
    return {f.name: hints[f.name] for f in dataclasses.fields(cls) if f.name in hints}


def _options(hint: Any) -> tuple[Any, ...]:
    if typing.get_origin(hint) in (types.UnionType, typing.Union):
        return typing.get_args(hint)
    return (hint,)


def _choices(hint: Any) -> list[Any] | None:
    """Return all that a field may hold, where its annotation enumerates it."""
    found: list[Any] = []
    for option in _options(hint):
        if option is bool:
            found += [True, False]
        elif option is type(None):
            found.append(None)
        elif typing.get_origin(option) is Literal:
            found += typing.get_args(option)
        else:
            return None
    return found


def _check(name: str, value: Any, hint: Any) -> None:
    choices = _choices(hint)
    if choices:
        check_one_of(name, value, choices)
        return
    options = [option for option in _options(hint) if option is not type(None)]
    if len(options) > 1 or (value is None and len(options) < len(_options(hint))):
        return
    origin, arguments = typing.get_origin(options[0]), typing.get_args(options[0])
    if origin is Annotated:
        for limit in arguments[1:]:
            limit(name, value)
    elif origin is dict and isinstance(value, dict):
        for key, entry in value.items():
            _check(f"{name}[{str(key)[:80]!r}]", entry, arguments[1])
    elif origin is list and isinstance(value, list | tuple):
        for entry in value:
            _check(name, entry, arguments[0])
