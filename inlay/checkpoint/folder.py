"""An adapter folder on disk: reading one that anybody may have written, and writing one whole.

    adapter_config.json          the settings (PEFT's)
    adapter_model.safetensors    the tensors (PEFT's)
    inlay.json                   what only inlay knows: fingerprint of the base, digests
    inlay_training.safetensors   what a method computes its file's tensors of, to train on

A folder is untrusted: sizes are limited before anything is read, nothing in it is run, and a pickle
is refused.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from inlay.checkpoint.atomic import disk_errors, whole_folder, write_bytes
from inlay.core.config import AdapterConfig, plain
from inlay.core.errors import UserError
from inlay.methods import method

CONFIG, TENSORS, OURS = "adapter_config.json", "adapter_model.safetensors", "inlay.json"
UNSAVED = "inlay_training.safetensors"
PICKLE = "adapter_model.bin"
LARGEST_JSON = 4 << 20
"""Bytes a JSON file of an adapter may have."""
DROPPED = ("runtime_config",)
"""Keys that PEFT wrote and itself ignores."""


def is_adapter(folder: str | Path) -> bool:
    """Return whether `folder` holds an adapter's settings."""
    return (Path(folder) / CONFIG).is_file()


def fetch(name: str | Path, revision: str | None = None) -> Path:
    """Return the folder of an adapter: `name` itself, or a copy of the hub's repository of that id.

    Raises UserError where it is neither.
    """
    path = Path(name).expanduser()
    if is_adapter(path):
        return path
    if path.is_dir():
        found = sorted(p.parent.name for p in path.glob(f"*/{CONFIG}"))
        hint = f"; it has the adapters {', '.join(found)} in it" if found else ""
        raise UserError(f"{path} holds no {CONFIG}, so it is no adapter{hint}")
    if path.exists():
        raise UserError(f"{path} is a file; an adapter is a folder with {CONFIG} and {TENSORS}")
    text = str(name)
    if text.count("/") != 1 or text.startswith((".", "/", "~")):
        raise UserError(f"there is no folder {text}; give an adapter's folder or its id on the hub")
    from huggingface_hub import snapshot_download

    try:
        # only the files that are read; a pickle in the repository is not even fetched
        wanted = [CONFIG, TENSORS, OURS, UNSAVED]
        return Path(snapshot_download(text, revision=revision, allow_patterns=wanted))
    except (OSError, ValueError) as error:
        raise UserError(
            f"{text} is no folder here, and the hub does not give it: {str(error).splitlines()[0]}"
        ) from error


def read_labels(folder: str | Path) -> list[str] | None:
    """Return the classes that the head of the adapter in `folder` tells apart, where it says."""
    path = Path(folder) / OURS
    told = read_json(path).get("labels") if path.is_file() else None
    if told is None:
        return None
    if not (isinstance(told, list) and told and all(isinstance(name, str) for name in told)):
        raise UserError(f"{path}: labels must be a list of names, not {str(told)[:60]}")
    return told


