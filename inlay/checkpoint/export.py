"""A plain transformers folder: weights, configuration, tokenizer and chat template."""

from __future__ import annotations

import copy
import json
import tempfile
from pathlib import Path
from typing import Any

import torch

from inlay.checkpoint.atomic import whole_folder
from inlay.core.errors import UserError
from inlay.core.inlaid import Inlaid
from inlay.model.load import quiet


def export_model(
    model: Any,
    tokenizer: Any,
    folder: str | Path,
    *,
    dtype: torch.dtype | None = None,
    chat_template: str | None = None,
) -> Path:
    """Write a model without adapters to `folder`, whole or not at all, and return it.

    dtype: of the written weights (default: the model's own); the model itself is not changed.
    Raises UserError for a folder that is not empty, a full disk, a model that still holds
    adapters, and one with biases that its class does not have.
    """
    if any(isinstance(module, Inlaid) for module in model.modules()):
        raise UserError(
            "the model still holds adapters: call merge_and_unload() before exporting it"
        )
    _check_biases(model)
    folder = Path(folder)
    weights = None
    if dtype is not None:
        weights = {
            n: t.to(dtype) if t.is_floating_point() else t for n, t in model.state_dict().items()
        }
    with whole_folder(folder) as partial, quiet():
        model.save_pretrained(partial, state_dict=weights)
        if dtype is not None:
            # save_pretrained notes the dtype that the model has in memory
            told = json.loads((partial / "config.json").read_text("utf-8"))
            told["dtype"] = str(dtype).removeprefix("torch.")
            (partial / "config.json").write_text(json.dumps(told, indent=2) + "\n", "utf-8")
        if tokenizer is not None:
            _with_template(tokenizer, chat_template).save_pretrained(partial)
    return folder


def _check_biases(model: Any) -> None:
    """Raise UserError where a merge gave a layer a bias: whoever reads the folder would drop it."""
    biases = {name for name in model.state_dict() if name.endswith(".bias")}
    if not biases:
        return
    with torch.device("meta"), quiet():
        known = type(model)(copy.deepcopy(model.config)).state_dict()
    added = sorted(biases - known.keys())
    if added:
        raise UserError(
            f"the merged adapter gave {len(added)} layers a bias, {added[0]} first, and "
            f"{type(model).__name__} has no place for it: whoever reads the folder would drop it. "
            "Keep the adapter beside its base"
        )


def tokenizer_files(tokenizer: Any, chat_template: str | None) -> dict[str, bytes]:
    """Return the files of a tokenizer by name, with `chat_template` in place of its own."""
    if tokenizer is None:
        return {}
    tokenizer = _with_template(tokenizer, chat_template)
    with tempfile.TemporaryDirectory() as folder:
        tokenizer.save_pretrained(folder)
        return {p.name: p.read_bytes() for p in sorted(Path(folder).iterdir()) if p.is_file()}


def _with_template(tokenizer: Any, chat_template: str | None) -> Any:
    if chat_template is None or chat_template == tokenizer.chat_template:
        return tokenizer
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.chat_template = chat_template
    return tokenizer
