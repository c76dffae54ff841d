r"""Train several methods alike; report quality, size, memory and time.

    inlay compare recipe.yaml --methods lora,dora,ia3,full
    inlay compare recipe.yaml --methods small=lora,large=lora \
        --set small.r=2 --set large.r=32
    inlay compare recipe.yaml --methods lora,full --learning_rates x0.3,x1,x3 \
        --seeds 1,2,3 --test test.jsonl

Each is trained with the same rows in the same order for the same steps (or
seconds), and measured on the held-out rows. Keys of a recipe are options here
as in `inlay train`. The same command goes on with a comparison that was
stopped.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from inlay.cli._machine import settle
from inlay.core.errors import UserError

USAGE = "usage: inlay compare [RECIPE] --methods NAME,NAME,... [--KEY VALUE ...]"
OPTIONS = {
    "methods": "what to compare: methods (also dora, rslora, pissa, olora), or NAME=METHOD",
    "set": "NAME.KEY=VALUE, a setting of one of them, such as lora.r=8; repeat",
    "learning_rates": "rates to try for each, the best on the held-out rows is taken: "
    "1e-4,1e-3, or multiples of its own: x0.3,x1,x3",
    "seeds": "seeds to train the best rate with, such as 1,2,3 (default: train.seed)",
    "seconds": "training time of each, in place of the recipe's steps",
    "test": "file of rows to measure on at the end (default: the held-out rows)",
}
FLAGS = {
    "overwrite": "train anew what is there",
    "json": "print one JSON line an event, and nothing else",
    "debug": "show the traceback of an error",
}


def main(words: Sequence[str]) -> int:
    """Compare as `words` say and return the exit code: 0 also where it was told to stop."""
    if "--help" in words or "-h" in words:
        print(_help())
        return 0
    flags = {name for name in FLAGS if f"--{name}" in words}
    given, rest = read_options([word for word in words if word not in {f"--{n}" for n in flags}])
    from inlay.cli.train import stop_asked

    machine = settle()
    with stop_asked():
        from inlay.config.recipe import read_recipe
        from inlay.config.words import read_words

        keys, recipes = read_words(rest)
        if len(recipes) > 1:
            raise UserError(f"{recipes[-1]!r}: one recipe is taken.\n{USAGE}")
        recipe = read_recipe(recipes[0]) if recipes else []
        from inlay.run.compare import Options, compare
        from inlay.run.compare_view import JsonView, Terminal

        options = Options(**given, overwrite="overwrite" in flags)
        view = JsonView() if "json" in flags else Terminal()
        if machine:
            view.notice(machine)
        compare(recipe, keys, options, view)
    return 0


def read_options(words: Sequence[str]) -> tuple[dict[str, Any], list[str]]:
    """Return what `Options` takes, and the words that are left for the recipe's keys."""
    found: dict[str, list[str]] = {}
    rest: list[str] = []
    waiting = list(words)
    while waiting:
        word = waiting.pop(0)
        name, equals, value = word.removeprefix("--").partition("=")
        if not word.startswith("--") or name not in OPTIONS:
            rest.append(word)
            continue
        if not equals:
            if not waiting or waiting[0].startswith("--"):
                raise UserError(f"--{name} needs a value: {OPTIONS[name]}")
            value = waiting.pop(0)
        if name in found and name != "set":
            raise UserError(f"--{name} is given twice: {found[name][0]!r} and {value!r}; keep one")
        found.setdefault(name, []).append(value)
    if "methods" not in found:
        raise UserError(f"--methods is missing: {OPTIONS['methods']}\n{USAGE}")
    several = {
        name: _parts(*found[name])
        for name in ("methods", "learning_rates", "seeds")
        if name in found
    }
    options: dict[str, Any] = {"methods": several["methods"], "sets": found.get("set", [])}
    options["rates"] = several.get("learning_rates", [])
    options["seeds"] = [int(_number("seeds", word, int)) for word in several.get("seeds", [])]
    if "seconds" in found:
        options["seconds"] = _number("seconds", found["seconds"][0], float)
    options["test"] = found["test"][0] if "test" in found else None
    return options, rest


def _parts(text: str) -> list[str]:
    return [part.strip() for part in text.split(",") if part.strip()]


def _number(name: str, word: str, kind: type[int] | type[float]) -> float:
    try:
        return kind(word)
    except ValueError:
        raise UserError(f"--{name} is {word!r}; {OPTIONS[name]}") from None


def _help() -> str:
    import textwrap

    lines = [USAGE, "", (__doc__ or "").rstrip(), "", "options:"]
    for name, text in (OPTIONS | FLAGS).items():
        lines.append(f"  --{name}")
        lines += textwrap.wrap(text, 79, initial_indent=" " * 6, subsequent_indent=" " * 6)
    return "\n".join(lines)
