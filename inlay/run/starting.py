"""The start of a LoRA that needs data (EVA, CorDA, LoRA-GA), found in a run's own training rows.

What was found is kept in the run folder, start.safetensors, so that a run that goes on begins where
it began: <path>.a and <path>.b, the factors of each layer (EVA: a alone).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save
from torch import Tensor, nn

from inlay import inits
from inlay.checkpoint.atomic import write_bytes
from inlay.checkpoint.folder import read_tensors
from inlay.config.schema import RunConfig
from inlay.methods._starts import EvaConfig
from inlay.methods.lora import Lora, LoraConfig
from inlay.model import eva, observe
from inlay.model.fast import inference
from inlay.model.roster import Roster
from inlay.model.starts import attach
from inlay.run.folder import START
from inlay.surface.peft_model import follow_base
from inlay.train.distributed import rank, wait
from inlay.train.order import Order, seed_of
from inlay.train.precision import autocast, device_of
from inlay.train.settings import TrainConfig
from inlay.train.step import Stepper

NAME = "default"
CORDA_ROWS, LORA_GA_ROWS = 256, 64
"""Rows that are looked at: as many as the papers find to be enough."""


@dataclasses.dataclass(frozen=True)
class Rows:
    """The training rows, and how the objective and the base take them."""

    rows: Sequence[Any]
    objective: Any
    tokenizer: Any
    precision: torch.dtype
    config: TrainConfig

    def cut(self, size: int, most: int | None = None) -> Iterator[list[Any]]:
        """Yield micro-batches of `size` rows in the order of the training's first epoch."""
        order = Order(len(self.rows), size, self.config.seed)
        left = len(self.rows) if most is None else most
        for step in range(order.steps_per_epoch):
            indices = order.indices(step)[:left]
            left -= len(indices)
            if indices:
                yield [self.rows[i] for i in indices]

    def run(self, model: nn.Module, batch: Any) -> None:
        """Run the model on a batch, for what its layers see."""
        with torch.no_grad(), autocast(self.precision, device_of(model)):
            model(**batch.inputs(), use_cache=False)

    def batch(self, model: nn.Module, rows: Sequence[Any]) -> Any:
        """Return rows as a batch on the model's device."""
        return self.objective.collate(rows, self.tokenizer).to(device_of(model))


def needs_rows(config: RunConfig) -> bool:
    """Return whether the adapter's start is found in the training rows."""
    return inits.from_data(getattr(config.adapter, "init_lora_weights", None))


def without_start(config: RunConfig) -> RunConfig:
    """Return the settings with the plain start in place of one that needs rows."""
    if not needs_rows(config):
        return config
    plain = config.adapter.replace(init_lora_weights=True)
    return dataclasses.replace(config, adapter=plain)


def begin(
    model: Any,
    config: RunConfig,
    rows: Rows,
    folder: Path,
    tell: Callable[[str], None],
    *,
    resume: bool,
) -> None:
    """Give the adapter the start that `config` names; with `resume` that of the run's folder."""
    roster: Roster = model.roster
    assert isinstance(config.adapter, LoraConfig)
    settings = roster.configs[NAME].replace(init_lora_weights=config.adapter.init_lora_weights)
    assert isinstance(settings, LoraConfig)
    layers = {
        path: host.base_layer
        for path, host, adapter in roster.adapters(NAME)
        if isinstance(adapter, Lora) and host.base.kind == "linear"
    }
    file = folder / START
    if resume and file.is_file():
        found = {name: t.to(device_of(model)) for name, t in read_tensors(file).items()}
    else:
        with inference(model), roster.selection.using(active=()), _own_random_state():
            found = FINDERS[settings.init_lora_weights](model, layers, settings, rows, tell)
        if rank() == 0:
            write_bytes(file, save({name: t.contiguous().cpu() for name, t in found.items()}))
        wait()
    with _own_random_state():
        torch.manual_seed(seed_of(rows.config.seed))
        _set_in(roster, settings, layers, found)
    if not config.autocast_adapter_dtype:
        follow_base(roster, NAME)
    tell(_told(settings, roster))


