"""Which modules of a model a configuration means; every name that means nothing is an error."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from inlay.core import patterns
from inlay.core.errors import UserError, nearest
from inlay.core.inlaid import Inlaid
from inlay.core.root import Root
from inlay.core.targeted import TargetedConfig
from inlay.model.defaults import HEADS, TARGETS, TARGETS_OF, UNREACHABLE

ALL_LINEAR = "all-linear"
LISTED = 10
"""Names an error lists before it only counts."""


@dataclasses.dataclass(frozen=True)
class Sites:
    """The module paths of one configuration: adapted, copied in full, trained in their bias alone.

    A module reachable by several paths stands under the first of them.
    """

    adapted: tuple[str, ...]
    saved: tuple[str, ...]
    biased: tuple[str, ...]


def modules(model: nn.Module, prefix: str = "") -> Iterator[tuple[str, nn.Module]]:
    """Yield (path, module) of the model as it was before any adapter: a host stands for its layer.

    A module reachable by several paths is yielded under each: replacing it must replace all.
    """
    for name, child in model._modules.items():  # named_children() leaves out a child's second name
        if child is None or isinstance(child, Root):
            continue
        path = f"{prefix}.{name}" if prefix else name
        yield path, child
        yield from modules(plain(child), path)


def plain(module: nn.Module) -> nn.Module:
    """Return the module itself, or the layer below where it is a host."""
    return module.base_layer if isinstance(module, Inlaid) else module


def resolve(model: nn.Module, config: TargetedConfig, *, strict: bool = True) -> Sites:
    """Return the sites `config` means in `model`.

    With `strict`, a name of target_modules, exclude_modules or modules_to_save that matches no
    module is a UserError naming the nearest; a configuration read from a file is not strict, since
    its tensors are checked instead. No site at all is always an error, and so are expressions that
    together take more than `patterns.BUDGET` seconds.
    """
    found = dict(modules(model))
    if config.rooted:
        return Sites(("",), _once(_saved(config, found), found), ())
    wanted = targets(model, config)
    if strict:
        _all_used(config, wanted, found)
    with patterns.budget():
        saved = _saved(config, found)
        adapted = _adapted(model, config, wanted, found, saved)
        if strict and isinstance(config.exclude_modules, str):
            _excludes_something(config.exclude_modules, found)
    raw = list(config.parameters(found))
    if not adapted and (wanted or not (saved or raw)):
        raise UserError(_nothing(wanted, config, found))
    if strict:
        with patterns.budget():
            _all_applied(config, found, [*adapted, *raw])
    for path in (*adapted, *saved):
        _reachable(found, path)
    biased = _biased(found, {*adapted, *saved}) if trains_all_biases(config) else ()
    return Sites(_once(adapted, found), _once(saved, found), _once(biased, found))


def targets(model: nn.Module, config: TargetedConfig) -> Sequence[str] | str:
    """Return target_modules, or the usual ones of the model's type where none are given."""
    found = dict(modules(model))
    wanted = config.wanted(found)
    if wanted is not None:
        return wanted
    kind = getattr(getattr(model, "config", None), "model_type", None)
    usual: Mapping[Any, list[str] | str] = TARGETS_OF.get(config.usual, TARGETS)
    if kind not in usual:
        raise UserError(
            f"no usual target_modules are known for model_type {kind!r}: name them, "
            "or say target_modules='all-linear'"
        )
    names = usual[kind]
    if isinstance(names, str):
        return names
    ends = {end for path in found for end in patterns.ends(path)}
    return [name for name in names if name in ends] or names


def trains_all_biases(config: TargetedConfig) -> bool:
    """Return whether the configuration trains the bias of every layer, adapted or not."""
    return getattr(config, "bias", "none") == "all"


def is_all_linear(wanted: Sequence[str] | str | None) -> bool:
    """Return whether target_modules is the shorthand for every linear layer."""
    return isinstance(wanted, str) and wanted.lower() == ALL_LINEAR


# -- the three kinds of site


def _adapted(
    model: nn.Module,
    config: TargetedConfig,
    wanted: Sequence[str] | str,
    found: dict[str, nn.Module],
    saved: list[str],
) -> list[str]:
    excluded = _looked_up(config.exclude_modules)
    named = _looked_up(wanted)
    inside = set(saved)
    head = _head(model)

    def wants(path: str, module: nn.Module) -> bool:
        if any(above in inside for above in _above(path)) or patterns.matches(excluded, path):
            return False
        if is_all_linear(wanted):
            layer = plain(module)
            return _is_linear(layer) and layer is not head and _in_layers(config, path)
        if not patterns.matches(named, path):
            return False
        # a whole path needs no layer number to say which module it means
        return (not isinstance(named, str) and path in (named or ())) or _in_layers(config, path)

    return [path for path, module in found.items() if wants(path, module)]


def _saved(config: TargetedConfig, found: dict[str, nn.Module]) -> list[str]:
    names = {*(config.modules_to_save or ()), *HEADS.get(config.task_type or "", ())}
    picked = {path for path in found if patterns.matches(names, path)}
    # a copy of a module holds copies of its children: only the outermost is a site
    return [p for p in found if p in picked and picked.isdisjoint(list(_above(p))[1:])]


