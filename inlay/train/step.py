"""One optimizer step's gradient: the sum of its micro-batches' shares, over all ranks (law 2)."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from inlay.core.errors import UserError
from inlay.train.distributed import (
    add_up,
    add_up_gradients,
    fill_gradients,
    gather,
    rank,
    world,
)
from inlay.train.flat import Flat, gradients_of, norm_of
from inlay.train.order import seed_of
from inlay.train.precision import autocast, device_of


class NonFiniteError(UserError):
    """The loss or its gradient is NaN or infinite; the weights are those of the step before.

    step: the step that was being made, from 1.  rows: the rows at fault ("file:line"), as near as
    they can be told.
    """

    def __init__(self, what: str, step: int, rows: Sequence[str]) -> None:
        """Name the step and the rows."""
        self.step, self.rows = step, tuple(rows)
        shown = ", ".join(self.rows[:8]) + (
            f" and {len(self.rows) - 8} more" if len(self.rows) > 8 else ""
        )
        super().__init__(
            f"{what} at step {step}, in rows {shown}; the weights were not touched. "
            f"Look at these rows; if they are sound, lower train.learning_rate, "
            f"or set train.precision float32"
        )


@dataclass(frozen=True)
class Sums:
    """What a step added up over micro-batches and ranks."""

    loss: float
    grad_norm: Tensor
    tokens: int
    trained_tokens: float
    gradients: list[Tensor]
    """Not clipped; each a parameter's .grad, or a tensor of which those of many are parts."""


@dataclass(frozen=True)
class Stepper:
    """All that stays the same from step to step."""

    model: nn.Module
    parameters: Mapping[str, nn.Parameter]
    objective: Any
    tokenizer: Any
    precision: torch.dtype
    seed: int
    penalties: Sequence[Callable[[], Tensor]] = ()
    """What is added to a step's loss for the weights alone; not in the loss that is told, which is
    that of the rows."""
    flats: Sequence[Flat] = ()
    """Parameters whose gradients are to be in one tensor."""

    def gradient(self, step: int, micros: Sequence[Sequence[Any]]) -> Sums:
        """Add the gradient of this rank's `micros` up, each a list of rows.

        Raises NonFiniteError, with every .grad set to None, where the loss or the gradient is NaN
        or infinite.
        """
        device = device_of(self.model)
        batches = []
        for i, rows in enumerate(micros):
            self._reseed(step, i)
            batches.append(
                self.objective.prepare(
                    self.model, self.objective.collate(rows, self.tokenizer).to(device)
                )
            )
        norm = total_counts(self.objective, batches, device)
        shares = []
        for i, batch in enumerate(batches):
            # a seed for each micro-batch, so that dropout depends on nothing that ran before:
            # evaluations, a resume
            self._reseed(step, i)
            share = self._share(batch, norm)
            share.backward()
            shares.append(share.detach().float())
        for penalty in self.penalties if rank() == 0 else ():  # once, however a step is cut
            penalty().backward()
        fill_gradients(self.parameters.values())
        gradients = gradients_of(self.parameters.values(), self.flats)
        add_up_gradients(gradients)
        grad_norm = norm_of(gradients) if gradients else torch.zeros((), device=device)
        loss = add_up(torch.stack(shares).sum() if shares else torch.zeros((), device=device))
        if not torch.isfinite(torch.stack([loss, grad_norm.to(loss)])).all():
            self._refuse(step, micros, batches, norm, loss)
        tokens = add_up(
            torch.tensor(
                sum(self.objective.size(row) for rows in micros for row in rows), device=device
            )
        )
        trained_tokens = sum(float(count) for count in norm.values())
        return Sums(loss.item(), grad_norm, int(tokens), trained_tokens, gradients)

    def _reseed(self, step: int, micro: int) -> None:
        # numbered over all ranks, as they are dealt: two ranks draw what one would have drawn
        seed = seed_of(self.seed, step, micro * world() + rank())
        if device_of(self.model).type == "cpu":
            # the same draws as after torch.manual_seed, which takes half a millisecond to note
            # the seed for devices that are not there
            torch.default_generator.manual_seed(seed)
        else:
            torch.manual_seed(seed)

    def _share(self, batch: Any, norm: dict[str, Tensor]) -> Tensor:
        with autocast(self.precision, device_of(self.model)):
            return self.objective.loss(self.model, batch, norm)

    def _refuse(
        self,
        step: int,
        micros: Sequence[Sequence[Any]],
        batches: Sequence[Any],
        norm: dict[str, Tensor],
        loss: Tensor,
    ) -> None:
        what = (
            "the gradient is not finite" if torch.isfinite(loss) else f"the loss is {loss.item()}"
        )
        named = [name for batch in batches for name in batch.rows]
        guilty = []
        device = device_of(self.model)
        for i, rows in enumerate(micros):
            for row in rows:
                self._reseed(step, i)
                alone = self.objective.prepare(
                    self.model, self.objective.collate([row], self.tokenizer).to(device)
                )
                if not self._finite(alone, norm):
                    guilty.extend(alone.rows)
        for parameter in self.parameters.values():
            parameter.grad = None
        raise NonFiniteError(what, step + 1, gather(guilty) or gather(named))

    def _finite(self, batch: Any, norm: dict[str, Tensor]) -> bool:
        share = self._share(batch, norm)
        grads = torch.autograd.grad(share, list(self.parameters.values()), allow_unused=True)
        return all(bool(torch.isfinite(t).all()) for t in (share, *grads) if t is not None)


def total_counts(objective: Any, batches: Sequence[Any], device: torch.device) -> dict[str, Tensor]:
    """Return the objective's counts, summed over `batches` and all ranks.

    A rank without batches takes part with the counts of the others: their names are the same
    everywhere.
    """
    names = sorted(objective.means)
    mine = [
        sum((objective.counts(batch)[name] for batch in batches), torch.zeros((), device=device))
        for name in names
    ]
    return dict(zip(names, add_up(torch.stack(mine)).unbind(), strict=True))
