"""An adapter of a model <-> its folder in PEFT's format; all of it fits or nothing is loaded."""

from __future__ import annotations

import contextlib
import json
import warnings
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from inlay.checkpoint import folder as files
from inlay.checkpoint.fingerprint import check_same_base, fingerprint
from inlay.checkpoint.names import PREFIX, ROOT, carried, compare, complete, embeddings, slots
from inlay.checkpoint.resume import resume, unsaved
from inlay.core.config import AdapterConfig
from inlay.core.errors import UserError
from inlay.core.targeted import TargetedConfig
from inlay.model.convert import as_plain
from inlay.model.roster import Roster
from inlay.model.starts import is_attached, is_drawn

FORMAT = "inlay-adapter-1"
PEFT_VERSION = "0.21.2"
"""The PEFT whose format the files have."""


def adapter_tensors(roster: Roster, name: str) -> dict[str, Tensor]:
    """Return the tensors of an adapter's file by PEFT's keys; they share memory with the model."""
    roster.check(name)
    found = {key: slot.get() for key, slot in slots(roster, name).items()}
    found |= {key: weight.detach() for key, weight in carried(roster, name).items()}
    return dict(sorted(found.items()))


def save_adapter(
    roster: Roster,
    name: str,
    folder: str | Path,
    *,
    base: Mapping[str, Any] | None = None,
    extra: Mapping[str, bytes] | None = None,
    as_plain_lora: bool = False,
) -> Path:
    """Write adapter `name` to `folder` and return it: a new folder appears whole or not at all.

    base: the fingerprint to save (default: that of the model now). extra: more files by name (a
    tokenizer's). as_plain_lora: write a LoRA as one that has no start of its own, of twice the rank
    where that was taken off the base; so is what no reader of the other form could find again.
    """
    from safetensors.torch import save

    roster.check(name)
    if as_plain_lora or is_drawn(roster.configs[name]):
        with as_plain(roster, name) as plain:
            return save_adapter(roster, plain, folder, base=base, extra=extra)
    config = roster.configs[name]
    if not any(True for _ in roster.adapters(name)):
        raise UserError(
            f"{name!r} trains the base itself and holds no adapter to save: save the whole model "
            "instead"
        )
    tensors = save(
        {key: t.contiguous().cpu().clone() for key, t in adapter_tensors(roster, name).items()},
        metadata={"format": "pt"},
    )
    settings = json.dumps(saved_config(roster.model, config), indent=2, sort_keys=True)
    ours = {
        "format": FORMAT,
        "inlay_version": _version(),
        "base": dict(base) if base is not None else fingerprint(roster.model),
        "files": {files.TENSORS: files.digest(tensors)},
        **_labels(roster.model, config),
    }
    content = dict(extra or {})
    if not (Path(folder) / "README.md").exists():
        content.setdefault("README.md", _card(config, roster.model).encode())
    content |= unsaved(roster, name)
    content[files.TENSORS] = tensors
    content[files.CONFIG] = settings.encode()
    # last, for it vouches for the others
    content[files.OURS] = (json.dumps(ours, indent=1, sort_keys=True) + "\n").encode()
    return files.write_folder(folder, content)


def saved_config(model: nn.Module, config: AdapterConfig) -> dict[str, Any]:
    """Return what `adapter_config.json` holds: PEFT's fields, and no others."""
    told = config.to_dict()
    told["inference_mode"] = True
    told["peft_version"] = PEFT_VERSION
    if told["base_model_name_or_path"] is None:
        told["base_model_name_or_path"] = getattr(model, "name_or_path", None) or None
    if told["task_type"] is None:
        told["auto_mapping"] = {
            "base_model_class": type(model).__name__,
            "parent_library": type(model).__module__,
        }
    return told


