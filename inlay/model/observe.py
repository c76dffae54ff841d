"""What a base's layers see of data, or would learn from it, and the starts that this gives."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from inlay import inits
from inlay.bases import view
from inlay.core import patterns
from inlay.core.base import Layer
from inlay.core.errors import UserError
from inlay.inits.corda import Covariance
from inlay.inits.eva import Components, leaders_first, share_out
from inlay.methods._starts import CordaConfig, EvaConfig, LoraGAConfig
from inlay.methods.lora import Lora, LoraConfig
from inlay.model import targets
from inlay.model.lowrank import key_of
from inlay.model.places import spelled_out
from inlay.model.roster import Roster
from inlay.model.starts import Found

MOST_PASSES = 10
"""Passes over the data after which EVA takes the directions it has."""

Layers = Mapping[str, nn.Module]
Tell = Callable[[str], Any]


def linear_layers(model: nn.Module, config: LoraConfig) -> dict[str, nn.Module]:
    """Return by path the linear layers that an adapter of `config` would be set on."""
    modules = dict(targets.modules(model))
    sites = targets.resolve(model, config).adapted
    found = {path: targets.plain(modules[path]) for path in sites}
    return {path: layer for path, layer in found.items() if view(layer).kind == "linear"}


@contextmanager
def watched(layers: Layers, see: Callable[[str, Tensor], Any]) -> Iterator[None]:
    """Let `see(path, input)` know of every call of the layers in a `with` block."""

    def hook(path: str) -> Callable[..., None]:
        return lambda _, inputs: see(path, inputs[0].detach())

    handles = [layer.register_forward_pre_hook(hook(path)) for path, layer in layers.items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


# -- EVA


@torch.no_grad()
def find_eva(
    layers: Layers,
    config: LoraConfig,
    batches: Iterable[Any],
    forward: Callable[[Any], Any],
    pick: Callable[[Any], Callable[[str, Tensor], Tensor]],
    tell: Tell,
) -> dict[str, Tensor]:
    """Return by path EVA's A [rank, I], of rank 0 where other layers have more use for it.

    batches: gone through again and again, at most MOST_PASSES times, until all directions are
    settled. forward: runs the base on one. pick: of a batch, what takes from a layer's input the
    rows [N, I] that count.
    """
    settings = config.eva_config
    assert isinstance(settings, EvaConfig)
    with patterns.budget():
        ranks = {path: config.at(path).r for path in layers}
    groups, first = _of_one_input(layers, batches, forward)
    alike = {member: leader for leader, members in groups.items() for member in members}
    most = {path: round(rank * settings.rho) for path, rank in ranks.items()}
    for leader, members in groups.items():
        most[leader] = max(most[path] for path in (leader, *members))
    found = {path: Components(most[path], settings.tau) for path in layers if path not in alike}
    of_path = {**{path: path for path in found}, **alike}
    wanted = {path: found[leader].count for path, leader in of_path.items()}
    batch, turn = first, 0
    for turn, batch in enumerate(_again(batches), start=1):
        open_ = {p: layers[p] for p, c in found.items() if not c.settled[: wanted[p]].all()}
        if turn & (turn - 1) == 0 or not open_:
            done = sum(of_path[path] not in open_ for path in layers)
            tell(f"EVA: {done} of {len(layers)} layers settled after {turn - 1} batches")
        if not open_:
            break
        with watched(open_, _into(found, pick(batch))):
            forward(batch)
        if all(part.vectors is not None for part in found.values()):
            shares = {path: found[leader].shares for path, leader in of_path.items()}
            wanted = leaders_first(share_out(shares, sum(ranks.values())), groups)
    else:
        if any(part.vectors is None for part in found.values()):
            raise UserError("EVA: the data has fewer positions than r * rho: give more rows")
        warnings.warn(
            f"EVA: not all directions settled in {MOST_PASSES} passes over the data: they are "
            "taken as they are; a lower tau in eva_config settles them sooner",
            stacklevel=2,
        )
    return {path: _first_factor(found[of_path[path]], wanted[path], settings) for path in layers}


def _into(
    found: Mapping[str, Components], take: Callable[[str, Tensor], Tensor]
) -> Callable[[str, Tensor], None]:
    return lambda path, x: found[path].add(take(path, x))


def _first_factor(found: Components, rank: int, settings: EvaConfig) -> Tensor:
    assert found.vectors is not None
    a = found.vectors[:rank]
    return a / found.values[:rank, None].sqrt() if settings.whiten else a


def _again(batches: Iterable[Any]) -> Iterator[Any]:
    for _ in range(MOST_PASSES):
        yield from batches


def _of_one_input(
    layers: Layers, batches: Iterable[Any], forward: Callable[[Any], Any]
) -> tuple[dict[str, list[str]], Any]:
    """Return leader -> the other layers that are called with the very same tensor; and a batch."""
    first = next(iter(batches), None)
    if first is None:
        raise UserError("EVA: there are no batches to look at")
    inputs: list[tuple[str, Tensor]] = []
    groups: dict[str, list[str]] = {}

    def see(path: str, x: Tensor) -> None:
        same = (lead for lead, t in inputs if t.data_ptr() == x.data_ptr() and t.shape == x.shape)
        leader = next(same, None)
        if leader is None:
            inputs.append((path, x))  # held, so that no other tensor gets its place in memory
        else:
            groups.setdefault(leader, []).append(path)

    with watched(layers, see):
        forward(first)
    unseen = layers.keys() - {path for path, _ in inputs} - {p for g in groups.values() for p in g}
    if unseen:
        raise UserError(
            f"EVA: the base does not call {sorted(unseen)[0]!r} on this data, so there are no "
            "inputs to look at: leave it out of target_modules"
        )
    return groups, first


def with_ranks(
    config: LoraConfig, found: Mapping[str, Tensor], paths: Iterable[str], model: nn.Module
) -> LoraConfig:
    """Return EVA's configuration with the ranks of what was found; layers of rank 0 get none.

    paths: all sites, of which those that EVA cannot start keep their rank.
    """
    settings = config.eva_config
    assert isinstance(settings, EvaConfig)
    ranks: dict[str, int] = {}
    alphas: dict[str, float] = {}
    with patterns.budget():
        for path in paths:
            here = config.at(path)
            ranks[path] = len(found[path]) if path in found else here.r
            grown = ranks[path] / here.r if settings.adjust_scaling_factors else 1
            alphas[path] = here.lora_alpha * grown
    left = {path: rank for path, rank in ranks.items() if rank}
    if not left:
        raise UserError("EVA: no layer has a direction to start in: give other data")
    return config.replace(
        target_modules=spelled_out(tuple(left), model),
        rank_pattern={key_of(p, left): rank for p, rank in left.items() if rank != config.r},
        alpha_pattern={key_of(p, left): alphas[p] for p in left if alphas[p] != config.lora_alpha},
    )


# -- CorDA


@torch.no_grad()
def find_covariances(
    layers: Layers,
    run: Callable[[], Any],
    *,
    half: bool = False,
    pick: Callable[[Tensor], Tensor] | None = None,
) -> dict[str, Tensor]:
    """Return by path the covariance [I, I] of the layer's inputs while `run` runs the base.

    Each call counts as one sample. pick: what takes the rows [N, I] that count from an input.
    """
    dtype = torch.float16 if half else torch.float32
    sums = {path: Covariance(dtype) for path in layers}

    def see(path: str, x: Tensor) -> None:
        sums[path].add(x.reshape(-1, x.shape[-1]) if pick is None else pick(x))

    with watched(layers, see):
        run()
    found = {}
    for path, own in sums.items():
        mean = own.mean
        if mean is None:
            raise UserError(f"CorDA: {path!r} was not called: run the base on some data")
        found[path] = mean
    return found


def of_covariances(
    layers: Layers, config: LoraConfig, covariances: Mapping[str, Tensor], tell: Tell
) -> dict[str, Found]:
    """Return by path the start of CorDA."""
    settings = config.corda_config
    assert isinstance(settings, CordaConfig)

    def more(path: str) -> dict[str, Any]:
        return {"covariance": covariances[path].float(), "method": settings.corda_method}

    return _found("corda", layers, config, more, tell)


# -- LoRA-GA


def find_gradients(model: nn.Module, layers: Layers, run: Callable[[], Any]) -> dict[str, Tensor]:
    """Return by path the gradient [O, I] of the layer's weight that `run` adds up by backward."""
    flags = {p: p.requires_grad for p in model.parameters()}
    views = {path: view(layer) for path, layer in layers.items()}
    weights = {path: layer.weight for path, layer in layers.items()}
    kept = {path: weight.grad for path, weight in weights.items()}
    try:
        for parameter in flags:
            parameter.requires_grad_(False)
        for weight in weights.values():
            weight.requires_grad_(True)
            weight.grad = None
        with torch.enable_grad():
            run()
        return {path: _gradient(path, views[path]) for path in layers}
    finally:
        for path, weight in weights.items():
            weight.grad = kept[path]
        for parameter, flag in flags.items():
            parameter.requires_grad_(flag)


