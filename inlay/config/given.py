"""One value as it was given, with the place it came from; and those that Python gives."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from inlay.config.schema import BLOCKS, RunConfig, flatten, keys, objective_name
from inlay.core.config import AdapterConfig
from inlay.core.errors import UserError


@dataclasses.dataclass(frozen=True)
class Given:
    """A key with its value, before names and types are checked."""

    key: str
    """Dotted, as it was written."""
    value: Any
    origin: str
    """`recipe.yaml:12`, `command line` or `python`."""
    is_word: bool = False
    """Whether the value is a word of the command line, whose type is still open."""
    folder: Path | None = None
    """Where its relative paths begin; None is the current folder."""
    is_default: bool = False
    """Whether it is the default of a block that was given whole, and hides an earlier value."""


def from_mapping(settings: Mapping[str, Any], origin: str = "python") -> list[Given]:
    """Return the values of nested or dotted settings; a block may be its dataclass."""
    found: list[Given] = []
    for key, value in settings.items():
        if not isinstance(key, str):
            raise UserError(f"{key!r} is no key of a configuration; keys are text")
        if isinstance(value, Mapping) and key in BLOCKS:
            found += [Given(f"{key}.{name}", inner, origin) for name, inner in value.items()]
        elif key in BLOCKS and dataclasses.is_dataclass(value):
            found += _from_block(key, value, origin)
        else:
            found.append(Given(key, value, origin))
    return found


def from_config(config: RunConfig, origin: str = "python") -> list[Given]:
    """Return the values of `config` that are not the defaults."""
    method, objective = str(config.adapter.method).lower(), objective_name(config.objective)
    defaults = keys(method, objective)
    return [
        Given(name, value, origin)
        for name, value in flatten(config).items()
        if name in ("adapter.method", "objective.name") or value != defaults[name].default
    ]


def _from_block(block: str, value: Any, origin: str) -> list[Given]:
    if block == "adapter" and not isinstance(value, AdapterConfig):
        raise UserError(f"adapter is a {type(value).__name__}; give a method's, such as LoraConfig")
    whole = RunConfig(**{block: value})
    told = {given.key: given for given in from_config(whole, origin)}
    return [
        told.get(name, Given(name, inner, origin, is_default=True))
        for name, inner in flatten(whole).items()
        if name.startswith(f"{block}.")
    ]