def load_adapter(
    roster: Roster,
    name: str,
    folder: str | Path,
    *,
    config: AdapterConfig | None = None,
    trainable: bool = False,
    check_base: bool = True,
) -> AdapterConfig:
    """Load the adapter in `folder` into the model as `name` and return its settings.

    config: settings in place of the folder's. On any error the model stays as it was: UserError for
    settings or tensors that cannot be read, do not fit, hold NaN, or (with `check_base`) belong to
    another base.
    """
    folder = Path(folder)
    settings = config or files.read_config(folder)
    if not isinstance(settings, TargetedConfig):
        raise UserError(f"{folder}: {settings.peft_type} holds nothing that could be loaded")
    if is_drawn(settings) and not is_attached(roster.model, settings):
        raise UserError(
            f"{folder} has init_lora_weights={getattr(settings, 'init_lora_weights', None)!r}: it "
            "was trained on what a random search, or data, left of the base, which is not in the "
            "file. Where it was trained, save it with path_initial_model_for_weight_conversion "
            "(PEFT), or here with as_plain_lora"
        )
    path = files.tensor_file(folder)
    shapes = files.read_shapes(path)
    check_origin(roster, folder, settings, base=check_base)
    with with_parts(roster, name, settings, beside=folder, train=trainable, check_base=check_base):
        return add_with_tensors(roster, name, settings, shapes, path, trainable=trainable)


@contextlib.contextmanager
def with_parts(
    roster: Roster,
    name: str,
    config: TargetedConfig,
    *,
    beside: Path | None = None,
    train: bool = True,
    check_base: bool = True,
) -> Iterator[None]:
    """Load the adapters that `config` is made of, for a block that adds it as `name`.

    Those that the model has are taken; others are read from the folder `beside`, where they were
    saved with it, or from where the configuration says. On any error they are taken out again.
    """
    if not config.parts:
        yield
        return
    before = roster.names
    try:
        for part, place in config.parts.items():
            if part not in before:
                # only what inlay saved: PEFT mixes the parts up in the files it puts there
                near = beside is not None and (beside / part / files.OURS).is_file()
                found = beside / part if beside is not None and near else files.fetch(place)
                trained = train and config.trains_parts
                load_adapter(roster, part, found, trainable=trained, check_base=check_base)
        yield
    except BaseException:
        for added in reversed(roster.names[len(before) :]):
            roster.remove(added)
        if not before:
            roster.take_out(merged=False)
        raise
    if not before:  # as an adapter without parts would be
        roster.select((name,))


def check_origin(
    roster: Roster, folder: Path, settings: TargetedConfig, *, base: bool = True
) -> None:
    """Raise UserError where `folder` was changed since it was saved, or is of another base."""
    if not (folder / files.OURS).is_file():
        return
    ours = files.read_json(folder / files.OURS)
    files.check_digest(folder, ours)
    if base and "base" in ours:
        replaced = settings.modules_to_save or ()
        check_same_base(roster.model, ours["base"], folder / files.OURS, replaced=replaced)


def add_with_tensors(
    roster: Roster,
    name: str,
    settings: TargetedConfig,
    shapes: Mapping[str, tuple[int, ...]],
    path: Path,
    *,
    trainable: bool,
) -> AdapterConfig:
    """Set adapter `name` into the model, filled from `path`; on any error nothing is set in."""
    first = not roster.names
    try:
        # without memory until the shapes are known to fit: a file may claim any rank
        roster.add(name, settings, strict=False, device=torch.device("meta"), trainable=trainable)
    except (RuntimeError, OverflowError, MemoryError, TypeError) as error:
        reason = str(error).partition("\n")[0]
        raise UserError(f"{path.parent}: no layer can hold such an adapter: {reason}") from None
    try:
        wanted = slots(roster, name)
        base = base_tensors(roster, shapes.keys() - wanted.keys(), shapes)
        compare({k: s for k, s in shapes.items() if k not in base}, wanted, path)
        tensors = files.read_tensors(path)
        changed = changed_embeddings(base, tensors, path, alone=first)
        for key, slot in wanted.items():
            slot.put(tensors[key])
        complete(roster, name)
        if trainable:
            resume(roster, name, path.parent)
    except BaseException:
        if first:
            roster.take_out(merged=False)
        else:
            roster.remove(name)
        raise
    for weight, tensor in changed:
        weight.data.copy_(tensor)
    return roster.configs[name]


