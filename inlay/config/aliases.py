"""Names that other tools have for our keys, taken with a notice; what an unknown name may mean."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from inlay.config.given import Given
from inlay.config.schema import BLOCKS, SHORT, Key, all_keys, keys
from inlay.config.values import expected
from inlay.core.errors import UserError, nearest


@dataclasses.dataclass(frozen=True)
class Alias:
    """Another tool's name for `key`."""

    key: str
    values: Mapping[Any, Any] = dataclasses.field(default_factory=dict)
    """Its values that are called otherwise here; all others are taken as they are."""
    only: bool = False
    """Whether there are no other values."""
    note: str = ""
    """In what it differs."""
    split: bool = False
    """Whether its value may be several names, joined by commas."""


_CUT = "; longer rows are dropped unless data.overlong says otherwise"

_OPTIMIZERS = {
    **dict.fromkeys(("adamw_torch", "adamw_torch_fused", "adamw_hf"), "adamw"),
    **dict.fromkeys(("adamw_bnb_8bit", "adamw8bit"), "adamw_8bit"),
    **dict.fromkeys(("paged_adamw_32bit", "paged_adamw32bit"), "paged_adamw"),
    "paged_adamw8bit": "paged_adamw_8bit",
}

ALIASES: dict[str, Alias] = {
    **dict.fromkeys(("model", "model_name", "model_name_or_path"), Alias("base_model")),
    "model_revision": Alias("revision"),
    "revision_of_model": Alias("revision"),
    "torch_dtype": Alias("dtype"),
    "load_in_4bit": Alias("quantize", {True: "nf4", False: "none"}, only=True),
    "output": Alias("output_dir"),
    "peft_autocast_adapter_dtype": Alias("autocast_adapter_dtype"),
    # the adapter
    "finetuning_type": Alias("adapter.method"),
    "method": Alias("adapter.method"),
    **dict.fromkeys(("lora_r", "lora_rank", "rank"), Alias("adapter.r")),
    "alpha": Alias("adapter.lora_alpha"),
    "dropout": Alias("adapter.lora_dropout"),
    "lora_target": Alias("adapter.target_modules", {"all": "all-linear"}, split=True),
    "lora_target_modules": Alias("adapter.target_modules", {"all": "all-linear"}, split=True),
    "lora_target_linear": Alias("adapter.target_modules", {True: "all-linear"}, only=True),
    "lora_exclude_modules": Alias("adapter.exclude_modules", split=True),
    "lora_layers_to_transform": Alias("adapter.layers_to_transform"),
    "lora_modules_to_save": Alias("adapter.modules_to_save", split=True),
    "additional_target": Alias("adapter.modules_to_save", split=True),
    "peft_use_rslora": Alias("adapter.use_rslora"),
    # the data
    **dict.fromkeys(("dataset", "dataset_path", "dataset_name", "train_file"), Alias("data.path")),
    "dataset_config": Alias("data.name"),
    "dataset_train_split": Alias("data.split"),
    "eval_dataset": Alias("data.eval_path"),
    "val_set_size": Alias("data.eval_fraction", note="; a fraction, not a number of rows"),
    "val_size": Alias("data.eval_fraction", note="; a fraction, not a number of rows"),
    "max_samples": Alias("data.limit"),
    **dict.fromkeys(
        ("cutoff_len", "sequence_len", "max_seq_length", "max_seq_len"),
        Alias("data.max_length", note=_CUT),
    ),
    "train_on_inputs": Alias("data.train_on", {True: "all", False: "assistant"}, only=True),
    "assistant_only_loss": Alias("data.train_on", {True: "assistant", False: "all"}, only=True),
    "stage": Alias("objective.name", {"pt": "pretrain"}),
    # the training
    **dict.fromkeys(("num_train_epochs", "epochs"), Alias("train.num_epochs")),
    "per_device_train_batch_size": Alias("train.micro_batch_size"),
    "per_device_eval_batch_size": Alias("train.eval_batch_size"),
    "lr": Alias("train.learning_rate"),
    "lr_scheduler_type": Alias("train.lr_scheduler"),
    **dict.fromkeys(("optim", "optimizer"), Alias("train.optimizer", _OPTIMIZERS)),
    "sample_packing": Alias("train.packing"),
    "load_best_model_at_end": Alias("train.restore_best"),
    "bf16": Alias(
        "train.precision", {True: "bfloat16", False: "float32", "auto": "auto"}, only=True
    ),
}


