"""Configurations: frozen, brought into one form, and refused where they mean nothing."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest

from inlay.core.config import TaskType, default, plain
from inlay.core.errors import UserError, nearest
from inlay.methods.lora import LoraConfig


def test_names_come_out_as_lists_however_they_came():
    config = LoraConfig(
        target_modules={"v_proj", "q_proj"},
        exclude_modules=("a",),
        modules_to_save="head",
        layers_to_transform=range(2),
    )
    assert config.target_modules == ["q_proj", "v_proj"]
    assert config.exclude_modules == ["a"]
    assert config.modules_to_save == ["head"]
    assert config.layers_to_transform == [0, 1]
    assert LoraConfig(target_modules="all-linear").target_modules == "all-linear"


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"target_modules": [1]}, r"target_modules=\[1\] must be a list of module names"),
        ({"target_modules": {1, "q"}}, "must be a list of module names"),
        ({"target_modules": [""]}, "must be a list of module names"),
        ({"target_modules": 3}, "must be a list of module names"),
        ({"target_modules": [f"n{i}" for i in range(100_001)]}, "over the limit of 100000"),
        ({"exclude_modules": {"a": 1}}, "must be a list of module names"),
        ({"layers_to_transform": "1", "target_modules": ["q"]}, "a layer's number from 0"),
        ({"layers_to_transform": [-1], "target_modules": ["q"]}, "a layer's number from 0"),
        ({"layers_to_transform": True, "target_modules": ["q"]}, "a layer's number from 0"),
        ({"layers_to_transform": 1, "target_modules": ".*q"}, "into the expression '.*q'"),
        ({"layers_pattern": "h"}, "needs layers_to_transform"),
        ({"rank_pattern": ["q"]}, "rank_pattern=.*must map module names"),
        ({"alpha_pattern": {1: 2}}, "alpha_pattern=.*must map module names"),
        ({"rank_pattern": {f"n{i}": 1 for i in range(100_001)}}, "over the limit of 100000"),
        ({"task_type": "CAUSAL"}, "task_type 'CAUSAL' is not one of .*'CAUSAL_LM'"),
    ],
)
def test_a_setting_that_means_nothing_is_refused(settings: dict[str, Any], says: str):
    with pytest.raises(UserError, match=says):
        LoraConfig(**settings)


def test_a_configuration_is_frozen_and_a_changed_one_is_another():
    config = LoraConfig(r=4, task_type=TaskType.CAUSAL_LM)
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.r = 5  # type: ignore[misc]
    changed = config.replace(r=5)
    assert (config.r, changed.r, changed.task_type) == (4, 5, "CAUSAL_LM")
    with pytest.raises(UserError):
        config.replace(r=-1)


def test_patterns_are_sorted_once_for_all_sites():
    config = LoraConfig(rank_pattern={"q": 3})
    assert config.site_keys("rank_pattern") is config.at("a.q").site_keys("rank_pattern")
    changed = config.replace(rank_pattern={"q": 4})
    assert [c.at("a.q").r for c in (config, changed)] == [3, 4]
    assert config == LoraConfig(rank_pattern={"q": 3})


def test_pefts_own_task_types_are_understood():
    peft = pytest.importorskip("peft")

    assert LoraConfig(task_type=peft.TaskType.SEQ_CLS).task_type == "SEQ_CLS"


def test_a_configuration_is_the_same_at_every_site_where_it_has_no_patterns():
    config = LoraConfig()
    assert config.at("model.q_proj") is config


def test_the_written_form_is_plain_json():
    written = LoraConfig(target_modules={"b", "a"}, task_type=TaskType.SEQ_CLS).to_dict()
    assert written["target_modules"] == ["a", "b"]
    assert written["peft_type"] == "LORA"
    assert written["task_type"] == "SEQ_CLS"
    assert plain({"a": (TaskType.SEQ_CLS, {2, 1})}) == {"a": ["SEQ_CLS", [1, 2]]}


def test_a_default_is_made_anew_where_it_is_made_at_all():
    fields = {f.name: f for f in dataclasses.fields(LoraConfig)}
    assert default(fields["r"]) == 8
    assert default(fields["rank_pattern"]) == {}
    assert default(fields["rank_pattern"]) is not default(fields["rank_pattern"])


def test_the_nearest_name_is_offered_where_one_is_near():
    assert nearest("q_porj", ["q_proj", "v_proj"]) == " Did you mean 'q_proj'?"
    assert nearest("zzz", ["q_proj"]) == ""