def read_json(path: Path) -> dict[str, Any]:
    """Return the object in a JSON file; UserError where it is missing, too large or broken."""
    try:
        if path.stat().st_size > LARGEST_JSON:
            raise UserError(
                f"{path} has {path.stat().st_size} bytes; {LARGEST_JSON} are the limit for such a "
                "file"
            )
        found = json.loads(path.read_text("utf-8"))
    except FileNotFoundError:
        raise UserError(f"{path} is missing") from None
    except json.JSONDecodeError as error:
        raise UserError(f"{path}:{error.lineno}: this is no JSON: {error.msg}") from None
    except (UnicodeDecodeError, RecursionError, ValueError, OSError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(f"{path} cannot be read: {error}") from None
    if not isinstance(found, dict):
        raise UserError(f"{path} holds a JSON {type(found).__name__}, not an object")
    return found


def read_config(folder: str | Path) -> AdapterConfig:
    """Return the settings in an adapter folder; UserError names the file and what is wrong."""
    path = Path(folder) / CONFIG
    return parse_config(read_json(path), path)


def parse_config(given: Mapping[str, Any], where: Any) -> AdapterConfig:
    """Return the settings a PEFT config dictionary says.

    Raises UserError for a value of a wrong type, and for a field that this version does not know
    unless it is unset: it may change what the adapter computes.
    """
    from pydantic import TypeAdapter, ValidationError

    if "peft_type" not in given:
        raise UserError(f"{where} has no peft_type, which says the adapter's method")
    kind = method(str(given["peft_type"])).config
    known = {field.name for field in dataclasses.fields(kind)}
    unknown = {k: v for k, v in given.items() if k not in known and k not in DROPPED and v}
    if unknown:
        shown = ", ".join(f"{k}={v!r:.60}" for k, v in sorted(unknown.items())[:8])
        raise UserError(
            f"{where} sets {shown}, which this version of inlay does not know; it may change what "
            "the "
            "adapter computes, so it is not ignored. Remove the field if it may be"
        )
    settings = {k: v for k, v in given.items() if k in known}
    try:
        # only checked: what is written again must be what was read, 8 and not 8.0
        TypeAdapter(kind).validate_json(json.dumps(plain(settings)), strict=True)
        return kind(**settings)
    except ValidationError as error:
        first = error.errors()[0]
        if isinstance(first.get("ctx", {}).get("error"), UserError):
            raise UserError(f"{where}: {first['ctx']['error']}") from None
        field = ".".join(str(part) for part in first["loc"][:1])
        value = given.get(field)
        raise UserError(f"{where}: {field}={value!r:.60} does not fit: {first['msg']}") from None


def tensor_file(folder: str | Path) -> Path:
    """Return the path of the folder's tensors; UserError where there are none, or a pickle."""
    path = Path(folder) / TENSORS
    if path.is_file():
        with open(path, "rb") as file:
            start = file.read(9)
        # a header of 896 bytes starts as a pickle does, but safetensors goes on with "{"
        pickled = start.startswith((b"PK", b"\x80\x02", b"\x80\x03", b"\x80\x04"))
        if pickled and start[8:] != b"{":
            raise UserError(_pickle(path))
        return path
    if (Path(folder) / PICKLE).exists():
        raise UserError(_pickle(Path(folder) / PICKLE))
    raise UserError(f"{path} is missing: the adapter has settings, but no tensors")


def read_shapes(path: Path) -> dict[str, tuple[int, ...]]:
    """Return the shape of each tensor from the file's header; UserError where it is not whole."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, "pt") as file:
            return {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise UserError(_broken(path, error)) from None


def read_tensors(path: Path) -> dict[str, Tensor]:
    """Return every tensor of the file; UserError lists those with NaN or infinite values."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        tensors = load_file(path)
    except (SafetensorError, OSError) as error:
        raise UserError(_broken(path, error)) from None
    bad = [
        n for n, t in sorted(tensors.items()) if t.is_floating_point() and not t.isfinite().all()
    ]
    if bad:
        raise UserError(
            f"{path} holds values that are NaN or infinite, in {', '.join(bad[:8])}"
            f"{f' and {len(bad) - 8} more' if len(bad) > 8 else ''}: the run that wrote it had "
            "diverged; "
            "take an earlier checkpoint"
        )
    return tensors


def check_digest(folder: str | Path, ours: Mapping[str, Any]) -> None:
    """Raise UserError where the tensors are not the ones that inlay.json was written with."""
    path = Path(folder) / TENSORS
    wanted = ours.get("files", {}).get(TENSORS) if isinstance(ours.get("files"), dict) else None
    if wanted is not None and digest(path.read_bytes()) != wanted:
        raise UserError(
            f"{path} is not the file that was saved with {OURS}: it was cut or changed since. Copy "
            "the folder "
            f"again; or, if it was changed on purpose, delete {OURS}"
        )


def write_folder(folder: str | Path, files: Mapping[str, bytes]) -> Path:
    """Put `files` into `folder`: a new folder whole or not at all, an existing one file by file.

    `files` in their order, so that the last one can vouch for the others. What else an existing
    folder holds stays.
    """
    folder = Path(folder)
    if not folder.is_dir() or not any(folder.iterdir()):
        with whole_folder(folder) as partial, disk_errors(folder):
            for name, content in files.items():
                (partial / name).write_bytes(content)
        return folder
    for name, content in files.items():
        write_bytes(folder / name, content)
    return folder


def digest(content: bytes) -> str:
    """Return the SHA-256 of `content` in hexadecimal."""
    return hashlib.sha256(content).hexdigest()


def _pickle(path: Path) -> str:
    return (
        f"{path} is a pickle, which runs code when it is read, so it is not opened. If you trust "
        "it, load it with "
        "PEFT and save it again with safe_serialization=True"
    )


def _broken(path: Path, error: Exception) -> str:
    return f"{path} is no whole safetensors file ({error}): it was cut short or is something else"
