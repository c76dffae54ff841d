"""PEFT's functions for models that are no `PeftModel`: inject an adapter, carry its tensors."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import count
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from inlay.checkpoint.adapter import adapter_tensors, save_adapter, set_tensors, with_parts
from inlay.checkpoint.hotswap import hotswap, prepare
from inlay.checkpoint.names import PREFIX
from inlay.core.config import AdapterConfig
from inlay.core.errors import UserError
from inlay.core.inlaid import Inlaid
from inlay.methods.lora import LoraConfig
from inlay.model.convert import Approximation, convert, extract
from inlay.model.roster import Roster
from inlay.model.targets import modules
from inlay.surface.config import targeted_config
from inlay.surface.peft_model import PeftModel

M = TypeVar("M", bound=nn.Module)
_ROSTER = "_inlay_roster"


def roster_of(model: nn.Module) -> Roster:
    """Return the adapters of a `PeftModel`, or of a model with injected ones; compiled or not."""
    model = getattr(model, "_orig_mod", model)  # what torch.compile was given
    found = model.roster if isinstance(model, PeftModel) else model.__dict__.get(_ROSTER)
    if not isinstance(found, Roster):
        raise UserError(
            f"{type(model).__name__} holds no adapters: use get_peft_model or "
            "inject_adapter_in_model"
        )
    return found


def inject_adapter_in_model(
    peft_config: AdapterConfig,
    model: M,
    adapter_name: str = "default",
    low_cpu_mem_usage: bool = False,
    state_dict: Mapping[str, Tensor] | None = None,
) -> M:
    """Set an adapter into `model` itself and return it: its class and its calls stay its own.

    low_cpu_mem_usage: leave the adapter without memory, for `set_peft_model_state_dict` to fill.
    state_dict: take the modules its keys name as the targets, in place of the configuration's.
    """
    config = targeted_config(peft_config)
    roster = model.__dict__.get(_ROSTER)
    if roster is None:
        if isinstance(model, PeftModel) or any(isinstance(m, Inlaid) for m in model.modules()):
            raise UserError("the model holds adapters already: use its add_adapter()")
        roster = Roster(model)
    if state_dict is not None:
        paths = _named_by(state_dict, model)
        config = config.replace(target_modules=paths, exclude_modules=None)
    device = torch.device("meta") if low_cpu_mem_usage else None
    with with_parts(roster, adapter_name, config):
        roster.add(adapter_name, config, device=device)
    model.__dict__[_ROSTER] = roster
    return model


def get_peft_model_state_dict(
    model: nn.Module, *, adapter_name: str = "default"
) -> dict[str, Tensor]:
    """Return an adapter's tensors by the keys of PEFT's file; they share the model's memory."""
    return adapter_tensors(roster_of(model), adapter_name)


def set_peft_model_state_dict(
    model: nn.Module, peft_model_state_dict: Mapping[str, Tensor], adapter_name: str = "default"
) -> None:
    """Fill an adapter from tensors by the keys of PEFT's file, with or without `base_model.model.`.

    Strict: UserError lists every missing, unexpected and misshaped tensor, with nothing copied.
    """
    set_tensors(roster_of(model), adapter_name, peft_model_state_dict)


def convert_to_lora(
    model: nn.Module, rank: int | float, adapter_name: str = "default"
) -> tuple[LoraConfig, dict[str, Tensor]]:
    """Return the LoRA that comes nearest to an adapter: its settings, its tensors by PEFT's keys.

    rank: a whole number, or as a float the share of each update's squares to keep. The model stays
    as it is; `PeftModel.convert_to_lora` keeps the LoRA in it, and says how near it comes.
    """
    with _converted(model, rank, adapter_name) as (roster, name, _):
        tensors = {key: t.clone() for key, t in adapter_tensors(roster, name).items()}
        config = roster.configs[name]
        assert isinstance(config, LoraConfig)
        return config, tensors


def save_as_lora(
    path: str | Path, model: nn.Module, rank: int | float, adapter_name: str = "default"
) -> Approximation:
    """Save the LoRA that comes nearest to an adapter in PEFT's files; return how near that is."""
    with _converted(model, rank, adapter_name) as (roster, name, found):
        base = model._base_fingerprint if isinstance(model, PeftModel) else None
        save_adapter(roster, name, path, base=base)
        return found


@contextmanager
def _converted(
    model: nn.Module, rank: int | float, adapter_name: str
) -> Iterator[tuple[Roster, str, Approximation]]:
    """Have the LoRA in the model for a while, under a name that no adapter of it has."""
    roster = roster_of(model)
    name = next(n for n in (f"lora-{i}" for i in count()) if n not in roster.configs)
    found = convert(roster, adapter_name, name, rank)
    try:
        yield roster, name, found
    finally:
        roster.remove(name)


def extract_lora(
    base: nn.Module,
    tuned: nn.Module,
    rank: int | float,
    *,
    target_modules: Sequence[str] | str = "all-linear",
    adapter_name: str = "default",
) -> tuple[PeftModel, Approximation]:
    """Return `base`, changed in place, with the LoRA that makes it nearly `tuned`; and how nearly.

    rank: a whole number, or as a float the share of each difference's squares to keep. What has
    changed outside of target_modules is named in the second's `left_out`.
    """
    adapted = PeftModel(base)
    found = extract(adapted.roster, tuned, adapter_name, rank, target_modules)
    return adapted, found


def _named_by(state_dict: Mapping[str, Any], model: nn.Module) -> list[str]:
    known = dict(modules(model))
    found: dict[str, None] = {}
    for key in state_dict:
        path = key.removeprefix(PREFIX)
        while path and path not in known:
            path = path.rpartition(".")[0]
        if not path:
            raise UserError(
                f"the state dict's key {key!r} names no module of {type(model).__name__}"
            )
        found[path] = None
    return list(found)


def prepare_model_for_compiled_hotswap(model: nn.Module, *, target_rank: int | None = None) -> None:
    """Make room for LoRAs up to `target_rank` (default: the largest here), before compiling.

    The adapters come to that rank and to scale 1; what they compute stays. UserError where one is
    no plain LoRA.
    """
    prepare(roster_of(model), target_rank)


def hotswap_adapter(
    model: nn.Module, model_name_or_path: str | Path, adapter_name: str = "default"
) -> None:
    """Put the LoRA saved in a folder into the place of `adapter_name`.

    No parameter is replaced, so a compiled model is not compiled again. UserError, with nothing
    changed, where it does not fit: a higher rank, more layers, more than A and B.
    """
    hotswap(roster_of(model), adapter_name, model_name_or_path)
