"""Command line words: each key is an option, and its value is read by the key's type."""

from __future__ import annotations

import pytest

from inlay.config.resolve import resolve
from inlay.config.words import read_words
from inlay.core.errors import UserError


def config(line):
    given, rest = read_words(line.split("|") if "|" in line else line.split())
    assert rest == []
    return resolve(given).config


@pytest.mark.parametrize("line", ["--adapter.r 32", "--adapter.r=32", "--lora_r 32", "--r 32"])
def test_a_key_takes_the_next_word_or_the_one_after_the_sign(line):
    assert config(line).adapter.r == 32


def test_short_forms_set_the_key_that_is_meant():
    found = config("--data a.jsonl --adapter full --objective pretrain")
    assert found.data.path == "a.jsonl"
    assert str(found.adapter.method) == "FULL"
    assert type(found.objective).__name__ == "Pretrain"


@pytest.mark.parametrize(
    ("line", "packing"),
    [
        ("--train.packing", True),
        ("--packing", True),
        ("--train.packing true", True),
        ("--train.packing=false", False),
        ("--train.packing False", False),
        ("--train.packing --train.seed 1", True),
        ("--train.packing yes", True),
        ("--train.packing off", False),
    ],
)
def test_a_flag_needs_no_value(line, packing):
    assert config(line).train.packing is packing


def test_a_flag_leaves_the_recipe_alone():
    given, rest = read_words(["--train.packing", "recipe.yaml", "--train.seed", "1"])
    assert rest == ["recipe.yaml"]
    assert [item.key for item in given] == ["train.packing", "train.seed"]


@pytest.mark.parametrize(
    "line",
    [
        "--adapter.target_modules q_proj,v_proj",
        "--adapter.target_modules|[q_proj, v_proj]",
        "--lora_target q_proj,v_proj",
    ],
)
def test_a_list_is_names_with_commas_or_yaml(line):
    assert config(line).adapter.target_modules == ["q_proj", "v_proj"]


def test_an_expression_with_a_comma_stays_one():
    line = r"--adapter.target_modules|.*layers\.\d{1,2}\..*_proj"
    assert config(line).adapter.target_modules == r".*layers\.\d{1,2}\..*_proj"


@pytest.mark.parametrize(
    ("line", "name", "value"),
    [
        ("--data.name 2024", "name", "2024"),
        ("--data.name no", "name", "no"),
        ("--data.path a,b.jsonl", "path", "a,b.jsonl"),
        ("--data.path [a.jsonl,b.jsonl]", "path", ["a.jsonl", "b.jsonl"]),
        ("--data.name null", "name", None),
        (
            "--data.chat_template_kwargs|{enable_thinking: false}",
            "chat_template_kwargs",
            {"enable_thinking": False},
        ),
    ],
)
def test_text_stays_text_where_the_key_takes_text(line, name, value):
    assert getattr(config(line).data, name) == value


@pytest.mark.parametrize(
    ("line", "rate"), [("1e-4", 1e-4), ("5.0e-3", 5e-3), ("3", 3), ("1E-4", 1e-4), (".5", 0.5)]
)
def test_a_number_may_be_written_in_any_way(line, rate):
    assert config(f"--train.learning_rate {line}").train.learning_rate == rate


def test_a_negative_number_is_a_value():
    with pytest.raises(UserError, match=r"r=-3 must be.*command line"):
        config("--adapter.r -3")


@pytest.mark.parametrize(
    ("line", "told"),
    [
        ("--adapter.r", r"--adapter.r needs a value"),
        ("--adapter.r --train.seed 1", r"--adapter.r needs a value"),
        ("--adapter.rr 3", r"'--adapter.rr' \(command line\). Did you mean '--adapter.r'"),
        ("--adaptr lora", r"Did you mean '--adapter'"),
        ("--train.max_steps two", r"train.max_steps is 'two' \(text\); it must be a whole number"),
        ("--adapter.r 4 --adapter.r 8", r"given twice"),
        ("--lora_r 4 --adapter.r 8", r"'4' as lora_r .* '8' as adapter.r"),
        ("--train 5", r"block of settings"),
        ("--r=", r"adapter.r is empty"),
        ("--train.packing 1", r"train.packing is 1 .*; it must be true or false"),
        ("--adapter lorra", r"adapter.method is 'lorra'; .* Did you mean 'lora'\? \(command line"),
        ("--task_type SEQ_CLS", r"adapter.task_type is 'SEQ_CLS'; .* must be CAUSAL_LM"),
    ],
)
def test_a_mistake_says_what_and_the_way_out(line, told):
    with pytest.raises(UserError, match=told):
        config(line)
