"""The weights that a packed base was made from, read one by one from its safetensors files."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from inlay.core.errors import UserError
from inlay.model.load import TINY, embedded


class Weights:
    """Tensors of one or more safetensors files by name."""

    def __init__(self, place: str | Path | None, model: nn.Module) -> None:
        """Find the files of `place`: one, a folder of them, or an id of the hub that was fetched.

        place: default, what `model` was loaded from. UserError where there are none.
        """
        from safetensors import safe_open

        name = str(place or getattr(model, "name_or_path", None) or "")
        found = _folder(name)
        files = sorted(found.glob("*.safetensors")) if found.is_dir() else [found]
        if not name or not files or not files[0].is_file():
            raise UserError(f"{name!r} is no folder or file with the base's weights (safetensors)")
        self._files: dict[str, Path] = {}
        self._place, self._prefix = name, f"{getattr(model, 'base_model_prefix', '')}."
        for file in files:
            with safe_open(file, framework="pt") as held:
                self._files |= dict.fromkeys(held.keys(), file)

    def read(self, name: str, like: Tensor) -> Tensor:
        """Return the matrix of this name as `like` [O, I] is; UserError where it is another's."""
        from safetensors import safe_open

        # a base model's own files leave out the prefix that its heads' models have
        found = next((n for n in (name, name.removeprefix(self._prefix)) if n in self._files), None)
        if found is None:
            raise UserError(f"{self._place} holds no {name}: give the folder of this base")
        with safe_open(self._files[found], framework="pt") as held:
            tensor: Any = held.get_tensor(found)
        if not tensor.is_floating_point():
            raise UserError(
                f"{self._place} holds {name} in codes: give the folder of the base as it was before"
            )
        tensor = tensor if tensor.shape == like.shape else tensor.T
        if tensor.shape != like.shape:
            raise UserError(f"{self._place}: {name} has not the shape {list(like.shape)}")
        whole: Tensor = tensor.to(like)
        return whole


def _folder(name: str) -> Path:
    if name == TINY:
        return Path(embedded())
    if name and not os.path.exists(name):
        from huggingface_hub import snapshot_download
        from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError

        try:
            fetched = snapshot_download(name, allow_patterns="*.safetensors", local_files_only=True)
            return Path(fetched)
        except (HFValidationError, LocalEntryNotFoundError):
            pass
    return Path(name)
