"""AdaLoRA's budget of ranks: in training, the singular values that matter least are set to zero.

Of every number p the importance I = |p dp| is smoothed (beta1), and so is how much it varies,
|I - its mean| (beta2); the score is their product.  A rank's score is that of its value e, plus the
mean scores of its rows in A and of its columns in B.  The budget over all layers falls from init_r
to target_r a layer by a cubic between steps tinit and total_step - tfinal (arXiv:2303.10512,
section 3.3 and equation 12).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from inlay.core.adapter import Adapter
from inlay.core.errors import UserError
from inlay.methods.adalora import AdaLora, AdaLoraConfig
from inlay.model.roster import Roster

PARTS = ("lora_A", "lora_B", "lora_E")


@dataclasses.dataclass
class Importance:
    """What is remembered of one parameter: both of its shape."""

    mean: Tensor
    change: Tensor


class Ranks:
    """The ranks of one AdaLoRA adapter in training.

    masks: module path -> whether each of its ranks is kept; empty until the first choice.
    """

    def __init__(self, roster: Roster, name: str, steps: int | None = None) -> None:
        """Take up the adapter; UserError where it is none of AdaLoRA's, or has no total_step.

        steps: the total_step where the configuration leaves it out; its file then says it too.
        """
        roster.check(name)
        config = roster.configs[name]
        if not isinstance(config, AdaLoraConfig):
            raise UserError(f"{name!r} is {config.method}: only AdaLoRA chooses ranks in training")
        if config.total_step is None and steps is not None:
            config = roster.configs[name] = config.replace(total_step=steps)
        if config.total_step is None:
            raise UserError("AdaLoRA's schedule needs total_step, the steps of the whole training")
        self.config, self.total = config, config.total_step
        self.name, self._roster = name, roster
        self.adapters = adapters_of(roster, name)
        self.masks: dict[str, list[bool]] = {}
        self._seen: dict[nn.Parameter, Importance] = {}

    def budget(self, step: int) -> int:
        """Return how many ranks all layers together may have after `step`."""
        config, start = self.config, sum(len(a.lora_E) for a in self.adapters.values())
        target = config.target_r * len(self.adapters)
        last = self.total - config.tfinal
        if step <= config.tinit:
            return start
        left = max(0.0, 1 - (step - config.tinit) / (last - config.tinit))
        return int((start - target) * left**3 + target)

    @torch.no_grad()
    def update_and_allocate(self, step: int) -> None:
        """Choose ranks after `step`, counted from 1: after backward, before the gradients go."""
        last = self.total - self.config.tfinal
        if step < last:
            self._observe()
        chooses = self.config.tinit < step < last and step % self.config.deltaT == 0
        if chooses or step == last:
            self._choose(self.budget(step))
        elif step > last:
            self._mask()

    def state(self) -> dict[str, Tensor]:
        """Return by name all that is remembered from step to step."""
        found = {f"mask.{path}": torch.tensor(mask) for path, mask in self.masks.items()}
        for key, parameter in self._parameters():
            if parameter in self._seen:
                seen = self._seen[parameter]
                found |= {f"mean.{key}": seen.mean, f"change.{key}": seen.change}
        return found

    def load(self, state: Mapping[str, Tensor]) -> None:
        """Remember what `state` returned; copies."""
        self.masks = {
            path: state[f"mask.{path}"].tolist()
            for path in self.adapters
            if f"mask.{path}" in state
        }
        self._seen = {
            p: Importance(*(state[f"{kind}.{key}"].to(p, copy=True) for kind in ("mean", "change")))
            for key, p in self._parameters()
            if f"mean.{key}" in state
        }

    @torch.no_grad()
    def settle(self) -> None:
        """Leave the ranks that were taken away out for good, of the adapter and of its file.

        After the last step: the parameters are new ones, which no optimizer knows.
        """
        if not self.masks:
            return
        before = self.config.rank_pattern or {}
        pattern = {
            f"{path}.lora_E": within(before.get(f"{path}.lora_E"), mask)
            for path, mask in self.masks.items()
        }
        settled = self.config.replace(rank_pattern=pattern)
        for path, adapter in self.adapters.items():
            kept = torch.tensor(self.masks[path], device=adapter.lora_E.device)
            adapter.config = settled.at(path)
            for part in PARTS:
                old = adapter.get_parameter(part)
                new = old[:, kept] if part == "lora_B" else old[kept]
                setattr(adapter, part, nn.Parameter(new, old.requires_grad))
        self._roster.configs[self.name] = settled

    @contextmanager
    def settled(self) -> Iterator[None]:
        """Have the ranks that were taken away left out for a while, to write a file."""
        config = self._roster.configs[self.name]
        before = {
            path: (adapter.config, {part: adapter.get_parameter(part) for part in PARTS})
            for path, adapter in self.adapters.items()
        }
        self.settle()
        try:
            yield
        finally:
            self._roster.configs[self.name] = config
            for path, (own, parts) in before.items():
                self.adapters[path].config = own
                for part, parameter in parts.items():
                    setattr(self.adapters[path], part, parameter)

    @property
    def is_current(self) -> bool:
        """Whether the model's adapter of this name is still the one that was taken up."""
        return adapters_of(self._roster, self.name) == self.adapters

    def _parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        for path, adapter in self.adapters.items():
            for part in PARTS:
                yield f"{path}.{part}", adapter.get_parameter(part)

    def _observe(self) -> None:
        beta1, beta2 = self.config.beta1, self.config.beta2
        for _, p in self._parameters():
            if p.grad is None:
                raise UserError(
                    "AdaLoRA chooses ranks by gradients: call update_and_allocate after "
                    "backward and before zero_grad"
                )
            seen = self._seen.get(p) or Importance(torch.zeros_like(p), torch.zeros_like(p))
            now = (p * p.grad).abs()
            seen.mean = beta1 * seen.mean + (1 - beta1) * now
            seen.change = beta2 * seen.change + (1 - beta2) * (now - seen.mean).abs()
            self._seen[p] = seen

    def _choose(self, budget: int) -> None:
        if not self._seen:
            return
        scores = {path: self._scores(adapter) for path, adapter in self.adapters.items()}
        all_scores = torch.cat(list(scores.values()))
        drop = len(all_scores) - budget
        if drop > 0:
            limit = all_scores.kthvalue(drop).values
            self.masks = {path: (s > limit).tolist() for path, s in scores.items()}
            self._mask()

    def _scores(self, adapter: AdaLora) -> Tensor:
        """Return the score [R] of each rank."""
        a, b, e = (self._seen[adapter.get_parameter(part)] for part in PARTS)
        rows, columns = (a.mean * a.change).mean(1), (b.mean * b.change).mean(0)
        return (e.mean * e.change)[:, 0] + rows + columns

    def _mask(self) -> None:
        for path, mask in self.masks.items():
            e = self.adapters[path].lora_E
            e.masked_fill_(~torch.tensor(mask, device=e.device)[:, None], 0.0)


