"""Other tools' names are taken with a notice, and refused where two disagree."""

from __future__ import annotations

import pytest

from inlay.config.aliases import ALIASES
from inlay.config.given import from_mapping
from inlay.config.resolve import resolve, resolve_python
from inlay.config.schema import all_keys, flatten
from inlay.core.errors import UserError


@pytest.mark.parametrize("name", ALIASES)
def test_an_alias_means_a_key_that_there_is_and_is_none_itself(name):
    assert ALIASES[name].key in all_keys()
    assert name not in all_keys()


@pytest.mark.parametrize(
    ("given", "key", "value"),
    [
        ({"model_name_or_path": "inlay-tiny"}, "base_model", "inlay-tiny"),
        ({"lora_r": 4}, "adapter.r", 4),
        ({"lora_rank": 4}, "adapter.r", 4),
        ({"lora_alpha": 32}, "adapter.lora_alpha", 32),
        ({"lora_dropout": 0.1}, "adapter.lora_dropout", 0.1),
        ({"adapter": {"lora_r": 4}}, "adapter.r", 4),
        ({"lora_target": "all"}, "adapter.target_modules", "all-linear"),
        ({"lora_target": "q_proj, v_proj"}, "adapter.target_modules", ["q_proj", "v_proj"]),
        ({"lora_target_modules": ["q_proj"]}, "adapter.target_modules", ["q_proj"]),
        ({"lora_target_linear": True}, "adapter.target_modules", "all-linear"),
        ({"cutoff_len": 512}, "data.max_length", 512),
        ({"sequence_len": 512}, "data.max_length", 512),
        ({"max_seq_length": 512}, "data.max_length", 512),
        ({"dataset": "a.jsonl"}, "data.path", "a.jsonl"),
        ({"val_set_size": 0.1}, "data.eval_fraction", 0.1),
        ({"train_on_inputs": False}, "data.train_on", "assistant"),
        ({"per_device_train_batch_size": 2}, "train.micro_batch_size", 2),
        ({"micro_batch_size": 2}, "train.micro_batch_size", 2),
        ({"learning_rate": 1e-4}, "train.learning_rate", 1e-4),
        ({"num_train_epochs": 3}, "train.num_epochs", 3),
        ({"num_epochs": 3}, "train.num_epochs", 3),
        ({"lr_scheduler_type": "linear"}, "train.lr_scheduler", "linear"),
        ({"optim": "adamw_8bit"}, "train.optimizer", "adamw_8bit"),
        ({"bf16": True}, "train.precision", "bfloat16"),
        ({"stage": "pt"}, "objective.name", "pretrain"),
        ({"finetuning_type": "full"}, "adapter.method", "full"),
    ],
)
def test_another_tools_name_is_taken_with_one_notice(given, key, value):
    found = resolve(from_mapping(given))
    assert flatten(found.config)[key] == value
    assert len(found.notices) == 1
    assert key in found.notices[0]
    assert next(iter(given.values())) == value or found.origins[key] == "python"


@pytest.mark.parametrize("name", ["optim", "optimizer"])
@pytest.mark.parametrize(
    ("theirs", "ours"),
    [
        ("adamw_torch", "adamw"),
        ("adamw_bnb_8bit", "adamw_8bit"),
        ("paged_adamw_32bit", "paged_adamw"),
        ("paged_adamw_8bit", "paged_adamw_8bit"),
    ],
)
def test_optimizers_are_known_by_the_names_that_other_tools_have(name, theirs, ours):
    found = resolve(from_mapping({name: theirs}))
    assert found.config.train.optimizer == ours
    assert found.notices == (f"{name} (python) is train.optimizer here",)


def test_an_own_name_gives_no_notice():
    assert resolve(from_mapping({"adapter": {"r": 4}, "data": "a.jsonl"})).notices == ()


def test_two_names_of_one_key_with_two_values_are_refused():
    with pytest.raises(UserError, match=r"4 as lora_r .*8 as adapter.r.*keep one"):
        resolve(from_mapping({"lora_r": 4, "adapter": {"r": 8}}))


def test_two_names_of_one_key_with_one_value_agree():
    assert resolve(from_mapping({"lora_r": 4, "adapter": {"r": 4}})).config.adapter.r == 4


def test_an_alias_of_an_earlier_layer_gives_way():
    layers = [from_mapping({"lora_r": 4}), from_mapping({"adapter.r": 8})]
    assert resolve(*layers).config.adapter.r == 8


def test_a_value_without_a_meaning_here_is_refused():
    with pytest.raises(UserError, match=r"lora_target_linear is False; it may be true"):
        resolve(from_mapping({"lora_target_linear": False}))


def test_four_bits_are_nf4():
    assert resolve_python({"load_in_4bit": True}, {}).config.quantize == "nf4"
