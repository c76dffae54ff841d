"""Recipes: every mistake in one is told with its line, and nothing in one is run."""

from __future__ import annotations

import pytest

from inlay.config.recipe import read_recipe
from inlay.config.resolve import resolve
from inlay.core.errors import UserError


def refused(path):
    with pytest.raises(UserError) as caught:
        resolve(read_recipe(path))
    return str(caught.value)


def test_every_value_knows_its_line(recipe):
    path = recipe(
        "# one\nadapter: lora\ntrain:\n  seed: 1\n  learning_rate: 1e-4\ndata: {path: a.jsonl}\n"
    )
    origins = {given.key: given.origin for given in read_recipe(path)}
    assert origins == {
        "adapter": "recipe.yaml:2",
        "train.seed": "recipe.yaml:4",
        "train.learning_rate": "recipe.yaml:5",
        "data.path": "recipe.yaml:6",
    }


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("adaptor: lora\n", ["'adaptor'", "recipe.yaml:1", "'adapter'"]),
        (
            "train:\n  lerning_rate: 1\n",
            ["'train.lerning_rate'", "recipe.yaml:2", "train.learning_rate"],
        ),
        ("adapter:\n  learning_rate: 1\n", ["recipe.yaml:2", "'train.learning_rate'"]),
        ("train:\n  zzz: 1\n", ["'train.zzz'", "train has num_epochs"]),
        ("zzzzzz: 1\n", ["'zzzzzz'", "There are adapter, data"]),
        ("data: a\ndata: b\n", ["'data'", "recipe.yaml:2", "recipe.yaml:1", "twice"]),
        ("train: {seed: 1, seed: 2}\n", ["'seed'", "twice"]),
        ("adapter: {rank_pattern: {q: 1, q: 2}}\n", ["'q'", "twice"]),
        ("data: [a\nx: }\n", ["recipe.yaml:2", "broken YAML"]),
        ("train:\n\tseed: 1\n", ["recipe.yaml:2", "broken YAML"]),
        ("", ["recipe.yaml", "empty"]),
        ("# nothing\n", ["recipe.yaml", "empty"]),
        ("- a\n", ["recipe.yaml:1", "mapping"]),
        ("just words\n", ["recipe.yaml:1", "mapping"]),
        ("train: 5\n", ["train is 5", "block", "recipe.yaml:1"]),
        ("1: 2\n2.5: 3\n", ["'1'", "recipe.yaml:1"]),
        ("? [a, b]\n: 1\n", ["recipe.yaml:1", "name"]),
        ("data: a\n---\ndata: b\n", ["recipe.yaml:2", "expected a single document"]),
    ],
)
def test_a_mistake_is_told_with_its_line_and_the_nearest_name(recipe, text, told):
    message = refused(recipe(text))
    assert [part for part in told if part not in message] == [], message
    assert len(message.splitlines()) == 1


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("train: {learning_rate: fast}\n", ["train.learning_rate", "'fast'", "a number", ":1"]),
        ("train: {max_steps: 1.5}\n", ["train.max_steps", "1.5", "a whole number or nothing"]),
        ("train: {packing: 'yes'}\n", ["train.packing", "true or false"]),
        ("train: {lr_scheduler: cosin}\n", ["cosine, linear, constant", "Did you mean 'cosine'?"]),
        ("adapter: {r: true}\n", ["adapter.r", "true", "a whole number"]),
        ("adapter: {r: '8'}\n", ["adapter.r", "'8' (text)", "a whole number"]),
        ("adapter: {target_modules: [1]}\n", ["adapter.target_modules", "list of names"]),
        ("output_dir: 2024\n", ["output_dir", "2024", "Put it in quotes"]),
        ("seed:\n", ["train.seed", "empty", "a whole number"]),
        ("data: {path: {a: b}}\n", ["data.path"]),
    ],
)
def test_a_wrong_type_names_key_value_and_what_is_expected(recipe, text, told):
    message = refused(recipe(text))
    assert [part for part in told if part not in message] == [], message


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("adapter:\n  r: -4\n", ["r=-4", "whole number", "recipe.yaml:2"]),
        ("train:\n  num_epochs: 0\n", ["train.num_epochs is 0", "recipe.yaml:2"]),
        ("data:\n  eval_fraction: 2\n", ["data.eval_fraction=2", "recipe.yaml:2"]),
        ("evaluate:\n  answers: -1\n", ["evaluate.answers", "0 or more", "recipe.yaml:2"]),
        ("adapter: qlora\n", ["'qlora'", "lora"]),
        ("adapter: {velora_config: {r: 1}}\n", ["velora_config=", "not supported"]),
        ("objective: sfd\n", ["'sfd'", "Did you mean 'sft'?"]),
        ("objective: {packing: true}\n", ["'objective.packing'", "'train.packing'"]),
        ("quantize: nf4\nadapter: full\n", ["quantize is nf4", "adapter: lora", "recipe.yaml:1"]),
        ("quantize: nf5\n", ["'nf5'", "nf4", "recipe.yaml:1"]),
        ("adapter: {method: full, r: 8}\n", ["adapter.r", "adapter: full"]),
    ],
)
def test_a_value_that_cannot_be_is_told_with_its_limit_and_line(recipe, text, told):
    message = refused(recipe(text))
    assert [part for part in told if part not in message] == [], message


