"""PEFT's helpers for the starts of a LoRA that need data: EVA, CorDA, LoRA-GA."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from inlay.checkpoint.folder import read_tensors
from inlay.core.errors import UserError
from inlay.methods._starts import CordaConfig, EvaConfig
from inlay.methods.lora import Lora, LoraConfig
from inlay.model import eva, observe
from inlay.model.roster import Roster
from inlay.model.starts import Found, attach
from inlay.surface.functions import roster_of
from inlay.surface.peft_model import PeftModel

PREFIX = "base_model.model."
Batch = Any


# -- EVA


def trained_positions(batch: Batch, config: LoraConfig) -> Tensor:
    """Return the positions [N, 2] of a batch of tokens that EVA looks at: those that train."""
    if not isinstance(batch, Mapping) or "input_ids" not in batch:
        raise UserError(
            "EVA looks at batches of tokens, mappings with input_ids: for others give "
            "prepare_model_inputs_fn=None and prepare_layer_inputs_fn=None, or functions"
        )
    mask = batch.get("attention_mask")
    chosen = torch.ones_like(batch["input_ids"]).bool() if mask is None else mask.bool()
    settings = config.eva_config
    assert isinstance(settings, EvaConfig)
    if settings.use_label_mask and "labels" in batch:
        chosen = chosen & (batch["labels"] != settings.label_mask_value)
    return chosen.nonzero()


def at_positions(x: Tensor, positions: Tensor, path: str) -> Tensor:
    """Return the rows [N, I] of a layer's input [B, S, I] at `positions` [N, 2]."""
    del path
    return x[positions.T.unbind()]


def run_mapping(model: nn.Module, batch: Batch) -> Any:
    """Return what the model returns for a batch that is a mapping of its arguments."""
    return model(**batch)


def get_eva_state_dict(
    model: nn.Module,
    dataloader: Iterable[Batch],
    peft_config: LoraConfig | None = None,
    forward_fn: Callable[[nn.Module, Batch], Any] = run_mapping,
    prepare_model_inputs_fn: Callable[[Batch, LoraConfig], Any] | None = trained_positions,
    prepare_layer_inputs_fn: Callable[[Tensor, Any, str], Tensor] | None = at_positions,
    adapter_name: str = "default",
    show_progress_bar: bool = True,
) -> dict[str, Tensor]:
    """Return by module path EVA's A [rank, I]; of rank 0 where a layer is to have no adapter.

    model: with the adapter, or the base and its configuration. dataloader: batches, gone through
    until all directions are settled. The functions are PEFT's: of a batch what tells its rows apart
    (default: the positions that train), and of a layer's input with that the rows [N, I] (None: all
    of them). In a distributed training, give every process the same batches.
    """
    plain = peft_config is not None and not isinstance(model, PeftModel)
    roster = None if plain else roster_of(model)
    config = peft_config if roster is None else peft_config or roster.configs[adapter_name]
    if not isinstance(config, LoraConfig) or not isinstance(config.eva_config, EvaConfig):
        raise UserError("EVA is for a LoraConfig with init_lora_weights='eva'")
    layers = (
        observe.linear_layers(model, config) if roster is None else _layers(roster, adapter_name)
    )
    device = next(model.parameters()).device
    off = nullcontext() if roster is None else roster.selection.using(active=())

    def pick(batch: Batch) -> Callable[[str, Tensor], Tensor]:
        told = batch
        if prepare_model_inputs_fn is not None:
            told = prepare_model_inputs_fn(batch, config)
        if prepare_layer_inputs_fn is None:
            return lambda _, x: x.reshape(-1, x.shape[-1])
        return lambda path, x: prepare_layer_inputs_fn(x, told, path)

    training = model.training
    model.eval()
    try:
        with off:
            return eva.find_eva(
                layers,
                config,
                _Moved(dataloader, device),
                lambda batch: forward_fn(model, batch),
                pick,
                print if show_progress_bar else lambda _: None,
            )
    finally:
        model.train(training)


def initialize_lora_eva_weights(
    model: PeftModel,
    dataloader: Iterable[Batch] | None = None,
    eva_state_dict: Mapping[str, Tensor] | None = None,
    adapter_name: str = "default",
    **how: Any,
) -> None:
    """Start a LoRA with init_lora_weights="eva" from data: its A, and how its ranks are dealt out.

    eva_state_dict: what `get_eva_state_dict` returned, in place of batches; how: its arguments. The
    adapter's parameters are new ones afterwards, so make the optimizer then.
    """
    roster = roster_of(model)
    roster.check(adapter_name)
    config = roster.configs[adapter_name]
    if getattr(config, "init_lora_weights", None) != "eva":
        raise UserError(
            f"{adapter_name!r} has init_lora_weights="
            f"{getattr(config, 'init_lora_weights', None)!r}: EVA starts those with 'eva'"
        )
    if roster.selection.active != (adapter_name,):
        raise UserError(f"EVA starts the one active adapter: set_adapter({adapter_name!r}) first")
    if eva_state_dict is None:
        if dataloader is None:
            raise UserError("EVA needs a dataloader, or the eva_state_dict that was found with one")
        eva_state_dict = get_eva_state_dict(model, dataloader, adapter_name=adapter_name, **how)
    found = {path.removeprefix(PREFIX): a for path, a in eva_state_dict.items()}
    eva.start_eva(roster, adapter_name, found)


