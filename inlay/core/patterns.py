"""How a configuration names modules: paths, their dotted ends, or expressions with a time limit.

One rule serves targets, exclusions, `modules_to_save` and the rank and alpha patterns. Expressions
may come from a file someone else wrote, and `re` has no protection against one that backtracks
forever: `regex` takes a timeout. Many that each stay below it are held by a budget over all.
"""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Collection, Iterator, Mapping, Sequence, Sized
from contextvars import ContextVar
from functools import lru_cache
from typing import Generic, TypeVar

import regex

from inlay.core.errors import UserError

SECONDS = 0.5
"""Time one expression may take on one module path; honest ones need microseconds."""
BUDGET = 2.0
"""Time all expressions of one configuration may take on one model, in seconds."""
LONGEST = 10_000
"""Characters an expression may have."""
MOST_REPEATS = 1_000
"""Product of an expression's counted repeats `{n}`: compiling unrolls them, with no timeout."""
MOST_EXPRESSIONS = 1_000
"""Expressions one field may hold."""
MOST_NAMES = 100_000
"""Names one field may hold; what looking one up takes does not depend on how many there are."""

T = TypeVar("T")

_left: ContextVar[list[float] | None] = ContextVar("_left", default=None)


@contextlib.contextmanager
def budget(seconds: float | None = None) -> Iterator[None]:
    """Let all expressions in the `with` block take `seconds` together (default BUDGET).

    Inside another budget nothing is added: the outer one holds.
    """
    if _left.get() is not None:
        yield
        return
    token = _left.set([BUDGET if seconds is None else seconds])
    try:
        yield
    finally:
        _left.reset(token)


def ends(path: str) -> Iterator[str]:
    """Yield the path and its dotted ends: "a.b.c", "b.c", "c"."""
    yield path
    at = path.find(".")
    while at >= 0:
        yield path[at + 1 :]
        at = path.find(".", at + 1)


def names(entry: str, path: str) -> bool:
    """Return whether `entry` is the module path or its dotted end."""
    return path == entry or path.endswith(f".{entry}")


def matches(pattern: Collection[str] | str | None, path: str) -> bool:
    """Return whether the names, or the one regular expression, pick the module path.

    With many names give a set: each end of the path is then looked up once.
    """
    if pattern is None:
        return False
    if isinstance(pattern, str):
        return fullmatch(pattern, path)
    return any(end in pattern for end in ends(path))


def fullmatch(expression: str, path: str) -> bool:
    """Return whether the expression matches the whole path.

    UserError where it is no expression, or takes too long here or together with others.
    """
    return _timed("fullmatch", expression, path) is not None


def layer(names: Sequence[str] | str | None, path: str) -> int | None:
    """Return the number after one of the expressions `names` (default: the first number) in a path.

    "model.layers.3.mlp.up" -> 3. None where there is none. A list at the very top of the model
    counts where no deeper one does, as PEFT reads it.
    """
    if not names:
        found = _timed("match", r"(?:.*?\.[^.]*|[^.]*)\.(?P<index>\d+)\.", path)
        return int(found["index"]) if found else None
    for name in [names] if isinstance(names, str) else names:
        found = _timed("match", rf"(?:^|.*?\.){name}\.(?P<index>\d+)\.", path)
        if found:  # an expression with a bar of its own may match without a number
            return int(found["index"]) if found["index"] else None
    return None


class Keys(Generic[T]):
    """Patterns of path ends with a value each, in their order: PEFT's rank_pattern and the like.

    A key of letters, digits, "_", "-" and dots is a name; any other is a regular expression.
    """

    def __init__(self, patterns: Mapping[str, T]) -> None:
        """Sort the names from the expressions; UserError where these are too many."""
        self._values = list(patterns.values())
        self._names: dict[str, int] = {}
        self._expressions: list[tuple[int, str]] = []
        for at, key in enumerate(patterns):
            if regex.fullmatch(r"[\w.-]+", key):
                self._names[key] = at
            else:
                self._expressions.append((at, rf"(.*\.)?({key})"))
        if len(self._expressions) > MOST_EXPRESSIONS:
            raise UserError(
                f"{len(self._expressions)} regular expressions for modules; the limit is "
                f"{MOST_EXPRESSIONS}: use plain names"
            )

    def first(self, path: str, otherwise: T) -> T:
        """Return the value of the first key that matches the path's end."""
        last = len(self._values)
        found = min((self._names[end] for end in ends(path) if end in self._names), default=last)
        for at, expression in self._expressions:
            if at > found:
                break
            if fullmatch(expression, path):
                found = at
                break
        return otherwise if found == last else self._values[found]

    def unused(self, paths: Collection[str]) -> list[int]:
        """Return the places of the keys that match the end of none of the paths."""
        reached = {end for path in paths for end in ends(path)}
        idle = [at for name, at in self._names.items() if name not in reached]
        for at, expression in self._expressions:
            if not any(fullmatch(expression, path) for path in paths):
                idle.append(at)
        return sorted(idle)


def check_counts(field: str, keys: Sized) -> None:
    """Raise UserError where a field holds more names than it may."""
    if len(keys) > MOST_NAMES:
        raise UserError(f"{field} holds {len(keys)} names, over the limit of {MOST_NAMES}")


def _timed(how: str, expression: str, path: str) -> regex.Match[str] | None:
    left = _left.get()
    limit = SECONDS if left is None else min(SECONDS, left[0])
    start = time.perf_counter()
    try:
        if limit <= 0:
            raise TimeoutError
        found: regex.Match[str] | None = getattr(compiled(expression), how)(path, timeout=limit)
    except TimeoutError:
        together = "" if limit == SECONDS else f" (all patterns together: {BUDGET} s)"
        raise UserError(
            f"the pattern {expression[:80]!r} took more than {max(limit, 0):.2g} s on "
            f"{path[:200]!r}{together}: write it without nested repetition, or use names"
        ) from None
    finally:
        if left is not None:
            left[0] -= time.perf_counter() - start
    return found


@lru_cache(maxsize=512)
def compiled(expression: str) -> regex.Pattern[str]:
    """Return the compiled expression; UserError names what is wrong with it."""
    if len(expression) > LONGEST:
        raise UserError(
            f"a module pattern of {len(expression)} characters is over the limit of {LONGEST}: "
            "use a list of names"
        )
    counts = regex.findall(r"\d+", " ".join(regex.findall(r"\{[^{}]*\}", expression)))
    if math.prod(max(1, int(n[:9])) for n in counts) > MOST_REPEATS:
        raise UserError(
            f"the counted repeats of {expression[:80]!r} come to more than {MOST_REPEATS} times: "
            "use * or +"
        )
    try:
        return regex.compile(expression)
    except regex.error as error:
        raise UserError(f"{expression[:80]!r} is not a regular expression: {error}") from None
    except (RecursionError, OverflowError, MemoryError, KeyError, ValueError) as error:
        raise UserError(
            f"{expression[:80]!r} is not a usable regular expression: {type(error).__name__}"
        ) from None
