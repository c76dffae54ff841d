"""Command line words -> values: `--adapter.r 32`, `--adapter.r=32`, `--data FILE`, a flag alone."""

from __future__ import annotations

from collections.abc import Sequence

from inlay.config.given import Given
from inlay.core.errors import UserError

ORIGIN = "command line"
_YES_OR_NO = ("true", "false", "yes", "no", "on", "off", "1", "0")
"""Words after a flag that are its value, as YAML reads it or refuses it, and no recipe's name."""


def read_words(words: Sequence[str]) -> tuple[list[Given], list[str]]:
    """Return the values of the `--key` words, and the words that belong to none of them.

    A word of the form `--key=value` holds its value, otherwise it is the next word. A key whose
    type is true or false needs none. Raises UserError for a key without its value.
    """
    found: list[Given] = []
    rest: list[str] = []
    waiting = list(words)
    while waiting:
        word = waiting.pop(0)
        if not word.startswith("--") or word == "--":
            rest.append(word)
            continue
        name, equals, text = word[2:].partition("=")
        if not equals:
            if _needs_value(name, waiting):
                text = waiting.pop(0)
            elif _is_flag(name):
                text = "true"
            else:
                raise UserError(f"--{name} needs a value: --{name} VALUE{_example(name)}")
        found.append(Given(name, text, ORIGIN, is_word=True))
    return found, rest


def _needs_value(name: str, following: Sequence[str]) -> bool:
    if not following or following[0].startswith("--"):
        return False
    # a flag takes the next word only where that can be its value: what follows may be the recipe
    return not _is_flag(name) or following[0].lower() in _YES_OR_NO


def _is_flag(name: str) -> bool:
    from inlay.config.aliases import find_key

    key = find_key(name)
    return key is not None and key.is_flag


def _example(name: str) -> str:
    from inlay.config.aliases import find_key

    key = find_key(name)
    return f" (its default is {key.default!r})" if key is not None else ""