class _Moved:
    """Batches, each with its tensors on a device."""

    def __init__(self, batches: Iterable[Batch], device: torch.device) -> None:
        self._batches, self._device = batches, device

    def __iter__(self) -> Any:
        return (_to(batch, self._device) for batch in self._batches)


def _to(batch: Batch, device: torch.device) -> Batch:
    if hasattr(batch, "to"):
        return batch.to(device)
    if isinstance(batch, Mapping):
        return {key: _to(value, device) for key, value in batch.items()}
    if type(batch) in (tuple, list):
        return type(batch)(_to(value, device) for value in batch)
    return batch


def _layers(roster: Roster, name: str) -> dict[str, nn.Module]:
    return {
        path: host.base_layer
        for path, host, adapter in roster.adapters(name)
        if isinstance(adapter, Lora) and host.base.kind == "linear"
    }


# -- CorDA and LoRA-GA


def preprocess_corda(
    model: nn.Module,
    lora_config: LoraConfig,
    run_model: Callable[[], Any] | None = None,
    hooked_model: nn.Module | None = None,
) -> None:
    """Find CorDA's start in what the layers see while `run_model` runs the model on data.

    Then `get_peft_model(model, lora_config)` with init_lora_weights="corda" begins there. Each call
    of a layer is one sample: 256 texts, one at a time, are enough for a large model. run_model may
    be left out where a file of corda_config holds what it would find. hooked_model: another copy of
    the model that is run in its place.
    """
    settings = lora_config.corda_config
    if lora_config.start != "corda" or not isinstance(settings, CordaConfig):
        raise UserError("preprocess_corda is for a LoraConfig with init_lora_weights='corda'")
    layers = observe.linear_layers(model, lora_config)
    tell = print if settings.verbose else lambda _: None
    half = settings.use_float16_for_covariance

    def look() -> dict[str, Tensor]:
        if run_model is None:
            raise UserError("CorDA needs run_model, what runs the model on data")
        hooked = hooked_model or model
        there = layers if hooked_model is None else observe.linear_layers(hooked, lora_config)
        training = hooked.training
        hooked.eval()
        try:
            return observe.find_covariances(there, run_model, half=half)
        finally:
            hooked.train(training)

    def find() -> dict[str, Found]:
        covariances = _kept(settings.covariance_file, look)
        return observe.of_covariances(layers, lora_config, covariances, tell)

    _attach_kept(layers, lora_config, settings.cache_file, find)


def preprocess_loraga(
    model: nn.Module,
    lora_config: LoraConfig,
    train_step: Callable[[], Any],
    cache_file: str | None = None,
) -> None:
    """Find LoRA-GA's start in the gradient that `train_step` adds up, by forward and backward.

    Then `get_peft_model(model, lora_config)` with init_lora_weights="lora_ga" begins there. Only
    the weights of the layers to be adapted get gradients. cache_file: where the gradients are kept,
    and read again (safetensors).
    """
    if lora_config.start != "lora_ga":
        raise UserError("preprocess_loraga is for a LoraConfig with init_lora_weights='lora_ga'")
    layers = observe.linear_layers(model, lora_config)
    training = model.training
    model.train()
    try:
        gradients = _kept(cache_file, lambda: observe.find_gradients(model, layers, train_step))
    finally:
        model.train(training)
    attach(layers, observe.of_gradients(layers, lora_config, gradients, lambda _: None))


def _attach_kept(
    layers: observe.Layers,
    config: LoraConfig,
    file: str | None,
    find: Callable[[], dict[str, Found]],
) -> None:
    def tensors() -> dict[str, Tensor]:
        found = find()
        return {f"{p}.{part}": getattr(f, part) for p, f in found.items() for part in ("b", "a")}

    kept = _kept(file, tensors)
    attach(layers, observe.from_tensors(layers, config, kept))


def _kept(file: str | None, find: Callable[[], dict[str, Tensor]]) -> dict[str, Tensor]:
    """Return the tensors of `file`, or what is found, which is then kept there."""
    from safetensors.torch import save_file

    if file is not None and os.path.isfile(file) and os.path.getsize(file):
        return read_tensors(Path(file))
    found = find()
    if file is not None:
        Path(file).parent.mkdir(parents=True, exist_ok=True)
        save_file({name: tensor.contiguous() for name, tensor in found.items()}, file)
    return found
