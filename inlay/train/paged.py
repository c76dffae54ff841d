"""AdamW whose moments lie in the host's memory and come to the device page by page.

On the device there are two pages of moments, whatever is trained (Dettmers et al.,
arXiv:2305.14314, section 3, where the driver does it). The arithmetic is that of the unpaged
optimizers, and so are the bits, the state and its names: a checkpoint of one goes on in the other.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.optim.adamw import adamw

from inlay.train import adam8bit
from inlay.train.adam8bit import LEAST, SETTINGS, Part
from inlay.train.pages import Layout, Pages

PAGE = 1 << 21
"""Values of a page: 16 MiB of moments in float32, 4 in 8 bits."""


class Kind(NamedTuple):
    """An AdamW to page: its moments, None for a parameter whose are not paged; how parts move.

    shaped: the state is told in the parameter's shape, not flat.
    """

    layout: Callable[[Tensor], Layout | None]
    empty: Callable[[Tensor], dict[str, Tensor]]
    advance: Callable[[Sequence[Part]], None]
    shaped: bool


class PagedAdamW(torch.optim.Optimizer):
    """AdamW or, with `eight_bit`, AdamW8bit, with paged moments; the state is theirs.

    Parameters of under 4096 values keep theirs on the device. page: the values of a page, a
    multiple of 256.
    """

    def __init__(
        self,
        params: Iterable[Any],
        *,
        lr: float,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        eight_bit: bool = False,
        page: int = PAGE,
    ) -> None:
        """Take parameters, or groups of them that may say otherwise for theirs."""
        self.kind, self.page = EIGHT_BIT if eight_bit else FULL, page
        self.books: list[Pages] = []
        super().__init__(params, dict(zip(SETTINGS, (lr, betas, eps, weight_decay), strict=True)))

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """Move every parameter that has a gradient; return what `closure` returns, if given.

        UserError where one is on a device other than cpu or cuda.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        paged, others = {}, []
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                state = self._state(parameter)
                state["step"] += 1
                part = Part(parameter, parameter.grad, state, group, int(state["step"]))
                if self.kind.layout(parameter) is None:
                    others.append(part)
                else:
                    paged[parameter] = part
        self.kind.advance(others)
        for book in self.books:
            for spans in book.walk(paged):
                self.kind.advance([_cut(paged[s.parameter], s.first, s.last, m) for s, m in spans])
        return loss

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Put back the state of this optimizer or of the unpaged one."""
        super().load_state_dict({**state_dict, "state": {}})
        order = [p for group in self.param_groups for p in group["params"]]
        for i, given in state_dict["state"].items():
            for name, tensor in self._state(order[i]).items():
                tensor.copy_(given[name])

    def _state(self, parameter: Tensor) -> dict[str, Tensor]:
        state: dict[str, Tensor] = self.state[parameter]
        if not state:
            if self.kind.layout(parameter) is None:
                moments = self.kind.empty(parameter)
            else:
                moments = self._place(parameter)
            # counted on the CPU, where reading it waits for no device
            state.update(step=torch.zeros(()), **moments)
        return state

    def _place(self, parameter: Tensor) -> dict[str, Tensor]:
        if not any(parameter in book.places for book in self.books):
            self._open()
        found = next(book.places[parameter] for book in self.books if parameter in book.places)
        if not self.kind.shaped:
            return found
        return {name: tensor.view(parameter.shape) for name, tensor in found.items()}

    def _open(self) -> None:
        """Give all parameters that have none yet a place in pages."""
        found: dict[Any, list[Tensor]] = {}
        for group in self.param_groups:
            for parameter in group["params"]:
                told = self.kind.layout(parameter)
                if told is None or any(parameter in book.places for book in self.books):
                    continue
                found.setdefault((parameter.device, tuple(told.items())), []).append(parameter)
        for (device, told), parameters in found.items():
            self.books.append(Pages(parameters, dict(told), device, self.page))


def _cut(part: Part, first: int, last: int, moments: dict[str, Tensor]) -> Part:
    weights, grads = part.weights.view(-1)[first:last], part.grads.reshape(-1)[first:last]
    return Part(weights, grads, moments, part.group, part.step)


def _layout(parameter: Tensor) -> Layout | None:
    if parameter.numel() < LEAST or not parameter.is_contiguous():
        return None
    return {"exp_avg": (parameter.dtype, 1), "exp_avg_sq": (parameter.dtype, 1)}


def _empty(parameter: Tensor) -> dict[str, Tensor]:
    like = torch.zeros_like(parameter, memory_format=torch.preserve_format)
    return {"exp_avg": like, "exp_avg_sq": like.clone()}


def _advance(parts: Sequence[Part]) -> None:
    """Make a step of every part by torch's fused kernel, as torch.optim.AdamW does."""
    by_group: dict[int, list[Part]] = {}
    for part in parts:
        by_group.setdefault(id(part.group), []).append(part)
    for same in by_group.values():
        weights, grads, states, groups, numbers = map(list, zip(*same, strict=True))
        group: Any = groups[0]
        # of the step before, for torch counts them up; filled on the device, which nobody waits for
        steps = [_number(number - 1, weights[0].device) for number in numbers]
        adamw(
            weights,
            grads,
            [state["exp_avg"] for state in states],
            [state["exp_avg_sq"] for state in states],
            [],
            steps,
            fused=True,
            amsgrad=False,
            beta1=group["betas"][0],
            beta2=group["betas"][1],
            lr=group["lr"],
            weight_decay=group["weight_decay"],
            eps=group["eps"],
            maximize=False,
        )


def _number(value: int, device: torch.device) -> Tensor:
    return torch.full((), value, dtype=torch.float32, device=device)


FULL = Kind(_layout, _empty, _advance, shaped=True)
EIGHT_BIT = Kind(adam8bit.layout, adam8bit.empty, adam8bit.advance, shaped=False)
