"""What TrainConfig refuses."""

from __future__ import annotations

import ast
import dataclasses
import inspect
import itertools

import pytest

from inlay.core.errors import UserError
from inlay.train import settings
from inlay.train.settings import TrainConfig


def test_the_defaults_are_valid():
    TrainConfig().validate()


@pytest.mark.parametrize(
    ("name", "value", "limit"),
    [
        ("num_epochs", 0, "above 0"),
        ("max_steps", 0, "above 0"),
        ("micro_batch_size", -4, "above 0"),
        ("learning_rate", float("nan"), "above 0 and finite"),
        ("learning_rate", float("inf"), "above 0 and finite"),
        ("weight_decay", -0.1, "0 or more"),
        ("warmup_ratio", 1.5, "between 0 and 1"),
        ("adam_beta2", 1.0, "below 1"),
        ("lr_scheduler", "cosin", "one of cosine, linear, constant"),
        ("precision", "fp8", "one of auto, float32, bfloat16"),
        ("save_total_limit", 0, "above 0"),
        ("seed", -1, "0 or more"),
    ],
)
def test_a_value_that_cannot_be_is_named_with_its_limit(name, value, limit):
    with pytest.raises(UserError, match=f"train.{name} is .*{limit}"):
        TrainConfig(**{name: value}).validate()


def test_every_field_has_a_docstring_under_it():
    body = next(
        node.body
        for node in ast.parse(inspect.getsource(settings)).body
        if isinstance(node, ast.ClassDef)
    )
    documented = {
        node.target.id
        for node, after in itertools.pairwise(body)
        if isinstance(node, ast.AnnAssign) and isinstance(after, ast.Expr)
    }
    assert documented == {field.name for field in dataclasses.fields(TrainConfig)}
