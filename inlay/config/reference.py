"""Every key with its default and docstring, as text for the help and as a page of the documents."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator

from inlay.config.dump import in_line
from inlay.config.schema import Key, all_keys

TOP = "base and run folder"


def blocks() -> Iterator[tuple[str, list[Key]]]:
    """Yield each block's name and its keys, those outside any block first."""
    found: dict[str, list[Key]] = {TOP: []}
    for key in all_keys().values():
        if key.shown:
            found.setdefault(key.block or TOP, []).append(key)
    yield from found.items()


def to_text(width: int = 79) -> str:
    """Return the keys as command line options."""
    lines = []
    for block, keys in blocks():
        lines += ["", f"{block}:"]
        for key in keys:
            lines.append(f"  --{key.name} {in_line(key.default)}")
            indent = " " * 6
            lines += textwrap.wrap(key.doc, width, initial_indent=indent, subsequent_indent=indent)
    return "\n".join(lines)


def to_markdown() -> str:
    """Return a table a block: key, default, what it does."""
    lines = []
    for block, keys in blocks():
        title = f"`{block}`" if block != TOP else TOP.capitalize()
        lines += [f"### {title}", "", "| key | default | |", "|---|---|---|"]
        for key in keys:
            doc = key.doc.replace("|", "\\|")
            lines.append(f"| `{key.name}` | `{in_line(key.default)}` | {doc} |")
        lines.append("")
    return "\n".join(lines)
