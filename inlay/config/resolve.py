"""Layers of given values -> one RunConfig and the origin of every value of it."""

from __future__ import annotations

import dataclasses
import os
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from inlay.config.aliases import rename
from inlay.config.given import Given, from_config, from_mapping
from inlay.config.recipe import read_recipe
from inlay.config.schema import (
    BLOCKS,
    RunConfig,
    adapter_config,
    all_keys,
    build,
    flatten,
    keys,
    objective_class,
)
from inlay.config.values import check
from inlay.core.errors import UserError
from inlay.data.read import is_data_file

PATHS = ("base_model", "data.path", "data.eval_path", "data.chat_template")
"""Keys whose value may be a path, and in a recipe then begins at the recipe's folder."""

DEFAULT = "default"


@dataclasses.dataclass(frozen=True)
class Resolved:
    """The settings of a run, where each came from, and what has to be said about them."""

    config: RunConfig
    origins: Mapping[str, str]
    """Dotted key -> `default`, `recipe.yaml:12`, `command line` or `python`, for every key."""
    notices: tuple[str, ...] = ()

    @property
    def values(self) -> dict[str, Any]:
        """Every value by its dotted key, with paths that hold from any folder."""
        found = flatten(self.config)
        for name in (*PATHS, "output_dir"):
            found[name] = _everywhere(found[name], always=name == "output_dir")
        return found


def resolve(*layers: Iterable[Given]) -> Resolved:
    """Return the settings that `layers` give, a later one before an earlier.

    Raises UserError for an unknown key, a key given twice within a layer with two values, a value
    of the wrong type or one that its block refuses; with the place where it was given.
    """
    notices: list[str] = []
    chosen: dict[str, Given] = {}
    for layer in layers:
        chosen |= _one_layer(layer, notices)
    chosen = {name: given for name, given in chosen.items() if not given.is_default}
    method = _choice(chosen, "adapter.method", "lora")
    objective = _choice(chosen, "objective.name", "sft")
    with_place(lambda: (adapter_config(method), objective_class(objective)), chosen)
    known, values = keys(method, objective), {}
    for name, given in chosen.items():
        if name not in known:
            kind, word = (
                ("adapter", method) if name.startswith("adapter.") else ("objective", objective)
            )
            raise UserError(
                f"{name} ({given.origin}) is no setting of {kind}: {word}; leave it out"
            )
        values[name] = _placed(name, check(known[name], given), given)
    values["adapter.method"], values["objective.name"] = method, objective
    config = with_place(lambda: build(method, objective, values), chosen)
    origins = {name: chosen[name].origin if name in chosen else DEFAULT for name in known}
    if config.output_dir is None:
        config = dataclasses.replace(config, output_dir=_default_folder(config))
    return Resolved(config, origins, tuple(dict.fromkeys(notices)))


def resolve_python(
    config: str | Path | Mapping[str, Any] | RunConfig | None, overrides: Mapping[str, Any]
) -> Resolved:
    """Return the settings of a recipe's path, a mapping or a RunConfig, with `overrides`."""
    if isinstance(config, RunConfig):
        first = from_config(config)
    elif isinstance(config, Mapping):
        first = from_mapping(config)
    elif isinstance(config, str | os.PathLike):
        first = read_recipe(config)
    elif config is None:
        first = []
    else:
        raise UserError(
            f"a configuration is a recipe's path, a mapping or a RunConfig, not {config!r:.60}"
        )
    return resolve(first, from_mapping(overrides))


def with_place(make: Any, chosen: Mapping[str, Given]) -> Any:
    """Return make(); a UserError that names given keys is told where they were given."""
    try:
        return make()
    except UserError as error:
        text = str(error)
        # the value at fault is named first: "r=-1 must be", "train.max_steps is 0"
        first = re.match(r"[\w.]+", text)
        word = first.group() if first else ""
        named = [g for name, g in chosen.items() if word in (name, name.rpartition(".")[2])]
        if not named:
            raise
        raise UserError(f"{text} ({named[0].origin})") from None


def _one_layer(layer: Iterable[Given], notices: list[str]) -> dict[str, Given]:
    found: dict[str, Given] = {}
    written: dict[str, str] = {}
    for raw in layer:
        if raw.key in BLOCKS and raw.value is None:
            continue  # `train:` with nothing below it
        given, notice = rename(raw)
        if notice:
            notices.append(notice)
        before = found.get(given.key)
        if before is not None and given.is_default:
            continue  # what is named goes before the defaults of a block that is given whole
        if before is not None and not before.is_default and before.value != given.value:
            raise UserError(
                f"{given.key} is given twice: {before.value!r} as {written[given.key]} "
                f"({before.origin}) and {given.value!r} as {raw.key} ({given.origin}); keep one"
            )
        found[given.key], written[given.key] = given, raw.key
    return found


def _choice(chosen: Mapping[str, Given], name: str, otherwise: str) -> str:
    if name not in chosen:
        return otherwise
    return str(check(all_keys()[name], chosen[name])).lower()


def _placed(name: str, value: Any, given: Given) -> Any:
    """Return `value`; a path of a recipe then leads there from the current folder."""
    if given.folder is None or name not in PATHS or value is None:
        return value
    if isinstance(value, list | tuple):
        return [_placed(name, part, given) for part in value]
    there = given.folder / Path(value).expanduser()
    # a hub id looks like a path; where there is no such file it is taken for one
    return str(there) if is_data_file(value) or _exists(there) else value


def _everywhere(value: Any, *, always: bool) -> Any:
    if isinstance(value, list | tuple):
        return [_everywhere(part, always=always) for part in value]
    if not value:
        return value
    if not (always or is_data_file(value) or _exists(Path(value).expanduser())):
        return value
    return str(Path(value).expanduser().absolute())


def _exists(path: Path) -> bool:
    try:
        return path.exists()
    except OSError:  # Jinja text is too long for a name
        return False


def _default_folder(config: RunConfig) -> str:
    first = next(iter(config.data.paths), "")
    return str(Path("runs") / (re.sub(r"[^\w.-]+", "-", Path(first).stem) or "run"))
