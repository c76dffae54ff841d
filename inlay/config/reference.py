"""Every key with its default and docstring, as text for the help and as a page of the documents."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator

from inlay.config.dump import in_line
from inlay.config.schema import Key, all_keys, keys

TOP = "base and run folder"


def blocks() -> Iterator[tuple[str, list[Key]]]:
    """Yield each block's name and its keys, those outside any block and of the default first."""
    found: dict[str, list[Key]] = {TOP: []}
    first = keys()
    rest = {name: key for name, key in all_keys().items() if name not in first}
    for key in (first | rest).values():
        if key.shown:
            found.setdefault(key.block or TOP, []).append(key)
    yield from found.items()


def told(key: Key) -> str:
    """Return a key's docstring, with the methods that have it where that is not all of them."""
    from inlay.methods import method, names

    several = [name for name in names() if method(name).adapter is not None]
    # a method may have a field for the files alone, and refuse it
    owners = [name for name in several if key.name in keys(name) and keys(name)[key.name].shown]
    if key.block != "adapter" or owners == several:
        return key.doc
    others = [name for name in several if name not in owners]
    named = f"not {', '.join(others)}" if len(others) < len(owners) else ", ".join(owners)
    return f"{key.doc} [{named}]"


def to_text(width: int = 79) -> str:
    """Return the keys as command line options."""
    lines = []
    for block, inside in blocks():
        lines += ["", f"{block}:"]
        for key in inside:
            lines.append(f"  --{key.name} {in_line(key.default)}")
            indent = " " * 6
            lines += textwrap.wrap(
                told(key), width, initial_indent=indent, subsequent_indent=indent
            )
    return "\n".join(lines)


def to_markdown() -> str:
    """Return a table a block: key, default, what it does."""
    lines = []
    for block, inside in blocks():
        title = f"`{block}`" if block != TOP else TOP.capitalize()
        lines += [f"### {title}", "", "| key | default | |", "|---|---|---|"]
        for key in inside:
            doc = told(key).replace("|", "\\|")
            lines.append(f"| `{key.name}` | `{in_line(key.default)}` | {doc} |")
        lines.append("")
    return "\n".join(lines)