def _biased(found: dict[str, nn.Module], taken: set[str]) -> list[str]:
    # in _parameters, for an attribute `bias` may be a switch or a mask
    return [
        path
        for path, module in found.items()
        if taken.isdisjoint(_above(path))
        and isinstance(plain(module)._parameters.get("bias"), Tensor)
    ]


def _above(path: str) -> Iterator[str]:
    """Yield the path and the paths of the modules around it: "a.b.c", "a.b", "a"."""
    while path:
        yield path
        path = path.rpartition(".")[0]


def _once(paths: Collection[str], found: dict[str, nn.Module]) -> tuple[str, ...]:
    first: dict[int, str] = {}
    for path, module in found.items():
        first.setdefault(id(plain(module)), path)
    chosen = {first[id(plain(found[path]))] for path in paths}
    return tuple(path for path in found if path in chosen)


def _looked_up(names: Sequence[str] | str | None) -> Collection[str] | str | None:
    return names if names is None or isinstance(names, str) else frozenset(names)


def _is_linear(module: nn.Module) -> bool:
    return isinstance(module, nn.Linear) or type(module).__name__ == "Conv1D"


def _head(model: nn.Module) -> nn.Module | None:
    getter: Any = getattr(model, "get_output_embeddings", None)
    head = getter() if callable(getter) else None
    return None if head is None else plain(head)


def _in_layers(config: TargetedConfig, path: str) -> bool:
    layers = config.layers_to_transform
    if layers is None or layers == []:
        return True
    index = patterns.layer(config.layers_pattern, path)
    return index in ([layers] if isinstance(layers, int) else layers)


# -- what is wrong with a configuration


def _all_used(
    config: TargetedConfig, wanted: Sequence[str] | str, found: dict[str, nn.Module]
) -> None:
    ends = {end for path in found for end in patterns.ends(path)}
    for field, names in (
        ("target_modules", wanted),
        ("modules_to_save", config.modules_to_save),
        ("exclude_modules", config.exclude_modules),
    ):
        unused = [] if isinstance(names, str) else [n for n in names or () if n not in ends]
        if unused:
            raise UserError(
                f"{field} names {_listed(unused)}, which no module of this model is called."
                f"{_hint(unused[0], found)} Its layers are {_layer_names(found)}"
            )


def _excludes_something(expression: str, found: dict[str, nn.Module]) -> None:
    if not any(patterns.fullmatch(expression, path) for path in found):
        raise UserError(
            f"exclude_modules={expression[:80]!r} matches no module of this model. "
            f"Its layers are {_layer_names(found)}"
        )


def _all_applied(config: TargetedConfig, found: dict[str, nn.Module], adapted: list[str]) -> None:
    layers = config.layers_to_transform
    if layers is not None:
        there = {patterns.layer(config.layers_pattern, path) for path in found} - {None}
        idle = [n for n in ([layers] if isinstance(layers, int) else layers) if n not in there]
        if idle:
            raise UserError(
                f"layers_to_transform names {idle[:LISTED]}; the model's layers go up to "
                f"{max((n for n in there if n is not None), default='none')}"
            )
    for field in config.by_site:
        given = list(getattr(config, field))
        unused = [given[at] for at in config.site_keys(field).unused(adapted)]
        if unused:
            raise UserError(
                f"{field} names {_listed(unused)}, which is the end of no adapted module's path."
                f"{_hint(unused[0], dict.fromkeys(adapted, nn.Module()))}"
            )


def _nothing(
    wanted: Sequence[str] | str, config: TargetedConfig, found: dict[str, nn.Module]
) -> str:
    said = repr(wanted[:80]) if isinstance(wanted, str) else f"[{_listed(wanted)}]"
    limits = {
        name: getattr(config, name)
        for name in ("exclude_modules", "layers_to_transform", "layers_pattern")
        if getattr(config, name) is not None
    }
    but = f" with {str(limits)[:200]}" if limits else ""
    hint = _hint(wanted if isinstance(wanted, str) else (list(wanted) or [""])[0], found)
    return (
        f"target_modules={said}{but} matches no module.{hint} "
        f"The model's layers are {_layer_names(found)}"
    )


def _hint(name: str, found: dict[str, nn.Module]) -> str:
    ends = {path.rpartition(".")[2] for path in found}
    return nearest(name[:200], ends) or nearest(name[:200], found)


def _listed(names: Sequence[str]) -> str:
    shown = ", ".join(repr(name[:80]) for name in names[:LISTED])
    more = len(names) - LISTED
    return shown + (f" and {more} more" if more > 0 else "")


def _layer_names(found: dict[str, nn.Module]) -> str:
    leaves = sorted({p.rpartition(".")[2] for p, m in found.items() if _is_linear(plain(m))})
    return ", ".join(leaves[:20]) or "none that are linear"


def _reachable(found: dict[str, nn.Module], path: str) -> None:
    parent, _, name = path.rpartition(".")
    owner = type(plain(found[parent])).__name__ if parent else ""
    if name in UNREACHABLE.get(owner, ()):
        raise UserError(
            f"{path!r} cannot be adapted: {owner} reads its weight without calling it, so an "
            "adapter there would do nothing; leave it out with exclude_modules"
        )
    used = found.get(f"{parent}.encoder.embed_tokens".lstrip("."))
    if name == "shared" and used is not None and plain(used) is not plain(found[path]):
        raise UserError(
            f"{path!r} cannot be adapted: it only keeps the weight that encoder and decoder call "
            "as their own embed_tokens; name 'embed_tokens' instead"
        )
