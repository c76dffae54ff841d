"""PEFT's makers of optimizers: LoRA+, LoRA-FA, Riemannian, for training loops of one's own."""

from __future__ import annotations

import math
from functools import partial
from typing import Any

import torch
from torch import nn

from inlay.core.errors import UserError
from inlay.core.numbers import check_finite
from inlay.train.factors import (
    DAMPING,
    EMBEDDING_RATE,
    before_each_step,
    factors_of,
    rates,
    turn_to_full,
    turn_to_product,
)
from inlay.train.optim import is_matrix


def create_loraplus_optimizer(
    model: nn.Module,
    optimizer_cls: type[torch.optim.Optimizer],
    *,
    lr: float,
    loraplus_lr_ratio: float,
    loraplus_weight_decay: float = 0.0,
    loraplus_lr_embedding: float = EMBEDDING_RATE,
    **kwargs: Any,
) -> torch.optim.Optimizer:
    """Return an `optimizer_cls` over what trains in `model`, each B at loraplus_lr_ratio times lr.

    Adapters on embeddings get loraplus_lr_embedding; weight decay goes to matrices alone. kwargs
    are the optimizer's own. In a recipe it is `train.loraplus_lr_ratio`.
    """
    for name, value in (("lr", lr), ("loraplus_lr_ratio", loraplus_lr_ratio)):
        check_finite(name, value)
        if value <= 0:
            raise UserError(f"{name}={value!r} must be above 0")
    found = {name: p for name, p in model.named_parameters() if p.requires_grad}
    multiples = rates(model, found, lr, loraplus_lr_ratio, loraplus_lr_embedding)
    groups: dict[tuple[float, float], list[nn.Parameter]] = {}
    for name, parameter in found.items():
        decay = loraplus_weight_decay if is_matrix(parameter) else 0.0
        groups.setdefault((lr * multiples[name], decay), []).append(parameter)
    listed = [
        {"params": parameters, "lr": rate, "weight_decay": decay}
        for (rate, decay), parameters in groups.items()
    ]
    return optimizer_cls(listed, lr=lr, **kwargs)  # type: ignore[call-arg]


def create_lorafa_optimizer(
    model: nn.Module,
    r: int | None = None,
    lora_alpha: int | None = None,
    lr: float = 1e-3,
    weight_decay: float = 0.0,
    use_rslora: bool | None = None,
) -> torch.optim.AdamW:
    """Return AdamW of which each LoRA's B alone is stepped; A is frozen from now on.

    r, lora_alpha, use_rslora: taken as PEFT takes them; the scale of each layer is its own. In a
    recipe it is `train.optimizer: lorafa`.
    """
    del use_rslora
    for given in (r, lora_alpha):
        if given is not None and not math.isfinite(given):
            raise UserError(f"r={r!r} and lora_alpha={lora_alpha!r} must be numbers, or left out")
    factors = factors_of(model)
    for a, _ in factors.values():
        a.requires_grad_(False)
    trained = [p for p in model.parameters() if p.requires_grad]
    groups = [
        {
            "params": [p for p in trained if is_matrix(p) == decays],
            "weight_decay": weight_decay if decays else 0.0,
        }
        for decays in (True, False)
    ]
    optimizer = torch.optim.AdamW([g for g in groups if g["params"]], lr=lr, eps=1e-6)
    before_each_step(optimizer, partial(turn_to_full, factors))
    return optimizer


def create_riemannian_optimizer(
    model: nn.Module,
    optimizer_cls: type[torch.optim.Optimizer],
    *,
    lr: float,
    reg: float = DAMPING,
    **kwargs: Any,
) -> torch.optim.Optimizer:
    """Return an `optimizer_cls` over what trains, which steps along the gradients of each B A.

    reg: damps them where a factor is short. kwargs are the optimizer's own. In a recipe it is
    `train.optimizer: riemannian`.
    """
    check_finite("reg", reg)
    if reg <= 0:
        raise UserError(f"reg={reg!r} must be above 0: B starts at zero")
    factors = factors_of(model)
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = optimizer_cls(trained, lr=lr, **kwargs)  # type: ignore[call-arg]
    before_each_step(optimizer, partial(turn_to_product, factors, reg))
    return optimizer
