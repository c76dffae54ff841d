"""AdamW (Loshchilov and Hutter, arXiv:1711.05101), with decay only where 0 is a sane prior.

Decay goes to matrices: parameters with at least two dimensions larger than 1, LoRA's A and B among
them, for pulling a factor to 0 pulls the model to its base. It never goes to biases, norms,
magnitudes or (IA)^3 scales, whatever their shape on paper ([O], [1, I], [O, 1]): their resting
value is not 0. State is saved by the parameters' names, not by their order, so that it cannot land
on another parameter.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from inlay.train.adam8bit import AdamW8bit
from inlay.train.factors import (
    DAMPING,
    before_each_step,
    factors_of,
    rates,
    turn_to_full,
    turn_to_product,
)
from inlay.train.paged import PagedAdamW
from inlay.train.settings import PAGED, TrainConfig


def make_optimizer(
    parameters: Mapping[str, nn.Parameter], config: TrainConfig, model: nn.Module | None = None
) -> torch.optim.Optimizer:
    """Return AdamW over `parameters`, those with decay first; or what `config` makes of it.

    A group's "ratio" is its multiple of the step's learning rate. model: where the adapters are,
    for what is done to their factors apart (`inlay.train.factors`).
    """
    multiples = dict.fromkeys(parameters, 1.0)
    if config.loraplus_lr_ratio is not None and model is not None:
        lr, embed = config.learning_rate, config.loraplus_lr_embedding
        multiples = rates(model, parameters, lr, config.loraplus_lr_ratio, embed)
    groups = [
        {
            "params": [p for n, p in parameters.items() if multiples[n] == m and is_matrix(p) == d],
            "weight_decay": config.weight_decay if d else 0.0,
            "lr": config.learning_rate * m,
            "ratio": m,
        }
        for m in dict.fromkeys(multiples.values())
        for d in (True, False)
    ]
    # one fused kernel walks all state once: elementwise, so the same bits every run, on CPU and
    # CUDA alike
    fused = all(
        p.device.type in ("cpu", "cuda") and p.is_floating_point() for p in parameters.values()
    )
    filled = [group for group in groups if group["params"]]
    settings: dict[str, Any] = {
        "lr": config.learning_rate,
        "betas": (config.adam_beta1, config.adam_beta2),
        "eps": config.adam_epsilon,
    }
    if config.optimizer == "adamw_8bit":
        return AdamW8bit(filled, **settings)
    if config.optimizer.startswith(PAGED):
        eight_bit = config.optimizer.removeprefix(PAGED) == "adamw_8bit"
        return PagedAdamW(filled, **settings, eight_bit=eight_bit)
    optimizer = torch.optim.AdamW(filled, **settings, fused=fused)
    if config.optimizer != "adamw" and model is not None:
        factors = factors_of(model)
        turn = partial(turn_to_full, factors)
        if config.optimizer == "riemannian":
            turn = partial(turn_to_product, factors, DAMPING)
        before_each_step(optimizer, turn)
    return optimizer


def is_matrix(parameter: Tensor) -> bool:
    """Return whether weight decay belongs on `parameter`."""
    return sum(size > 1 for size in parameter.shape) >= 2


def optimizer_tensors(
    optimizer: torch.optim.Optimizer, parameters: Mapping[str, nn.Parameter]
) -> dict[str, Tensor]:
    """Return the optimizer's state as {"exp_avg.NAME": ..., "step.NAME": ...}."""
    return {
        f"{kind}.{name}": value
        for name, parameter in parameters.items()
        for kind, value in optimizer.state.get(parameter, {}).items()
    }


def load_optimizer_tensors(
    optimizer: torch.optim.Optimizer,
    parameters: Mapping[str, nn.Parameter],
    tensors: Mapping[str, Tensor],
) -> None:
    """Put back what `optimizer_tensors` returned; copies, so that `tensors` may go."""
    names = {parameter: name for name, parameter in parameters.items()}
    order = [names[parameter] for group in optimizer.param_groups for parameter in group["params"]]
    index = {name: i for i, name in enumerate(order)}
    state: dict[int, dict[str, Tensor]] = {}
    for key, value in tensors.items():
        kind, name = key.split(".", 1)
        state.setdefault(index[name], {})[kind] = value.clone()
    optimizer.load_state_dict(
        {"state": state, "param_groups": optimizer.state_dict()["param_groups"]}
    )