def test_no_tag_builds_anything(recipe):
    message = refused(recipe("data: !!python/object/apply:os.system ['touch made']\n"))
    assert "recipe.yaml:1" in message
    assert not (recipe("x: 1").parent / "made").exists()


@pytest.mark.parametrize("text", ["adapter: !!python/object:os.system {}\n", "!mine {data: a}\n"])
def test_a_block_with_a_tag_of_its_own_is_refused(recipe, text):
    message = refused(recipe(text))
    assert "recipe.yaml:1: the tag" in message


def test_an_anchor_bomb_is_read_at_once(recipe):
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x, x]"]
    lines += [f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 10)}]" for i in range(1, 12)]
    assert "unknown key" in refused(recipe("\n".join(lines)))


def test_a_missing_recipe_names_the_nearest_file(recipe):
    recipe("x: 1\n")
    assert "Did you mean 'recipe.yaml'?" in refused("recipes.yaml")


def test_a_directory_is_no_recipe_and_names_those_in_it(recipe):
    recipe("x: 1\n")
    assert "directory" in refused(".")
    assert "recipe.yaml" in refused(".")


def test_bytes_that_are_not_utf8_are_told(recipe):
    recipe("x: 1").write_bytes(b"data: \xff\n")
    assert "UTF-8" in refused("recipe.yaml")


def test_a_number_without_a_dot_is_a_number(recipe):
    config = resolve(read_recipe(recipe("train: {learning_rate: 1e-4, num_epochs: 3}\n"))).config
    assert (config.train.learning_rate, config.train.num_epochs) == (1e-4, 3)


def test_a_date_is_text(recipe):
    config = resolve(read_recipe(recipe("output_dir: 2024-01-31\n"))).config
    assert config.output_dir == "2024-01-31"


def test_a_block_with_nothing_in_it_is_left_out(recipe):
    assert (
        resolve(read_recipe(recipe("train:\ndata: a.jsonl\n"))).origins["train.seed"] == "default"
    )


def test_dotted_keys_are_keys(recipe):
    assert resolve(read_recipe(recipe("train.seed: 7\n"))).config.train.seed == 7


def test_a_relative_path_begins_at_the_recipe(recipe, tmp_path):
    recipe("")
    inside = tmp_path / "inside"
    inside.mkdir()
    (inside / "chats.jsonl").write_text("")
    (inside / "r.yaml").write_text("data: {path: chats.jsonl, eval_path: [other.jsonl, me/hub]}\n")
    data = resolve(read_recipe("inside/r.yaml")).config.data
    assert data.path == "inside/chats.jsonl"
    assert data.eval_path == ["inside/other.jsonl", "me/hub"]
