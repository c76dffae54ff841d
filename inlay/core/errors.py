"""What a user's mistake looks like: one exception, one way to suggest the name that was meant."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class UserError(ValueError):
    """A mistake in what the user gave; the message names the value, the limit and the way out.

    The command line prints it on one screen without a traceback and exits with 2.
    """


def nearest(name: str, choices: Iterable[str]) -> str:
    """Return " Did you mean 'x'?" for the closest of `choices`, or "" where none is close."""
    found = difflib.get_close_matches(name, list(choices), n=1, cutoff=0.6)
    return f" Did you mean {found[0]!r}?" if found else ""
