"""How a configuration names modules: exact paths, dotted suffixes, or regular expressions with a time limit.

One rule serves targets, exclusions, `modules_to_save` and the rank and alpha patterns. The expressions may come from a
file someone else wrote, and `re` has no protection against one that backtracks forever: `regex` takes a timeout.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import TypeVar

import regex

from inlay.core.errors import UserError

SECONDS = 0.5
"""Time one expression may take on one module path; honest ones need microseconds."""
LONGEST = 10_000
"""Characters an expression may have."""

T = TypeVar("T")


def names(entry: str, path: str) -> bool:
    """Return whether `entry` is the module path or its dotted end: "q_proj" names "layers.0.attn.q_proj"."""
    return path == entry or path.endswith(f".{entry}")


def matches(pattern: Sequence[str] | str | None, path: str) -> bool:
    """Return whether a list of names, or one regular expression, picks the module path."""
    if pattern is None:
        return False
    if isinstance(pattern, str):
        return fullmatch(pattern, path)
    return any(names(entry, path) for entry in pattern)


def fullmatch(expression: str, path: str) -> bool:
    """Return whether the regular expression matches the whole path; UserError where it is invalid or takes too long."""
    try:
        return compiled(expression).fullmatch(path, timeout=SECONDS) is not None
    except TimeoutError:
        raise UserError(
            f"the pattern {expression[:80]!r} took more than {SECONDS} s on {path!r}: write it without nested repetition"
        ) from None


def first(patterns: Mapping[str, T], path: str, otherwise: T) -> T:
    """Return the value of the first pattern that matches the path's end (PEFT's rule for ranks and alphas)."""
    for key, value in patterns.items():
        if fullmatch(rf"(.*\.)?({key})", path):
            return value
    return otherwise


@lru_cache(maxsize=512)
def compiled(expression: str) -> regex.Pattern[str]:
    """Return the compiled expression; UserError names what is wrong with it."""
    if len(expression) > LONGEST:
        raise UserError(
            f"a module pattern of {len(expression)} characters is over the limit of {LONGEST}: use a list of names"
        )
    try:
        return regex.compile(expression)
    except regex.error as error:
        raise UserError(f"{expression!r} is not a regular expression: {error}") from None
