"""Train an adapter from a recipe, or go on with a run that was stopped.

    inlay train recipe.yaml
    inlay train recipe.yaml --adapter.r 32 --train.learning_rate 1e-4
    inlay train --base_model Qwen/Qwen3-0.6B --data chats.jsonl

Every key of a recipe is an option: below, by block, with its default. The run
folder (output_dir) holds all that the run leaves; the same command goes on with
a run that was stopped.
"""

from __future__ import annotations

import signal
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from types import FrameType
from typing import Any

from inlay.cli._machine import settle
from inlay.core.errors import UserError

USAGE = "usage: inlay train [RECIPE] [--KEY VALUE ...] [--overwrite] [--json] [--debug]"
OPTIONS = {
    "overwrite": "replace a run that stands in output_dir",
    "json": "print one JSON line an event, and nothing else",
    "debug": "show the traceback of an error",
}


def main(words: Sequence[str]) -> int:
    """Train as `words` say and return the exit code: 0 also where the run was told to stop."""
    if "--help" in words or "-h" in words:
        print(_help())
        return 0
    options = {name for name in OPTIONS if f"--{name}" in words}
    words = [word for word in words if word not in {f"--{name}" for name in options}]
    machine = settle()
    with stop_asked():
        resolved = settings(words)
        from inlay.run import start
        from inlay.run.report import JsonLines, Terminal

        report = JsonLines() if "json" in options else Terminal()
        if machine:
            report.notice(machine)
        start(resolved, overwrite="overwrite" in options, report=report)
    return 0


def settings(words: Sequence[str]) -> Any:
    """Return the resolved settings of a recipe (at most one) and the `--key` words."""
    if not words:
        raise UserError(f"give a recipe or at least --data FILE\n{USAGE}")
    from inlay.config.recipe import read_recipe
    from inlay.config.resolve import resolve
    from inlay.config.words import read_words

    given, recipes = read_words(words)
    if len(recipes) > 1 or (recipes and recipes[0].startswith("-")):
        raise UserError(
            f"{recipes[-1]!r}: one recipe is taken, and options of the form --KEY VALUE"
        )
    return resolve(read_recipe(recipes[0]) if recipes else [], given)


class Terminated(SystemExit):
    """SIGTERM outside the training loop, which has its own way to stop."""


@contextmanager
def stop_asked() -> Iterator[None]:
    """End with exit code 0 where SIGTERM comes while there is no step to finish and save."""

    def handle(_: int, __: FrameType | None) -> None:
        raise Terminated(0)

    before = signal.signal(signal.SIGTERM, handle)
    try:
        yield
    except Terminated:
        print("stopped; the same command goes on", file=sys.stderr)
    finally:
        signal.signal(signal.SIGTERM, before)


def _help() -> str:
    from inlay.config.reference import to_text

    lines = [USAGE, "", (__doc__ or "").rstrip(), "", "options:"]
    lines += [f"  --{name}\n      {text}" for name, text in OPTIONS.items()]
    return "\n".join(lines) + "\n" + to_text()