@torch.no_grad()
def _gradient(path: str, layer: Layer) -> Tensor:
    """Return the gradient as a matrix [O, I], however the layer stores its weight."""
    weight = layer.module.weight
    if weight.grad is None:
        raise UserError(
            f"LoRA-GA: {path!r} got no gradient: run the base on some data, and backward"
        )
    own, weight.data = weight.data, weight.grad
    try:
        return layer.weight().detach().float().clone()
    finally:
        weight.data = own


def of_gradients(
    layers: Layers, config: LoraConfig, gradients: Mapping[str, Tensor], tell: Tell
) -> dict[str, Found]:
    """Return by path the start of LoRA-GA."""
    settings = config.lora_ga_config
    assert isinstance(settings, LoraGAConfig)

    def more(path: str) -> dict[str, Any]:
        return {
            "gradient": gradients[path],
            "direction": settings.direction,
            "length": settings.scale,
            "gamma": settings.stable_gamma,
        }

    return _found("lora_ga", layers, config, more, tell)


def _found(
    init: str,
    layers: Layers,
    config: LoraConfig,
    more: Callable[[str], dict[str, Any]],
    tell: Tell,
) -> dict[str, Found]:
    found = {}
    with patterns.budget():
        for count, (path, layer) in enumerate(layers.items(), start=1):
            here = config.at(path)
            b, a, _ = inits.start(init, view(layer).weight(), here.r, here.scaling, **more(path))
            kind = view(layer).adapter_dtype
            found[path] = Found(
                init, b.to(kind).contiguous(), a.to(kind).contiguous(), here.scaling
            )
            if count & (count - 1) == 0 or count == len(layers):
                tell(f"{init}: {count} of {len(layers)} layers have their start")
    return found


