"""Folders that can be opened, told apart by their files: a run's, an adapter's, a model's."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from inlay.core.errors import UserError

Kind = Literal["run", "adapter", "checkpoint", "model", "unknown"]


def kind_of(folder: str | Path) -> Kind:
    """Return what `folder` is; UserError where there is none."""
    folder = Path(folder).expanduser()
    if not folder.is_dir():
        what = "this is a file, not a folder" if folder.exists() else "there is no such folder"
        raise UserError(f"{folder}: {what}")
    marks: dict[Kind, str] = {
        "run": "config.yaml",
        "adapter": "adapter_config.json",
        "checkpoint": "manifest.json",
        "model": "config.json",
    }
    return next((kind for kind, file in marks.items() if (folder / file).is_file()), "unknown")


def is_hub_id(place: str) -> bool:
    """Return whether `place` can only be the name of a repository on the hub."""
    return bool(re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", place)) and not Path(place).exists()


def open_trained(place: str, base_model: str | None = None, **arguments: Any) -> tuple[Any, Any]:
    """Return (model, tokenizer) of a run or an adapter (a folder, a hub id), ready to generate.

    base_model: in place of the base that it names; arguments: more for `load_base`. Raises
    UserError for any other folder.
    """
    kind = "adapter" if is_hub_id(place) else kind_of(place)
    if kind == "run":
        from inlay.run.folder import Run

        run = Run.open(place)
        if base_model is None or run.is_full:
            return run.load()
        run.require_trained()
        return open_adapters({"default": str(run.adapter)}, base_model, **arguments)
    if kind == "adapter":
        return open_adapters({"default": place}, base_model, **arguments)
    raise UserError(
        f"{place} is no run (config.yaml) and no adapter (adapter_config.json){_also(kind)}"
    )


def open_adapters(
    places: dict[str, str], base_model: str | None = None, **arguments: Any
) -> tuple[Any, Any]:
    """Return (model, tokenizer) of one base with several adapters by name, the first active.

    The tokenizer is that of the first adapter's folder, else the base's.
    """
    from inlay.checkpoint.folder import fetch, read_config
    from inlay.model.load import load_base, load_tokenizer
    from inlay.surface.peft_model import PeftModel

    folders = {name: fetch(place) for name, place in places.items()}
    first, *others = folders
    settings = read_config(folders[first])
    name = base_model or settings.base_model_name_or_path
    if base_model is None:
        arguments.setdefault("revision", settings.revision)
    base, tokenizer = load_base(name, **arguments)
    model = PeftModel.from_pretrained(base, folders[first], first)
    for other in others:
        model.load_adapter(folders[other], other)
    model.set_adapter(first, inference_mode=True)
    return model.eval(), load_tokenizer(folders[first]) or tokenizer


def named(words: Sequence[str]) -> dict[str, str]:
    """Return name -> folder of words `FOLDER` or `NAME=FOLDER`; UserError for a name twice.

    >>> named(["runs/support/adapter", "b=other"])
    {'support': 'runs/support/adapter', 'b': 'other'}
    """
    found: dict[str, str] = {}
    for word in words:
        name, equals, place = word.partition("=")
        if not equals:
            path = Path(word).expanduser()
            # runs/support/adapter is better known as support
            own = path.parent if path.name == "adapter" and path.parent.name else path
            name, place = re.sub(r"[^A-Za-z0-9_-]+", "-", own.name) or "adapter", word
        if name in found:
            raise UserError(f"two adapters are called {name!r}; give names: --adapter NAME=FOLDER")
        if name == "none":
            raise UserError("'none' is the base; call the adapter otherwise: --adapter NAME=FOLDER")
        found[name] = place
    return found


def _also(kind: Kind) -> str:
    hints: dict[str, str] = {
        "checkpoint": "; it is a checkpoint of a run: give the run's folder",
        "model": "; it is a plain model, which needs no adapter",
    }
    return hints.get(kind, "")
