"""Which modules of a model a configuration means; every name that means nothing is an error."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence

import regex
from torch import nn

from inlay.core import patterns
from inlay.core.errors import UserError, nearest
from inlay.core.inlaid import Inlaid
from inlay.core.targeted import TargetedConfig
from inlay.model.defaults import HEADS, TARGETS, UNREACHABLE

ALL_LINEAR = "all-linear"


@dataclasses.dataclass(frozen=True)
class Sites:
    """The module paths of one configuration: adapted, copied in full, and trained in their bias alone."""

    adapted: tuple[str, ...]
    saved: tuple[str, ...]
    biased: tuple[str, ...]


def modules(model: nn.Module, prefix: str = "") -> Iterator[tuple[str, nn.Module]]:
    """Yield (path, module) of the model as it was before any adapter: a host stands for the layer it hosts.

    A module reachable by several paths is yielded under each: replacing it must replace all.
    """
    for name, child in model.named_children():
        path = f"{prefix}.{name}" if prefix else name
        yield path, child
        yield from modules(child.base_layer if isinstance(child, Inlaid) else child, path)


def plain(module: nn.Module) -> nn.Module:
    """Return the module itself, or the layer below where it is a host."""
    return module.base_layer if isinstance(module, Inlaid) else module


def resolve(model: nn.Module, config: TargetedConfig, *, strict: bool = True) -> Sites:
    """Return the sites `config` means in `model`.

    With `strict`, a name of target_modules or modules_to_save that matches no module is a UserError naming the nearest
    ones; a configuration read from a file is not strict, since its tensors are checked instead. No site at all is
    always an error.
    """
    found = dict(modules(model))
    saved = _saved(found, config, strict=strict)
    wanted = targets(model, config)
    adapted = []
    for path, module in found.items():
        inside_saved = any(path == s or path.startswith(f"{s}.") for s in saved)
        if inside_saved or not _wants(model, wanted, config, path, module):
            continue
        adapted.append(path)
    if strict and not isinstance(wanted, str):
        _all_used("target_modules", wanted, found)
    if not adapted and (wanted or not saved):
        raise UserError(_nothing(wanted, config, found))
    for path in adapted:
        _reachable(found, path)
    biased: tuple[str, ...] = ()
    if getattr(config, "bias", "none") == "all":
        skip = {*adapted, *saved}
        biased = tuple(
            p
            for p, m in found.items()
            if p not in skip and getattr(plain(m), "bias", None) is not None
        )
    return Sites(tuple(adapted), tuple(saved), biased)


def targets(model: nn.Module, config: TargetedConfig) -> Sequence[str] | str:
    """Return target_modules, or the usual ones of the model's type where none are given."""
    if config.target_modules is not None:
        return config.target_modules
    kind = getattr(getattr(model, "config", None), "model_type", None)
    if kind not in TARGETS:
        raise UserError(
            f"no usual target_modules are known for model_type {kind!r}: name them, or say target_modules='all-linear'"
        )
    return TARGETS[kind]


def _wants(
    model: nn.Module,
    wanted: Sequence[str] | str,
    config: TargetedConfig,
    path: str,
    module: nn.Module,
) -> bool:
    if patterns.matches(config.exclude_modules, path):
        return False
    if isinstance(wanted, str) and wanted.lower() == ALL_LINEAR:
        return (
            _is_linear(plain(module))
            and not _is_head(model, config, path, module)
            and _in_layers(config, path)
        )
    return patterns.matches(wanted, path) and _in_layers(config, path)


def _is_linear(module: nn.Module) -> bool:
    return isinstance(module, nn.Linear) or type(module).__name__ == "Conv1D"


def _is_head(model: nn.Module, config: TargetedConfig, path: str, module: nn.Module) -> bool:
    head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    if head is not None and plain(head) is plain(module):
        return True
    return config.task_type in HEADS and path in HEADS[config.task_type]


def _in_layers(config: TargetedConfig, path: str) -> bool:
    layers = config.layers_to_transform
    if layers is None or layers == []:
        return True
    named = config.layers_pattern or [r"[^.]*"]
    for name in [named] if isinstance(named, str) else named:
        # the first numbered segment is the layer: a later one may number experts
        found = regex.match(rf"(?:.*?\.)??{name}\.(\d+)\.", path, timeout=patterns.SECONDS)
        if found:
            index = int(found.group(1))
            return index == layers if isinstance(layers, int) else index in layers
    return False


def _saved(found: dict[str, nn.Module], config: TargetedConfig, *, strict: bool) -> list[str]:
    if config.modules_to_save and strict:
        _all_used("modules_to_save", config.modules_to_save, found)
    names = [*(config.modules_to_save or ()), *HEADS.get(config.task_type or "", ())]
    picked = [path for path in found if patterns.matches(names, path)]
    # a copy of a module holds copies of its children: only the outermost is a site
    return [p for p in picked if not any(p.startswith(f"{q}.") for q in picked)]


def _all_used(field: str, names: Sequence[str], found: dict[str, nn.Module]) -> None:
    unused = [n for n in names if not any(patterns.names(n, path) for path in found)]
    if unused:
        ends = {path.rsplit(".", 1)[-1] for path in found} | set(found)
        hints = "".join(nearest(name, ends) for name in unused[:1])
        raise UserError(
            f"{field} names {', '.join(map(repr, unused))}, which no module of this model is called.{hints} "
            f"Its layers are {_layer_names(found)}"
        )


def _nothing(
    wanted: Sequence[str] | str, config: TargetedConfig, found: dict[str, nn.Module]
) -> str:
    ends = {path.rsplit(".", 1)[-1] for path in found}
    hint = nearest(wanted if isinstance(wanted, str) else (wanted or [""])[0], ends)
    limits = {
        name: getattr(config, name)
        for name in ("exclude_modules", "layers_to_transform", "layers_pattern")
        if getattr(config, name) is not None
    }
    return (
        f"target_modules={wanted!r}{f' with {limits}' if limits else ''} matches no module.{hint} "
        f"The model's layers are {_layer_names(found)}"
    )


def _layer_names(found: dict[str, nn.Module]) -> str:
    leaves = sorted({p.rsplit(".", 1)[-1] for p, m in found.items() if _is_linear(plain(m))})
    return ", ".join(leaves[:20]) or "none that are linear"


def _reachable(found: dict[str, nn.Module], path: str) -> None:
    parent, _, name = path.rpartition(".")
    owner = type(found[parent]).__name__ if parent else ""
    if name in UNREACHABLE.get(owner, ()):
        raise UserError(
            f"{path!r} cannot be adapted: {owner} reads its weight without calling it, so an adapter there would do "
            "nothing; leave it out with exclude_modules"
        )
