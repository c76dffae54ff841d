"""The resolved settings as YAML, each with its origin as a comment; it is a recipe itself."""

from __future__ import annotations

from typing import Any

import yaml

from inlay.config.resolve import DEFAULT, Resolved
from inlay.config.schema import all_keys
from inlay.core.config import plain


def to_yaml(resolved: Resolved, heading: str = "") -> str:
    """Return the text of config.yaml: every key, its value, and `# origin`."""
    known, lines = all_keys(), [f"# {line}" for line in heading.splitlines()]
    block = ""
    values = resolved.values
    for name, value in sorted(values.items(), key=lambda pair: "." in pair[0]):
        origin = resolved.origins[name]
        if not known[name].shown and origin == DEFAULT:
            continue
        if known[name].block != block:
            block = known[name].block
            lines.append(f"{block}:")
        indent = "  " if block else ""
        lines.append(f"{indent}{known[name].last}: {in_line(value)}  # {origin}")
    return "\n".join(lines) + "\n"


def in_line(value: Any) -> str:
    """Return `value` as YAML on one line."""
    text = yaml.safe_dump(
        plain(value), default_flow_style=True, width=float("inf"), allow_unicode=True
    )
    return text.removesuffix("\n").removesuffix("\n...")