def adapters_of(roster: Roster, name: str) -> dict[str, AdaLora]:
    """Return by path the layers' parts of an AdaLoRA; none for another method."""
    found = ((path, adapter) for path, _, adapter in roster.adapters(name))
    return {path: adapter for path, adapter in found if isinstance(adapter, AdaLora)}


def names_in_training(roster: Roster) -> list[str]:
    """Return the names of every AdaLoRA that is active and in training."""
    return [
        name
        for name in roster.selection.active
        if name in roster.trainable and isinstance(roster.configs[name], AdaLoraConfig)
    ]


def penalties(roster: Roster) -> list[Callable[[], Any]]:
    """Return what a training step's loss gets beside the objective's, of the adapters in training.

    Each function gives a term anew.
    """
    found: list[Callable[[], Any]] = []
    for name in roster.selection.active:
        if name not in roster.trainable:
            continue
        if getattr(roster.configs[name], "orth_reg_weight", 0):
            found.append(partial(penalty, roster, name))
        for _, _, adapter in roster.adapters(name):
            if type(adapter).penalty is not Adapter.penalty:
                found.append(adapter.penalty)
    return found


def penalty(roster: Roster, name: str) -> Tensor:
    """Return what an AdaLoRA's loss gets for A A^T and B^T B being far from I: their mean norm."""
    config, adapters = roster.configs[name], adapters_of(roster, name).values()
    assert isinstance(config, AdaLoraConfig)
    squares = [m for a in adapters for m in (a.lora_A @ a.lora_A.T, a.lora_B.T @ a.lora_B)]
    apart = [(square - torch.eye(len(square)).to(square)).norm() for square in squares]
    return config.orth_reg_weight * torch.stack(apart).mean()


def within(before: list[bool] | None, mask: list[bool]) -> list[bool]:
    """Return which of the first ranks are kept, where `mask` says it of those left `before`."""
    if before is None:
        return mask
    left = iter(mask)
    return [kept and next(left) for kept in before]
