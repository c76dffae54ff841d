"""What a base's layers see of data, or would learn from it, and the starts that this gives."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
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
from inlay.methods._starts import CordaConfig, LoraGAConfig
from inlay.methods.lora import LoraConfig
from inlay.model import targets
from inlay.model.starts import Found

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