def from_tensors(
    layers: Layers, config: LoraConfig, tensors: Mapping[str, Tensor]
) -> dict[str, Found]:
    """Return by path the start whose factors are tensors called `<path>.b` and `<path>.a`."""
    missing = [path for path in layers if not {f"{path}.b", f"{path}.a"} <= tensors.keys()]
    if missing:
        raise UserError(f"the file of the start holds none for {missing[0]!r}: find it anew")
    init = str(config.init_lora_weights)
    with patterns.budget():
        return {
            path: Found(init, tensors[f"{path}.b"], tensors[f"{path}.a"], config.at(path).scaling)
            for path in layers
        }


@torch.no_grad()
def start_eva(roster: Roster, name: str, found: Mapping[str, Tensor]) -> None:
    """Set the LoRA called `name` in anew with the ranks of what EVA found, and that as its A."""
    config = roster.configs[name]
    assert isinstance(config, LoraConfig)
    paths = [path for path, _, adapter in roster.adapters(name) if isinstance(adapter, Lora)]
    unknown = found.keys() - set(paths)
    if unknown:
        raise UserError(f"EVA found a start for {sorted(unknown)[0]!r}, which {name!r} is not on")
    config = with_ranks(config, found, paths, roster.model)
    trainable = name in roster.trainable
    roster.remove(name)
    roster.add(name, config, trainable=trainable)
    for path, _, adapter in roster.adapters(name):
        if path in found and isinstance(adapter, Lora):
            adapter.lora_A.copy_(found[path])