def _set_in(
    roster: Roster, settings: LoraConfig, layers: observe.Layers, found: dict[str, Tensor]
) -> None:
    is_eva = settings.init_lora_weights == "eva"
    if not is_eva:
        attach(layers, observe.from_tensors(layers, settings, found))
    roster.remove(NAME)
    roster.add(NAME, settings)
    if is_eva:
        eva.start_eva(roster, NAME, {name.removesuffix(".a"): a for name, a in found.items()})


def _told(settings: LoraConfig, roster: Roster) -> str:
    ranks = [len(a.lora_A) for _, _, a in roster.adapters(NAME) if isinstance(a, Lora)]
    dealt = f"{sum(ranks)} ranks in {len(ranks)} layers, {min(ranks)} to {max(ranks)} each"
    return f"the adapter starts from the training rows ({settings.init_lora_weights}): {dealt}"


def _own_random_state() -> Any:
    devices = list(range(torch.cuda.device_count())) if torch.cuda.is_available() else []
    return torch.random.fork_rng(devices)


def _eva(
    model: Any, layers: observe.Layers, settings: LoraConfig, rows: Rows, tell: Any
) -> dict[str, Tensor]:
    how = settings.eva_config
    assert isinstance(how, EvaConfig)

    def pick(batch: Any) -> Callable[[str, Tensor], Tensor]:
        mask = torch.ones_like(batch.input_ids).bool()
        if batch.attention_mask is not None:
            mask = batch.attention_mask.bool()
        if how.use_label_mask and batch.labels.shape == mask.shape:
            mask = mask & (batch.labels != how.label_mask_value)

        def take(_: str, x: Tensor) -> Tensor:
            # a layer that sees the last position alone has nothing to leave out
            return x[mask] if x.shape[:-1] == mask.shape else x.reshape(-1, x.shape[-1])

        return take

    class Batches:
        def __iter__(self) -> Iterator[Any]:
            for part in rows.cut(rows.config.micro_batch_size):
                yield rows.batch(model, part)

    def run(batch: Any) -> None:
        rows.run(model, batch)

    found = eva.find_eva(layers, settings, Batches(), run, pick, tell)
    return {f"{path}.a": a for path, a in found.items()}


def _corda(
    model: Any, layers: observe.Layers, settings: LoraConfig, rows: Rows, tell: Any
) -> dict[str, Tensor]:
    def run() -> None:
        for part in rows.cut(1, CORDA_ROWS):  # alone: without padding
            rows.run(model, rows.batch(model, part))

    half = getattr(settings.corda_config, "use_float16_for_covariance", False)
    covariances = observe.find_covariances(layers, run, half=half)
    return _tensors(observe.of_covariances(layers, settings, covariances, tell))


def _lora_ga(
    model: Any, layers: observe.Layers, settings: LoraConfig, rows: Rows, tell: Any
) -> dict[str, Tensor]:
    def run() -> None:
        weights = {path: layer.get_parameter("weight") for path, layer in layers.items()}
        stepper = Stepper(
            model, weights, rows.objective, rows.tokenizer, rows.precision, rows.config.seed
        )
        stepper.gradient(0, list(rows.cut(rows.config.micro_batch_size, LORA_GA_ROWS)))

    gradients = observe.find_gradients(model, layers, run)
    return _tensors(observe.of_gradients(layers, settings, gradients, tell))


def _tensors(found: dict[str, Any]) -> dict[str, Tensor]:
    return {f"{p}.{part}": getattr(f, part) for p, f in found.items() for part in ("b", "a")}


FINDERS: dict[Any, Callable[..., dict[str, Tensor]]] = {
    "eva": _eva,
    "corda": _corda,
    "lora_ga": _lora_ga,
}