def set_tensors(roster: Roster, name: str, tensors: Mapping[str, Tensor]) -> None:
    """Fill adapter `name` from tensors by PEFT's keys, with or without `base_model.model.`.

    Strict: one UserError lists every missing, unexpected and misshaped tensor, with nothing copied.
    """
    roster.check(name)
    wanted = slots(roster, name)
    full = {k if k in wanted or k.startswith(ROOT) else PREFIX + k: t for k, t in tensors.items()}
    shapes = {key: tuple(t.shape) for key, t in full.items()}
    base = base_tensors(roster, shapes.keys() - wanted.keys(), shapes)
    compare({k: s for k, s in shapes.items() if k not in base}, wanted, "the state dict")
    changed = changed_embeddings(base, full, "the state dict", alone=len(roster.names) == 1)
    with torch.no_grad():
        for key, slot in wanted.items():
            slot.put(full[key])
        complete(roster, name)
        for weight, tensor in changed:
            weight.data.copy_(tensor)


def base_tensors(
    roster: Roster, keys: Iterable[str], shapes: Mapping[str, tuple[int, ...]]
) -> dict[str, nn.Parameter]:
    """Return by key the embeddings' own weights, which PEFT writes beside an adapter."""
    found = {}
    for path, weight in embeddings(roster.model).items():
        for key in (f"{PREFIX}{path}.base_layer.weight", f"{PREFIX}{path}.weight"):
            if key not in keys:
                continue
            found[key] = weight
            if shapes[key] != tuple(weight.shape):
                raise UserError(
                    f"the adapter was trained with {shapes[key][0]} tokens in {path!r}, this model "
                    f"has {weight.shape[0]}: call resize_token_embeddings({shapes[key][0]}) first"
                )
    return found


def changed_embeddings(
    base: Mapping[str, nn.Parameter], tensors: Mapping[str, Tensor], where: Any, *, alone: bool
) -> list[tuple[nn.Parameter, Tensor]]:
    """Return the embeddings' weights that are another in the file, each with the file's."""
    changed = []
    for key, own in base.items():
        if torch.equal(tensors[key].to(own.device, own.dtype), own.detach()):
            continue
        if not alone:
            raise UserError(
                f"{where} carries an embedding ({key}) other than the model's, which other "
                "adapters use already; load this adapter into a base of its own"
            )
        warnings.warn(f"{where}: {key} replaces the base's own embedding", stacklevel=4)
        changed.append((own, tensors[key]))
    return changed


def describe(folder: str | Path) -> dict[str, Any]:
    """Return what an adapter folder says of itself, without reading its tensors.

    Its keys: method, config, tensors and parameters (counts), base_model, base (the fingerprint),
    inlay_version, peft_version.
    """
    folder = Path(folder)
    config = files.read_config(folder)
    shapes = files.read_shapes(files.tensor_file(folder))
    ours = files.read_json(folder / files.OURS) if (folder / files.OURS).is_file() else {}
    return {
        "method": str(config.method).lower(),
        "config": config.to_dict(),
        "tensors": len(shapes),
        "parameters": sum(torch.Size(shape).numel() for shape in shapes.values()),
        "base_model": config.base_model_name_or_path,
        "base": ours.get("base"),
        "inlay_version": ours.get("inlay_version"),
        "peft_version": config.peft_version,
    }


def _labels(model: nn.Module, config: AdapterConfig) -> dict[str, list[str]]:
    """Return {"labels": the classes in the order of the head's outputs}, of a classifier alone."""
    told: Any = getattr(getattr(model, "config", None), "id2label", None)
    if config.task_type != "SEQ_CLS" or not told:
        return {}
    return {"labels": [str(told[i]) for i in sorted(told)]}


def _card(config: AdapterConfig, model: nn.Module) -> str:
    base = config.base_model_name_or_path or getattr(model, "name_or_path", None)
    head = f"base_model: {json.dumps(base)}\n" if base else ""
    return (
        f"---\n{head}library_name: peft\ntags: [{config.method.lower()}, inlay]\n---\n\n"
        f"A {config.method} adapter{f' of {base}' if base else ''}, written by inlay {_version()} "
        "in PEFT's format.\n"
    )


def _version() -> str:
    from inlay import __version__

    return __version__
