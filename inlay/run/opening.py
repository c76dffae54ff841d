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


def open_trained(
    place: str,
    base_model: str | None = None,
    *,
    device: str | None = None,
    check_base: bool = True,
) -> tuple[Any, Any]:
    """Return (model, tokenizer) of a run or an adapter (a folder, a hub id), ready to generate.

    base_model, device: in place of those that it names; check_base: refuse a base other than the
    one it was trained on. Raises UserError for any other folder.
    """
    given: dict[str, Any] = {"device": device, "check_base": check_base}
    kind = "adapter" if is_hub_id(place) else kind_of(place)
    if kind == "run":
        from inlay.run.folder import Run

        run = Run.open(place)
        if base_model is None:
            return run.load(**given)
        return open_adapters({"default": adapter_of(place)}, base_model, **given)
    if kind == "adapter":
        return open_adapters({"default": place}, base_model, **given)
    raise UserError(
        f"{place} is no run (config.yaml) and no adapter (adapter_config.json){_also(kind)}"
    )


def adapter_of(place: str) -> str:
    """Return the adapter's folder where `place` is that of its run, else `place`.

    Raises UserError for a run that has none: not ended yet, or of full fine-tuning.
    """
    if is_hub_id(place) or kind_of(place) != "run":
        return place
    from inlay.run.folder import Run

    run = Run.open(place)
    run.require_trained()
    if run.is_full:
        raise UserError(
            f"{place} trained the whole model, so it has no adapter to set into another base; "
            f"its model is {run.trained}"
        )
    return str(run.adapter)


def open_adapters(
    places: dict[str, str],
    base_model: str | None = None,
    *,
    device: str | None = None,
    check_base: bool = True,
) -> tuple[Any, Any]:
    """Return (model, tokenizer) of one base with several adapters by name, the first active.

    The tokenizer is that of the first adapter's folder, else the base's.
    """
    from inlay.checkpoint.folder import fetch, read_config, read_labels
    from inlay.model.load import load_base, load_tokenizer
    from inlay.surface.peft_model import PeftModel

    folders = {name: fetch(place) for name, place in places.items()}
    first, *others = folders
    settings = read_config(folders[first])
    name = base_model or settings.base_model_name_or_path
    revision = settings.revision if base_model is None else None
    base, tokenizer = load_base(
        name,
        device=device,
        revision=revision,
        task_type="SEQ_CLS" if settings.task_type == "SEQ_CLS" else None,
        labels=read_labels(folders[first]),
    )
    model = PeftModel.from_pretrained(base, folders[first], first, check_base=check_base)
    for other in others:
        model.load_adapter(folders[other], other, check_base=check_base)
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
