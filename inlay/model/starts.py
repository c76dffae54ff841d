"""Starts that are computed, from the base or from data, set into a LoRA."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from inlay import inits
from inlay.core.adapter import Adapter
from inlay.core.base import Base
from inlay.core.config import AdapterConfig
from inlay.core.errors import UserError
from inlay.core.inlaid import Inlaid
from inlay.inits import loftq
from inlay.methods._loftq import LoftQ
from inlay.methods._starts import LoftQConfig
from inlay.methods.lora import Lora, LoraConfig
from inlay.model.unpacked import Weights

FOUND = "_inlay_start"
MAKERS = {"corda": "preprocess_corda", "lora_ga": "preprocess_loraga"}
"""Start -> what finds it from data, before the adapter is set in."""


@dataclasses.dataclass(frozen=True)
class Found:
    """The start that data gave for one layer, called `init`: B [O, R] and A [R, I] at `scale`."""

    init: str
    b: Tensor
    a: Tensor
    scale: float


@torch.no_grad()
def begin(adapter: Adapter, base: Base, model: nn.Module, *, fill: bool) -> None:
    """Give a LoRA the start that its configuration names, where that is one of `inlay.inits`.

    fill: set its factors; without, only what the start takes off the base, for a file that has the
    factors. The base itself stays: the adapter subtracts its start, so that the other adapters, and
    the model with none, still see the whole weight. model: whose base is at `base.path`.
    """
    lora = adapter.lora if isinstance(adapter, LoftQ) else adapter
    if not isinstance(lora, Lora) or not isinstance(init := lora.config.start, str):
        return
    if init == "eva" or (base.kind == "embedding" and init != "mica"):
        return  # as in PEFT: the plain start; EVA's then needs data
    if base.kind not in ("linear", "embedding"):
        raise UserError(
            f"init_lora_weights={init!r} starts from a matrix, and a {base.kind} takes the plain "
            "start: leave it out of target_modules, or use true"
        )
    if init == "mica" and not fill:
        return
    config = lora.config
    if isinstance(adapter, LoftQ) and base.bits and not fill:
        return
    if isinstance(adapter, LoftQ):
        b, a = _make_up(config, base, model) if base.bits else _quantize(adapter, base)
        from_the_base = False
    elif init in MAKERS:
        b, a = _of_data(init, base.module, config)
        from_the_base = True
    else:
        b, a, from_the_base = inits.start(init, base.weight(), config.r, config.scaling)
    if fill:
        lora.lora_B.copy_(b)
        lora.lora_A.copy_(a)
    if from_the_base:
        kind = lora.lora_A.dtype
        lora.start_B = b.to(base.device, kind).contiguous()
        lora.start_A = a.to(base.device, kind).contiguous()


def _quantize(adapter: LoftQ, base: Base) -> tuple[Tensor, Tensor]:
    """Keep in the adapter what quantizing takes from the weight; return the factors for it."""
    config, weight = adapter.config, base.weight().float()
    if config.r > min(weight.shape):
        raise UserError(f"a LoftQ start of rank {config.r} on a weight {list(weight.shape)}")
    settings = LoftQConfig(**config.loftq_config)  # type: ignore[arg-type]
    bits, turns = settings.loftq_bits, settings.loftq_iter
    q, b, a = loftq.quantized(weight, config.r, config.scaling, bits=bits, turns=turns)
    adapter.lost = (q - weight).to(adapter.lora.lora_A.dtype)
    return b, a


def _make_up(config: LoraConfig, base: Base, model: nn.Module) -> tuple[Tensor, Tensor]:
    """Return factors for what packing took from the weight, which the base's files still have."""
    settings = LoftQConfig(**config.loftq_config)  # type: ignore[arg-type]
    if settings.loftq_iter != 1 or settings.loftq_bits != base.bits:
        raise UserError(
            f"loftq_config: the base is packed already, in {base.bits} bits and once: take "
            f"loftq_bits={base.bits} and loftq_iter=1, or a base that is not packed"
        )
    now = base.weight().float()
    try:
        whole = Weights(None, model).read(f"{base.path}.weight", now)
    except UserError as error:
        raise UserError(
            f"init_lora_weights='loftq' makes up for what packing lost, and {error}. Load the base "
            "from its 16-bit folder with quantize, or take init_lora_weights=True and call "
            "replace_lora_weights_loftq(model, folder) with that folder"
        ) from error
    return loftq.making_up(whole - now, config.r, config.scaling)


def _of_data(init: str, module: nn.Module, config: LoraConfig) -> tuple[Tensor, Tensor]:
    found = module.__dict__.get(FOUND)
    if not isinstance(found, Found) or found.init != init:
        raise UserError(
            f"init_lora_weights={init!r} starts from data: call {MAKERS[init]}(model, config, ...) "
            "before the adapter is set in"
        )
    if (len(found.a), found.scale) != (config.r, config.scaling):
        raise UserError(
            f"{MAKERS[init]} was called for rank {len(found.a)} at scale {found.scale:g}, and the "
            f"adapter has rank {config.r} at scale {config.scaling:g}: give both the same settings"
        )
    return found.b, found.a


def attach(layers: Mapping[str, nn.Module], found: Mapping[str, Found]) -> None:
    """Keep with each layer the start that was found for it, until one is found anew."""
    for path, layer in layers.items():
        if path in found:
            layer.__dict__[FOUND] = found[path]


def is_drawn(config: AdapterConfig) -> bool:
    """Return whether a part of an adapter's start is in no file and cannot be found by a reader.

    It was drawn at random, or found from data.
    """
    start = getattr(config, "start", None)
    return "_niter_" in str(start) or start in MAKERS


def is_attached(model: nn.Module, config: AdapterConfig) -> bool:
    """Return whether the model's layers keep the start that the configuration names."""
    modules = (m.base_layer if isinstance(m, Inlaid) else m for m in model.modules())
    kept = (module.__dict__.get(FOUND) for module in modules)
    return any(f is not None and f.init == getattr(config, "start", None) for f in kept)