def rename(given: Given) -> tuple[Given, str | None]:
    """Return `given` under our own key and value, and a notice where the name was another's.

    Raises UserError for a name that means nothing, with the nearest that does.
    """
    name = given.key
    if name in SHORT and given.value is not None:
        if not isinstance(given.value, str | list | tuple):
            raise UserError(
                f"{name} is {given.value!r}; it must be a block of settings or the value of "
                f"{SHORT[name]} ({given.origin})"
            )
        return dataclasses.replace(given, key=SHORT[name]), None
    if name in all_keys():
        return given, None
    if name in BLOCKS:
        raise UserError(
            f"{name} is {given.value!r}; it must be a block of settings, such as "
            f"{_block(name)[0].name} ({given.origin})"
        )
    alias = _alias(name)
    if alias is None:
        raise unknown(given)
    key = all_keys()[alias.key]
    taken = dataclasses.replace(given, key=key.name, value=_translated(alias, key, given))
    return taken, f"{name} ({given.origin}) is {key.name} here{alias.note}"


def find_key(name: str) -> Key | None:
    """Return the key that `name` means, ours or another tool's; None where it means nothing."""
    if name in all_keys():
        return all_keys()[name]
    if name in SHORT:
        return all_keys()[SHORT[name]]
    alias = None if name in BLOCKS else _alias(name)
    return None if alias is None else all_keys()[alias.key]


def unknown(given: Given) -> UserError:
    """Return the error for a key that is not known: its place, and the nearest key or a list."""
    block, _, last = given.key.rpartition(".")
    dashes = "--" if given.is_word else ""
    message = f"unknown key {dashes + given.key!r} ({given.origin})."
    near = ""
    if block in BLOCKS:
        known = {key.last: key.name for key in _block(block) if key.shown}
        near = known.get(_bare(nearest(last, known)), "")
        # `adapter.learning_rate`: right name, wrong block
        near = near or next((key.name for key in all_keys().values() if key.last == last), "")
        if not near:
            return UserError(f"{message} {block} has {', '.join(known)}")
    known = {name: name for name in (*all_keys(), *BLOCKS, *ALIASES)}
    known |= {key.last: key.name for key in all_keys().values() if key.shown}
    near = near or known.get(_bare(nearest(given.key, known)), "")
    if near:
        return UserError(f"{message} Did you mean {dashes + near!r}?")
    top = [name for name in keys() if "." not in name]
    return UserError(
        f"{message} There are {', '.join((*BLOCKS, *top))}; inlay train --help lists all"
    )


def _alias(name: str) -> Alias | None:
    """Return what `name` means: another tool's name, or one of ours without its block."""
    block, _, last = name.rpartition(".")
    found = ALIASES.get(last)
    if found is not None and block in ("", found.key.rpartition(".")[0]):
        return found
    if not block:
        homes = [key.name for key in all_keys().values() if key.last == name and key.shown]
        if len(homes) == 1:
            return Alias(homes[0])
    return None


def _translated(alias: Alias, key: Key, given: Given) -> Any:
    value = given.value
    if given.is_word and value.lower() in ("true", "false") and (True in alias.values):
        value = value.lower() == "true"
    try:
        if value in alias.values:
            return str(alias.values[value]) if given.is_word else alias.values[value]
    except TypeError:  # a list has no hash
        pass
    if alias.only:
        meant = ", ".join(str(choice).lower() for choice in alias.values)
        raise UserError(
            f"{given.key} is {value!r}; it may be {meant} ({given.origin}). "
            f"Here it is {key.name}: {expected(key.type)}"
        )
    if alias.split and not given.is_word and isinstance(value, str) and "," in value:
        return [part.strip() for part in value.split(",")]
    return value


def _block(name: str) -> list[Key]:
    return [key for key in all_keys().values() if key.block == name]


def _bare(hint: str) -> str:
    return hint.removeprefix(" Did you mean '").removesuffix("'?")
