"""The level between `PeftModel` and its base: paths read `base_model.model....`, as PEFT's do."""

from __future__ import annotations

import types
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from inlay.core.errors import UserError
from inlay.model.ranks import Ranks, names_in_training, penalties
from inlay.model.roster import Roster


class Adapted(nn.Module):
    """The base with its hosts, a level below `PeftModel`: paths read `base_model.model....`."""

    def __init__(self, model: nn.Module, roster: Roster) -> None:
        """Hold `model`, whose adapters `roster` has."""
        super().__init__()
        self.model = model
        self._roster = roster
        self._ranks: dict[str, Ranks] = {}
        self._own: Callable[..., Any] | None = None
        self._entered = False

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Return what the model returns."""
        if self._own is None:
            return self.model(*args, **kwargs)
        if self._entered:  # what stands in for the model's forward asks for the model's own
            return self._own(*args, **kwargs)
        self._entered = True
        try:
            return self.model(*args, **kwargs)
        finally:
            self._entered = False

    def exchange(self, forward: Callable[..., Any]) -> None:
        """Let `forward(model, ...)` stand in for the model's; it may call that by the wrapper's."""
        if self._own is None:
            self._own = self.model.forward
        self.model.forward = types.MethodType(forward, self.model)

    def update_and_allocate(self, global_step: int) -> None:
        """Choose the ranks of the AdaLoRA in training after step `global_step`, as PEFT does.

        After the optimizer's step and before its gradients go. `inlay train` does it by itself.
        """
        names = names_in_training(self._roster)
        if not names:
            raise UserError("update_and_allocate is for an AdaLoRA in training, and there is none")
        for name in names:
            if self.ranks(name) is None:
                self._ranks[name] = Ranks(self._roster, name)
            self._ranks[name].update_and_allocate(global_step)

    def penalized(self, outputs: Any) -> Any:
        """Return a model's outputs, to whose loss that of AdaLoRA or KaSA is added in training."""
        if not self.training or not torch.is_grad_enabled():
            return outputs
        if isinstance(getattr(outputs, "loss", None), torch.Tensor):
            for penalty in penalties(self._roster):
                outputs.loss = outputs.loss + penalty()
        return outputs

    def ranks(self, name: str) -> Ranks | None:
        """Return what was chosen of adapter `name` in training, where anything was."""
        found = self._ranks.get(name)
        return found if found is not None and found.is_current else None

    def __getattr__(self, name: str) -> Any:
        """Return the model's attribute."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name == "model":
                raise
            return getattr(self.model, name)


def tied(module: nn.Module) -> dict[str, str]:
    """Return the names under which a parameter stands again -> its first name."""
    first: dict[int, str] = {}
    again: dict[str, str] = {}
    for name, parameter in module.named_parameters(remove_duplicate=False):
        if first.setdefault(id(parameter), name) != name:
            again[name] = first[id(parameter)]
    return again


def leave_out_tied(module: nn.Module, state: dict[str, Any], prefix: str, *_: Any) -> None:
    """Take the second names of tied parameters out of a state dict: safetensors holds each once."""
    for name in tied(module):
        state.pop(prefix + name, None)


def fill_in_tied(module: nn.Module, state: dict[str, Any], prefix: str, *_: Any) -> None:
    """Put the second names of tied parameters into a state dict that is about to be loaded."""
    for name, first in tied(module).items():
        if prefix + first in state:
            state.setdefault(prefix + name, state[prefix + first])
