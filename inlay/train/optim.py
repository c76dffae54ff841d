"""AdamW (Loshchilov and Hutter, arXiv:1711.05101), with decay only where 0 is a sane prior.

Decay goes to matrices: parameters with at least two dimensions larger than 1, LoRA's A and B among
them, for pulling a factor to 0 pulls the model to its base. It never goes to biases, norms,
magnitudes or (IA)^3 scales, whatever their shape on paper ([O], [1, I], [O, 1]): their resting
value is not 0. State is saved by the parameters' names, not by their order, so that it cannot land
on another parameter.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from inlay.train.settings import TrainConfig


def make_optimizer(
    parameters: Mapping[str, nn.Parameter], config: TrainConfig
) -> torch.optim.AdamW:
    """Return AdamW over `parameters`, those with decay as its first group."""
    decayed = [p for p in parameters.values() if is_matrix(p)]
    others = [p for p in parameters.values() if not is_matrix(p)]
    groups = [
        {"params": decayed, "weight_decay": config.weight_decay},
        {"params": others, "weight_decay": 0.0},
    ]
    # one fused kernel walks all state once: elementwise, so the same bits every run, on CPU and
    # CUDA alike
    fused = all(
        p.device.type in ("cpu", "cuda") and p.is_floating_point() for p in parameters.values()
    )
    return torch.optim.AdamW(
        [group for group in groups if group["params"]],
        lr=config.learning_rate,
        betas=(config.adam_beta1, config.adam_beta2),
        eps=config.adam_epsilon,
        fused=fused,
    )


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
