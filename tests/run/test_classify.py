"""A run of `objective: classify`: what it learns, what it leaves, and that it can be used."""

from __future__ import annotations

import json

import pytest
import torch

from inlay.core.errors import UserError
from inlay.run import train
from inlay.run.opening import open_adapters
from inlay.train.precision import device_of
from tests.run.conftest import Told

WORDS = {"fruit": ("apple", "pear"), "metal": ("iron", "zinc")}


@pytest.fixture
def settings(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    rows = [
        {"text": f"Number {i} is {WORDS[label][i % 2]}.", "label": label}
        for i in range(24)
        for label in WORDS
    ]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return {
        "data": {"path": "rows.jsonl", "eval_fraction": 0.3},
        "objective": "classify",
        "train": {
            "max_steps": 6,
            "micro_batch_size": 8,
            "gradient_accumulation_steps": 1,
            "learning_rate": 5e-3,
            "precision": "float32",
        },
        "output_dir": "run",
    }


def scores(model, tokenizer, text="Number 3 is zinc."):
    ids = torch.tensor([tokenizer(text).input_ids], device=device_of(model))
    with torch.no_grad():
        return model(input_ids=ids).logits[0]


@pytest.mark.parametrize("method", ["lora", "full"])
def test_a_classifier_is_trained_saved_with_its_head_and_loaded(settings, method):
    run = train(settings, report=Told(), adapter=method)
    before, after = run.evaluation["base"], run.evaluation["adapter"]
    assert after["accuracy"] == after["macro_f1"] == 1.0
    assert after["loss"] < before["loss"]
    assert before["labeled"] == after["labeled"] == run.evaluation["held_out"]
    model, tokenizer = run.load()
    assert model.config.id2label == {0: "fruit", 1: "metal"}
    found = scores(model, tokenizer)
    assert int(found.argmax()) == 1
    if method == "lora":
        alone, _ = open_adapters({"default": str(run.adapter)}, None)
        torch.testing.assert_close(scores(alone, tokenizer), found, rtol=0, atol=1e-6)
        with model.disable_adapter():
            base = scores(model, tokenizer)
        again, _ = run.load()
        with again.disable_adapter():  # the base's new head is the run's, not random each time
            torch.testing.assert_close(scores(again, tokenizer), base, rtol=0, atol=0)


def test_the_labels_given_say_the_order(settings):
    objective = {"name": "classify", "labels": ["metal", "fruit"]}
    run = train(settings | {"objective": objective}, report=Told())
    assert run.load()[0].config.id2label == {0: "metal", 1: "fruit"}
    assert run.evaluation["adapter"]["accuracy"] == 1.0


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"data": {"format": "text"}}, "data.format is 'text', which objective classify"),
        ({"train": {"packing": True}}, "train.packing is True"),
        ({"objective": "sft", "data": {"format": "labeled"}}, "set objective: classify"),
        ({"adapter": {"task_type": "CAUSAL_LM"}}, "it must be SEQ_CLS"),
    ],
)
def test_what_does_not_go_together_is_refused(settings, change, told):
    with pytest.raises(UserError, match=told):
        train(settings, report=Told(), **change)
