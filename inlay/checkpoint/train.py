"""Training checkpoints: step-N/ with tensors.safetensors, state.json and manifest.json (SHA-256).

One is written whole or not at all; reading takes the newest whose every file has the size and
digest of its manifest. Only safetensors and JSON, so that opening one can run nothing.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from inlay.checkpoint.atomic import clean_partials, remove_folder, whole_folder, write_text

if TYPE_CHECKING:
    from torch import Tensor

FORMAT = "inlay-checkpoint-1"
TENSORS, STATE, MANIFEST = "tensors.safetensors", "state.json", "manifest.json"


@dataclass(frozen=True)
class Checkpoint:
    """A verified checkpoint on disk."""

    path: Path
    step: int

    def state(self) -> dict[str, Any]:
        """Return the JSON state as it was given to `write_checkpoint`."""
        state: dict[str, Any] = json.loads((self.path / STATE).read_text("utf-8"))
        return state

    def tensors(self) -> dict[str, Tensor]:
        """Return every tensor by name, on the CPU."""
        from safetensors.torch import load_file

        return load_file(self.path / TENSORS)


def write_checkpoint(
    folder: str | Path, step: int, tensors: Mapping[str, Tensor], state: Mapping[str, Any]
) -> Checkpoint:
    """Write `folder/step-N` whole or not at all and return it; a folder of that name is replaced.

    Raises UserError where the disk is full or refuses, with nothing of the new checkpoint left
    behind.
    """
    from safetensors.torch import save_file

    path = Path(folder) / f"step-{step}"
    with whole_folder(path, replace=True) as partial:
        save_file(
            {name: tensor.detach().contiguous().cpu() for name, tensor in tensors.items()},
            partial / TENSORS,
        )
        write_text(partial / STATE, json.dumps(state, indent=1, sort_keys=True) + "\n")
        files = {name: _digest(partial / name) for name in (TENSORS, STATE)}
        manifest = {"format": FORMAT, "step": step, "files": files}
        write_text(partial / MANIFEST, json.dumps(manifest, indent=1, sort_keys=True) + "\n")
    return Checkpoint(path, step)


def newest_verified(
    folder: str | Path, notice: Callable[[str], None] | None = None
) -> Checkpoint | None:
    """Return the checkpoint of the highest step that verifies, or None; tell `notice` of others."""
    if Path(folder).is_dir():
        clean_partials(folder)
    for step, path in sorted(_steps(folder).items(), reverse=True):
        fault = find_fault(path)
        if fault is None:
            return Checkpoint(path, step)
        if notice is not None:
            notice(f"skipped {path}: {fault}")
    return None


def find_fault(path: str | Path) -> str | None:
    """Return what is wrong with the checkpoint at `path`, or None where all of it verifies."""
    path = Path(path)
    try:
        manifest = json.loads((path / MANIFEST).read_text("utf-8"))
        files = manifest["files"]
        if (
            manifest["format"] != FORMAT
            or f"step-{manifest['step']}" != path.name
            or set(files) != {TENSORS, STATE}
        ):
            return f"{MANIFEST} is not one of {FORMAT} for {path.name}"
        for name in (STATE, TENSORS):
            if _digest(path / name) != files[name]:
                return f"{name} is not the file that was written (its size or digest differs)"
    except (OSError, ValueError, KeyError, TypeError) as error:
        return f"it cannot be read ({type(error).__name__}: {error})"
    return None


def prune(folder: str | Path, limit: int, keep: int | None = None) -> list[int]:
    """Remove the oldest checkpoints beyond `limit` and return their steps.

    The newest that verifies is never removed, nor that of step `keep` (the best one so far).
    """
    steps = _steps(folder)
    newest = newest_verified(folder)
    if newest is None:
        return []
    protected = {newest.step} if keep is None else {newest.step, keep}
    excess = max(0, len(steps) - limit)
    removed = [step for step in sorted(steps) if step not in protected][:excess]
    for step in removed:
        remove_folder(steps[step])
    return removed


def _steps(folder: str | Path) -> dict[int, Path]:
    found = ((re.fullmatch(r"step-(\d+)", path.name), path) for path in Path(folder).glob("step-*"))
    return {int(match[1]): path for match, path in found if match and path.is_dir()}


def _digest(path: Path) -> dict[str, Any]:
    with open(path, "rb") as file:
        return {
            "bytes": path.stat().st_size,
            "sha256": hashlib.file_digest(file, "sha256").hexdigest(),
        }
