"""Small parameters one after another in one tensor: AdamW is one call, where it was one for each.

    values, gradient, exp_avg, exp_avg_sq       [rows, 1024] each

For as long as a run lasts, each parameter's `.data` is a part of `values`, and what AdamW keeps of
it, under its own name as ever, a part of `exp_avg` and of `exp_avg_sq`. Autograd makes gradients as
ever; once a step they are copied together, and `.grad` is a part of `gradient` until it is dropped.
Of 420 factors of ten thousand numbers most of a step is sharing each out among threads.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.adamw import adamw

LARGEST = 2**15
"""Numbers of a parameter that is still small: torch itself divides more among threads, and then
the call is little of its time, and a gradient kept twice is much memory."""
WIDTH = 1024
"""Numbers of a row; a norm is that of the rows' norms, for one float32 sum of millions of squares
is wrong in the fourth digit."""
ALIGNED = 16
"""Each part begins at a multiple of so many numbers, 64 bytes, as a tensor of its own does: matrix
products round otherwise where one does not."""


class Flat:
    """The small parameters of one group of an AdamW; they keep their values."""

    def __init__(
        self, optimizer: torch.optim.AdamW, group: int, parameters: Sequence[nn.Parameter]
    ) -> None:
        """Put `parameters`, float32 and of the group of that number, into one tensor."""
        self.optimizer, self.group, self.parameters = optimizer, group, parameters
        padded = [-(-p.numel() // ALIGNED) * ALIGNED for p in parameters]
        self._sizes = [*padded, -sum(padded) % WIDTH]
        self.values = torch.zeros(sum(self._sizes), device=parameters[0].device).view(-1, WIDTH)
        self.gradient = torch.zeros_like(self.values)
        self._gradients = self._parts(self.gradient)
        for parameter, part in zip(parameters, self._parts(self.values), strict=True):
            parameter.data = part.copy_(parameter.data)
        self._places = [p.data_ptr() for p in parameters]
        self.together = True
        """Whether every parameter has made the same number of steps."""
        self.adopt()

    def gather(self) -> bool:
        """Bring all gradients together; False, with nothing done, where that cannot be.

        It cannot where a parameter has none: AdamW leaves that one as it is, and counts no step.
        Nor where one was given other memory: what is made here would not reach it.
        """
        if not self.together or any(p.grad is None for p in self.parameters):
            return False
        if [p.data_ptr() for p in self.parameters] != self._places:
            return False
        for parameter, part in zip(self.parameters, self._gradients, strict=True):
            if parameter.grad is not part:
                parameter.grad = part.copy_(parameter.grad)  # type: ignore[arg-type]
        return True

    def hide(self) -> None:
        """Drop every `.grad`, so that the optimizer passes the parameters over."""
        for parameter in self.parameters:
            parameter.grad = None

    def show(self) -> None:
        """Put back what `hide` dropped."""
        for parameter, part in zip(self.parameters, self._gradients, strict=True):
            parameter.grad = part

    def step(self) -> bool:
        """Make AdamW's step of all parameters; False where they are for the optimizer to make."""
        if not self.gather():
            self.together = self.together and all(p.grad is None for p in self.parameters)
            return False
        if self._state is None:
            self._keep(0.0)
        assert self._state is not None
        steps, exp_avg, exp_avg_sq = self._state
        group = self.optimizer.param_groups[self.group]
        beta1, beta2 = group["betas"]
        names = ("lr", "weight_decay", "eps", "maximize", "amsgrad")
        settings: dict[str, Any] = {name: group[name] for name in names}
        adamw(
            *([self.values], [self.gradient], [exp_avg], [exp_avg_sq], [], [steps[0]]),
            **settings,
            beta1=beta1,
            beta2=beta2,
            fused=True,
        )
        steps[1:] += 1
        return True

    def adopt(self) -> None:
        """Bring together what the optimizer keeps of the parameters, where they are together."""
        kept = [self.optimizer.state.get(p) for p in self.parameters]
        steps = {float(state["step"]) if state else None for state in kept}
        self._state: tuple[Tensor, Tensor, Tensor] | None = None
        self.together = len(steps) == 1
        (first, *_) = steps
        if self.together and first is not None:
            self._keep(first)

    def release(self) -> None:
        """Give each parameter memory of its own again."""
        for parameter in self.parameters:
            parameter.data = parameter.data.clone()

    def _keep(self, count: float) -> None:
        """Let the optimizer's state be parts of a few tensors, with the values it has, if any."""
        steps = torch.full((len(self.parameters),), count, device=self.values.device)
        moments = {kind: torch.zeros_like(self.values) for kind in ("exp_avg", "exp_avg_sq")}
        parts = {kind: self._parts(moment) for kind, moment in moments.items()}
        for i, parameter in enumerate(self.parameters):
            before = self.optimizer.state.get(parameter, {})
            own = {kind: parts[kind][i] for kind in parts}
            for kind, part in own.items():
                if kind in before:
                    part.copy_(before[kind])
            self.optimizer.state[parameter] = {"step": steps[i], **own}
        self._state = (steps, *moments.values())  # type: ignore[assignment]

    def _parts(self, flat: Tensor) -> list[Tensor]:
        pieces = flat.view(-1).split(self._sizes)
        return [
            piece[: p.numel()].view(p.shape)
            for piece, p in zip(pieces, self.parameters, strict=False)
        ]


