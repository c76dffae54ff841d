"""A plain transformers folder: weights, configuration, tokenizer and chat template."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import torch

from inlay.checkpoint.atomic import whole_folder
from inlay.core.errors import UserError
from inlay.core.inlaid import Inlaid


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
    Raises UserError for a folder that is not empty, a full disk, and a model that still holds
    adapters.
    """
    if any(isinstance(module, Inlaid) for module in model.modules()):
        raise UserError(
            "the model still holds adapters: call merge_and_unload() before exporting it"
        )
    folder = Path(folder)
    untie(model)
    weights = None
    if dtype is not None:
        weights = {
            n: t.to(dtype) if t.is_floating_point() else t for n, t in model.state_dict().items()
        }
    with whole_folder(folder) as partial:
        model.save_pretrained(partial, state_dict=weights)
        if dtype is not None:
            # save_pretrained notes the dtype that the model has in memory
            told = json.loads((partial / "config.json").read_text("utf-8"))
            told["dtype"] = str(dtype).removeprefix("torch.")
            (partial / "config.json").write_text(json.dumps(told, indent=2) + "\n", "utf-8")
        if tokenizer is not None:
            written = tokenizer
            if chat_template is not None and chat_template != tokenizer.chat_template:
                written = copy.deepcopy(tokenizer)
                written.chat_template = chat_template
            written.save_pretrained(partial)
    return folder


def untie(model: Any) -> None:
    """Say in the model's configuration which of its tied weights are tied no longer.

    An update merged into one of two tied layers parts them; a reader that ties them again would
    lose it.
    """
    config: Any = getattr(model, "config", None)
    for module in model.modules():
        tied = getattr(module, "all_tied_weights_keys", None)
        if tied:
            own = dict(module.named_parameters(remove_duplicate=False))
            module.all_tied_weights_keys = {
                target: source
                for target, source in tied.items()
                if own.get(target) is own.get(source)
            }
    if getattr(config, "tie_word_embeddings", False) and hasattr(model, "get_input_embeddings"):
        below, above = model.get_input_embeddings(), model.get_output_embeddings()
        if below is not None and above is not None and above.weight is not below.weight:
            config.tie_word_embeddings = False
