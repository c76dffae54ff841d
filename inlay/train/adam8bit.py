"""AdamW with its moments in 8 bits: block-wise dynamic quantization (Dettmers, arXiv:2110.02861).

    m = b1 m + (1 - b1) g        v = b2 v + (1 - b2) g^2
    w = (1 - lr decay) w - lr (m / (1 - b1^t)) / (sqrt(v / (1 - b2^t)) + eps)

Between steps a moment of n values is codes uint8 [n] and the largest magnitude of each 256 of them,
absmax float32 [ceil(n / 256)]: value = map[code] * absmax. The map of m has signs; that of v has a
bit more of fraction in their place. A step makes numbers of a piece, moves it and packs it again,
so that no moment is ever whole in float32. Parameters of under 4096 values keep float32 moments.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import cache
from typing import Any

import torch
from torch import Tensor

from inlay.kernels.codec import dynamic_map

BLOCK = 256
"""Values that share an absmax."""
LEAST = 4096
"""Values of the smallest parameter whose moments are in 8 bits, as in bitsandbytes."""
PIECE = 1 << 18
"""Values worked on at a time, a megabyte of float32 a tensor; whole blocks."""


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
        settings = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay}
        super().__init__(params, settings)

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """Move every parameter that has a gradient; return what `closure` returns, if given."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self._move(parameter, group)
        return loss

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Put a state back in its own dtypes: torch's way makes those of the parameters of them."""
        super().load_state_dict({**state_dict, "state": {}})
        order = [p for group in self.param_groups for p in group["params"]]
        for i, state in state_dict["state"].items():
            moved = {k: v if k == "step" else v.to(order[i].device) for k, v in state.items()}
            self.state[order[i]] = moved

    def _move(self, parameter: Tensor, group: dict[str, Any]) -> None:
        state = self.state[parameter]
        if not state:
            state.update(_empty(parameter))
        state["step"] += 1
        step = int(state["step"])
        if "exp_avg_max" not in state:
            moments = (state["exp_avg"], state["exp_avg_sq"])
            _adamw(parameter, parameter.grad, *moments, group=group, step=step)
            return
        weights, grads = parameter.view(-1), parameter.grad.reshape(-1)  # type: ignore[union-attr]
        signed, unsigned = dynamic_map(weights.device), unsigned_map(weights.device)
        for start in range(0, len(weights), PIECE):
            part = slice(start, start + PIECE)
            blocks = slice(start // BLOCK, (start + PIECE) // BLOCK)
            first, first_max = state["exp_avg"][part], state["exp_avg_max"][blocks]
            second, second_max = state["exp_avg_sq"][part], state["exp_avg_sq_max"][blocks]
            mean = unpack(first, first_max, signed)
            square = unpack(second, second_max, unsigned)
            _adamw(weights[part], grads[part], mean, square, group=group, step=step)
            pack(mean, first, first_max, signed)
            pack(square, second, second_max, unsigned)


@cache
def unsigned_map(device: torch.device) -> Tensor:
    """Return the 256 values [256] from 0 to 1 of the second moment's codes, in rising order.

    As `dynamic_map`, with the bit of the sign given to the fraction (the paper's section 2.2).
    """
    values = [0.0, 1.0]
    for i in range(7):
        edges = torch.linspace(0.1, 1, 2 ** (i + 1) + 1)
        values += (10 ** (i - 6) * ((edges[:-1] + edges[1:]) / 2)).tolist()
    return torch.tensor(sorted(values), device=device)


def pack(values: Tensor, codes: Tensor, absmax: Tensor, levels: Tensor) -> None:
    """Write float32 values [n] as codes uint8 [n] and absmax [ceil(n / 256)], the nearest level.

    Without signs what is above 0 never becomes 0: as a second moment it would make a step of
    m / eps.
    """
    padded = torch.nn.functional.pad(values, (0, len(absmax) * BLOCK - len(values)))
    blocks = padded.view(-1, BLOCK)
    torch.amax(blocks.abs(), 1, out=absmax)
    # a block of zeros stays one, whatever it is divided by
    scaled = (blocks / absmax.clamp(min=1e-38)[:, None]).view(-1)[: len(values)]
    below, middle = _cells(float(levels[0]) < 0, values.device)
    cell = (scaled.view(torch.int32) >> 16).add_(1 << 15)
    torch.index_select(below, 0, cell, out=codes)
    codes.add_(scaled > middle.index_select(0, cell))
    if levels[0] == 0:
        codes.clamp_(min=1).mul_(values > 0)


def unpack(codes: Tensor, absmax: Tensor, levels: Tensor) -> Tensor:
    """Return the float32 values [n] of codes uint8 [n] and absmax [ceil(n / 256)]."""
    values = levels.index_select(0, codes.int())
    whole = len(values) // BLOCK * BLOCK
    values[:whole].view(-1, BLOCK).mul_(absmax[: whole // BLOCK, None])
    values[whole:].mul_(absmax[-1])
    return values


@cache
def _cells(signs: bool, device: torch.device) -> tuple[Tensor, Tensor]:
    """Return how many middles between levels lie before each cell [65536], and the next [65536].

    A cell is the numbers whose float32 begins with the same 16 bits: too few for two middles, so
    that the place in it decides. As `torch.bucketize`, without its search.
    """
    levels = dynamic_map(device) if signs else unsigned_map(device)
    middles = (levels[:-1] + levels[1:]) / 2
    start = torch.arange(-(1 << 15), 1 << 15, dtype=torch.int32, device=device) << 16
    # of negative numbers the least has the largest bits
    least = torch.where(start < 0, start | 0xFFFF, start).view(torch.float32)
    below = torch.bucketize(least, middles)
    ends = torch.cat([middles, middles.new_full((1,), torch.inf)])
    return below.to(torch.uint8), ends[below]


def _empty(parameter: Tensor) -> dict[str, Tensor]:
    """Return the state of moments that are 0."""
    step = torch.zeros(())
    device, count = parameter.device, parameter.numel()
    if count < LEAST or not parameter.is_contiguous():
        like = torch.zeros_like(parameter, dtype=torch.float32)
        return {"step": step, "exp_avg": like, "exp_avg_sq": like.clone()}
    state = {"step": step}
    for name in ("exp_avg", "exp_avg_sq"):
        # with an absmax of 0 any code is 0
        state[name] = torch.zeros(count, dtype=torch.uint8, device=device)
        state[f"{name}_max"] = torch.zeros(-(-count // BLOCK), device=device)
    return state


def _adamw(
    weights: Tensor,
    grads: Tensor | None,
    mean: Tensor,
    square: Tensor,
    *,
    group: dict[str, Any],
    step: int,
) -> None:
    """Move weights, mean and square in place, all of one shape, the last two in float32."""
    assert grads is not None
    (b1, b2), lr, exact = group["betas"], group["lr"], grads.float()
    mean.lerp_(exact, 1 - b1)
    square.mul_(b2).addcmul_(exact, exact, value=1 - b2)
    below = square.sqrt().div_((1 - b2**step) ** 0.5).add_(group["eps"])
    moved = weights.float().mul(1 - lr * group["weight_decay"])
    weights.copy_(moved.addcdiv_(mean, below, value=-lr / (1 - b1**step)))
