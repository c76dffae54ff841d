"""AdamW with its moments in 8 bits (Dettmers, arXiv:2110.02861): `inlay.kernels.adam8bit`.

    m = b1 m + (1 - b1) g        v = b2 v + (1 - b2) g^2
    w = (1 - lr decay) w - lr (m / (1 - b1^t)) / (sqrt(v / (1 - b2^t)) + eps)

Between steps a moment is codes and a magnitude for each 256 of them, and no moment is ever whole in
float32. Parameters of under 4096 values keep float32 moments.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from inlay.kernels.adam8bit import BLOCK, Piece, Rule, move, step

LEAST = 4096
"""Values of the smallest parameter whose moments are in 8 bits, as in bitsandbytes."""
SETTINGS = ("lr", "betas", "eps", "weight_decay")
"""What a group of parameters has of its own."""


class Part(NamedTuple):
    """Values of a parameter, their gradient and moments, and the number of the step, from 1."""

    weights: Tensor
    grads: Tensor
    state: dict[str, Tensor]
    group: dict[str, Any]
    step: int


class AdamW8bit(torch.optim.Optimizer):
    """AdamW, whose state takes 2.03 bytes a value instead of 8.

    State of a parameter [n]: step float32 []; exp_avg and exp_avg_sq uint8 [n], with exp_avg_max
    and exp_avg_sq_max float32 [ceil(n / 256)]; of a small one exp_avg and exp_avg_sq float32 alone.
    """

    def __init__(
        self,
        params: Iterable[Any],
        *,
        lr: float,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
    ) -> None:
        """Take parameters, or groups of them that may say otherwise for theirs."""
        super().__init__(params, dict(zip(SETTINGS, (lr, betas, eps, weight_decay), strict=True)))

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """Move every parameter that has a gradient; return what `closure` returns, if given."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        parts = []
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                state = self.state[parameter]
                if not state:
                    state.update(step=torch.zeros(()), **empty(parameter))
                state["step"] += 1
                parts.append(Part(parameter, parameter.grad, state, group, int(state["step"])))
        advance(parts)
        return loss

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Put a state back in its own dtypes: torch's way makes those of the parameters of them."""
        super().load_state_dict({**state_dict, "state": {}})
        order = [p for group in self.param_groups for p in group["params"]]
        for i, state in state_dict["state"].items():
            moved = {k: v if k == "step" else v.to(order[i].device) for k, v in state.items()}
            self.state[order[i]] = moved


def layout(parameter: Tensor) -> dict[str, tuple[torch.dtype, int]] | None:
    """Return the dtype of each tensor of the moments, and the values that share one of its numbers.

    None where the moments are two of the parameter's shape, in float32: the parameter is small.
    """
    if parameter.numel() < LEAST or not parameter.is_contiguous():
        return None
    codes, most = (torch.uint8, 1), (torch.float32, BLOCK)
    names = ("exp_avg", "exp_avg_sq", "exp_avg_max", "exp_avg_sq_max")
    return dict(zip(names, (codes, codes, most, most), strict=True))


def empty(parameter: Tensor) -> dict[str, Tensor]:
    """Return moments that are 0."""
    told = layout(parameter)
    if told is None:
        like = torch.zeros_like(parameter, dtype=torch.float32)
        return {"exp_avg": like, "exp_avg_sq": like.clone()}
    count, device = parameter.numel(), parameter.device
    # with an absmax of 0 any code is 0
    return {
        name: torch.zeros(-(-count // share), dtype=dtype, device=device)
        for name, (dtype, share) in told.items()
    }


def advance(parts: Sequence[Part]) -> None:
    """Make a step of every part."""
    pieces = []
    for weights, grads, state, group, number in parts:
        rule = _rule(number, *(group[name] for name in SETTINGS))
        first, second = state["exp_avg"], state["exp_avg_sq"]
        if "exp_avg_max" not in state:
            move(weights, grads, first, second, rule)
            continue
        most = (state["exp_avg_max"], state["exp_avg_sq_max"])
        pieces.append(Piece(weights, grads.contiguous(), first, second, *most, rule))
    step(pieces)


@lru_cache(maxsize=64)
def _rule(step: int, lr: float, betas: tuple[float, float], eps: float, decay: float) -> Rule:
    # the same for all parameters of a group that are as old
    return Rule.of(lr, betas, eps, decay, step)
