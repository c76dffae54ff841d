"""Layers become one configuration, every value keeps its origin, and config.yaml says both."""

from __future__ import annotations

import dataclasses

import pytest
import yaml

from inlay.config.dump import to_yaml
from inlay.config.given import from_mapping
from inlay.config.recipe import read_recipe
from inlay.config.resolve import resolve, resolve_python
from inlay.config.schema import EvaluateConfig, RunConfig, all_keys, flatten
from inlay.config.words import read_words
from inlay.core.errors import UserError
from inlay.data.settings import DataConfig
from inlay.methods.full import FullConfig
from inlay.methods.lora import LoraConfig
from inlay.train.settings import TrainConfig


def test_the_command_line_goes_before_the_recipe_and_that_before_the_defaults(recipe):
    path = recipe("adapter: {r: 4, lora_alpha: 5}\n")
    found = resolve(read_recipe(path), read_words(["--adapter.r", "16"])[0])
    assert (found.config.adapter.r, found.config.adapter.lora_alpha) == (16, 5)
    origins = {
        name: found.origins[name] for name in ("adapter.r", "adapter.lora_alpha", "adapter.bias")
    }
    assert origins == {
        "adapter.r": "command line",
        "adapter.lora_alpha": "recipe.yaml:1",
        "adapter.bias": "default",
    }


def test_every_value_has_an_origin():
    found = resolve(from_mapping({"data": "a.jsonl"}))
    assert found.origins.keys() == flatten(found.config).keys()


@pytest.mark.parametrize(
    "text",
    [
        "data: a.jsonl\n",
        "data: {path: [a.jsonl, b/c], chat_template_kwargs: {x: false}}\nadapter: full\n",
        "data: a.jsonl\nadapter: {r: 4, rank_pattern: {q_proj: 2}, target_modules: null}\n",
        'data: {path: a.jsonl, chat_template: "{{ a }}\\n# not a comment: {% b %}"}\nlora_r: 3\n',
        "data: a.jsonl\ntrain: {learning_rate: 1e-5, warmup_steps: 3}\nobjective: pretrain\n",
        "data: a.jsonl\nadapter: {layers_to_transform: [0, 1], qalora_group_size: 8}\n",
    ],
)
def test_config_yaml_is_a_recipe_of_the_same_settings(recipe, text, tmp_path):
    found = resolve(read_recipe(recipe(text)))
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.yaml").write_text(to_yaml(found, "two\nlines"), encoding="utf-8")
    again = resolve(read_recipe(tmp_path / "run" / "config.yaml"))
    assert again.values == found.values
    assert again.notices == ()


def test_config_yaml_says_where_each_value_came_from(recipe):
    path = recipe("data: a.jsonl\nadapter: {r: 4}\n")
    text = to_yaml(resolve(read_recipe(path), read_words(["--train.seed", "7"])[0]))
    assert "  r: 4  # recipe.yaml:2\n" in text
    assert "  seed: 7  # command line\n" in text
    assert "  num_epochs: 1.0  # default\n" in text
    assert yaml.safe_load(text)["adapter"]["r"] == 4


@pytest.mark.parametrize(
    ("data", "folder"),
    [("a/b.jsonl", "runs/b"), (["x y.json", "z.json"], "runs/x-y"), ("me/chats", "runs/chats")],
)
def test_the_run_folder_is_called_after_the_data(data, folder):
    assert resolve_python({"data": data}, {}).config.output_dir == folder


def test_python_gives_a_mapping_a_config_or_a_recipe_and_overrides(recipe):
    path = recipe("data: a.jsonl\nadapter: {r: 4}\n")
    for config in (
        path,
        str(path),
        {"data": "a.jsonl", "adapter": {"r": 4}},
        {"data": DataConfig(path="a.jsonl"), "adapter.r": 4},
    ):
        found = resolve_python(config, {"train": {"seed": 7}, "evaluate": EvaluateConfig(shown=1)})
        values = (found.config.data.path, found.config.adapter.r, found.config.train.seed)
        assert values == ("a.jsonl", 4, 7)
        assert found.config.evaluate.shown == 1
        assert found.config.adapter.target_modules == "all-linear"


def test_a_config_object_is_taken_as_it_is():
    config = RunConfig(
        adapter=LoraConfig(r=3, target_modules=("q_proj",), lora_alpha=2),
        data=DataConfig(path="a.jsonl"),
        train=TrainConfig(seed=1),
        output_dir="x",
    )
    found = resolve_python(config, {})
    assert found.config == config
    assert found.origins["adapter.r"] == "python"
    assert found.origins["train.num_epochs"] == "default"


def test_a_lora_config_without_targets_keeps_pefts_meaning():
    found = resolve_python({"data": "a.jsonl", "adapter": LoraConfig()}, {})
    assert found.config.adapter.target_modules is None


def test_a_block_given_whole_hides_what_the_recipe_says_of_it(recipe):
    path = recipe("data: a.jsonl\nadapter: {r: 4, lora_alpha: 32, target_modules: [q_proj]}\n")
    whole = LoraConfig(r=2, target_modules="all-linear")
    found = resolve_python(path, {"adapter": whole})
    assert found.config.adapter == whole
    assert found.origins["adapter.lora_alpha"] == "default"
    # what is named beside it goes first
    found = resolve_python(path, {"adapter": whole, "adapter.lora_alpha": 16})
    assert (found.config.adapter.lora_alpha, found.config.adapter.r) == (16, 2)


def test_the_settings_of_another_method_are_those_of_its_class():
    found = resolve_python({"adapter": FullConfig(), "data": "a.jsonl"}, {})
    assert found.config.adapter.target_modules is None
    named = resolve_python({"adapter": "full"}, {}).config.adapter
    assert (type(named), named.target_modules) == (FullConfig, None)


@pytest.mark.parametrize(
    ("config", "told"),
    [(5, "a recipe's path"), ({3: 4}, "keys are text"), ({"adapter": DataConfig()}, "LoraConfig")],
)
def test_what_is_no_configuration_is_refused(config, told):
    with pytest.raises(UserError, match=told):
        resolve_python(config, {})


def test_a_configuration_is_frozen():
    with pytest.raises(dataclasses.FrozenInstanceError):
        RunConfig().output_dir = "x"  # type: ignore[misc]


def test_every_key_has_a_docstring():
    assert [key.name for key in all_keys().values() if not key.doc] == []