@contextmanager
def flattened(optimizer: torch.optim.Optimizer, model: nn.Module) -> Iterator[list[Flat]]:
    """Have `optimizer` step the small parameters of each group at once, for a `with` block.

    Yields a Flat for each group that has some; none for an optimizer other than the fused AdamW,
    or where there is a GPU, whose kernels take the list as it is. The parameters have memory of
    their own before and after.
    """
    if type(optimizer) is not torch.optim.AdamW or not optimizer.defaults["fused"]:
        yield []
        return
    found = enumerate(_small(optimizer, model))
    flats = [Flat(optimizer, i, small) for i, small in found if len(small) > 1]
    done: list[Flat] = []

    def before(*_: Any) -> None:
        done[:] = [flat for flat in flats if flat.step()]
        for flat in done:
            flat.hide()

    def after(*_: Any) -> None:
        for flat in done:
            flat.show()

    def loaded(_: Any) -> None:
        for flat in flats:
            flat.adopt()

    hooks = [
        optimizer.register_step_pre_hook(before),
        optimizer.register_step_post_hook(after),
        optimizer.register_load_state_dict_post_hook(loaded),
    ]
    try:
        yield flats
    finally:
        for hook in hooks:
            hook.remove()
        for flat in flats:
            flat.release()


def _small(optimizer: torch.optim.Optimizer, model: nn.Module) -> Iterator[list[nn.Parameter]]:
    """Yield of each group what is small and shares its memory with nothing else of `model`."""
    tensors = (t for t in (*model.parameters(), *model.buffers()) if t.device.type == "cpu")
    # other libraries' tensors may have no memory that can be asked for: none of them is trained
    plain = (t for t in tensors if type(t) in (Tensor, nn.Parameter))
    owners = Counter(t.untyped_storage().data_ptr() for t in plain)
    for group in optimizer.param_groups:
        yield [
            p
            for p in group["params"]
            if (p.device.type, p.dtype) == ("cpu", torch.float32)
            and 0 < p.numel() <= LARGEST
            and p.is_contiguous()
            and owners[p.untyped_storage().data_ptr()] == 1
        ]


def gradients_of(parameters: Iterable[nn.Parameter], flats: Sequence[Flat]) -> list[Tensor]:
    """Return the tensors that hold the gradients of `parameters`: those of `flats` as one each."""
    gathered = [flat for flat in flats if flat.gather()]
    within = {parameter for flat in gathered for parameter in flat.parameters}
    apart = (p.grad for p in parameters if p not in within)
    return [flat.gradient for flat in gathered] + [grad for grad in apart if grad is not None]


@torch.no_grad()
def norm_of(gradients: Sequence[Tensor]) -> Tensor:
    """Return the 2-norm [] of all numbers in `gradients` together; there is at least one."""
    return nn.utils.get_total_norm(
        [
            torch.linalg.vector_norm(grad, dim=1)
            if grad.ndim == 2 and grad.numel() > LARGEST
            else grad
            for grad in gradients
        ]
    )


@torch.no_grad()
def clip(gradients: Iterable[Tensor], most: float, norm: Tensor) -> None:
    """Scale `gradients` of 2-norm `norm` down to `most` in place, where it is larger."""
    scale = most / (norm + 1e-6)  # as torch.nn.utils.clip_grad_norm_ has it
    if scale < 1:
        for grad in gradients:
            grad.mul_(scale.to(grad.device))
