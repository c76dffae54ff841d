"""A run, from settings to what it learned: what is in its folder, and that it can be used."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file

import inlay
from inlay.core.errors import UserError
from inlay.data.ledger import read_ledger
from inlay.run import Run


def weights(run):
    return load_file(run.adapter / "adapter_model.safetensors")


def test_a_run_folder_holds_all_of_the_run(start):
    run, told = start()
    names = {path.name for path in run.folder.iterdir()}
    assert names == {
        "adapter",
        "checkpoints",
        "config.yaml",
        "evaluation.json",
        "events.jsonl",
        "ledger.jsonl",
        "loss.png",
    }
    files = {path.name for path in run.adapter.iterdir()}
    assert {"adapter_config.json", "adapter_model.safetensors", "inlay.json"} <= files
    assert {"tokenizer.json", "tokenizer_config.json", "chat_template.jinja"} <= files
    assert len(read_ledger(run.folder / "ledger.jsonl")) == 16
    assert [e["step"] for e in run.events() if e["event"] == "step"] == [1, 2, 3, 4]
    assert run.is_finished
    assert (run.outcome.stopped, run.outcome.step) == ("done", 4)
    assert run.config.adapter.r == 2
    assert told.events[-1]["event"] == "result"


def test_what_is_inferred_is_told_before_the_first_step(start):
    _, told = start()
    kinds = [event["event"] for event in told.events]
    assert kinds.index("facts") < kinds.index("step")
    facts = json.dumps(told.events[kinds.index("facts")])
    for part in (
        "format: messages",
        "chat template",
        "trained: the assistant's turns",
        "median",
        "parameters train",
        "inlay-tiny",
        "float32",
        "4 steps of 4 examples",
        "python",
    ):
        assert part in facts, part


def test_one_step_is_no_steps_and_takes_no_more_rows_than_there_are(start):
    train = {"max_steps": 1, "gradient_accumulation_steps": 50}
    _, told = start(train=train, evaluate={"answers": 0})
    facts = next(event for event in told.events if event["event"] == "facts")
    assert "sft: 1 step of 12 examples (2 x 50, more than there are), 1 epoch" in facts["training"]


def test_base_and_adapter_are_measured_on_the_held_out_rows_once(start):
    run, told = start(train={"max_steps": 4, "learning_rate": 0.01})
    base, adapter = run.evaluation["base"], run.evaluation["adapter"]
    assert run.evaluation["held_out"] == 4
    assert base["tokens"] == adapter["tokens"] > 0
    assert adapter["loss"] < base["loss"]
    assert [len(side["answers"]) for side in (base, adapter)] == [2, 2]
    assert [a["row"] for a in base["answers"]] == [a["row"] for a in adapter["answers"]]
    last = [e for e in told.events if e["event"] == "eval"][-1]
    assert adapter["loss"] == last["loss"]


def test_what_is_loaded_scores_what_the_run_said(start):
    from inlay.data.dataset import prepare
    from inlay.train.evaluate import evaluate_loss

    run, _ = start()
    model, tokenizer = Run.open("run").load()
    held = prepare(run.config.data, tokenizer).eval
    score = evaluate_loss(model, tokenizer, run.config.objective, held, batch_size=2)
    assert score.loss == pytest.approx(run.evaluation["adapter"]["loss"], abs=1e-5)
    with model.disable_adapter():
        score = evaluate_loss(model, tokenizer, run.config.objective, held, batch_size=2)
    assert score.loss == pytest.approx(run.evaluation["base"]["loss"], abs=1e-5)


def test_a_run_depends_on_its_settings_and_on_nothing_that_ran_before(start):
    first, _ = start()
    torch.manual_seed(123)
    torch.rand(7)
    second, _ = start(output_dir="other")
    third, _ = start(output_dir="seeded", train={"seed": 1})
    a, b, c = weights(first), weights(second), weights(third)
    assert all(torch.equal(a[name], b[name]) for name in a)
    assert not all(torch.equal(a[name], c[name]) for name in a)


def test_training_leaves_the_random_state_alone(start):
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    start()
    assert torch.equal(torch.rand(3), expected)


def test_inlay_train_is_the_same_run(chats, capsys):
    run = inlay.train(
        data="chats.jsonl", train={"max_steps": 1}, output_dir="run", evaluate={"answers": 0}
    )
    assert isinstance(run, inlay.Run)
    assert "adapter  run/adapter" in capsys.readouterr().out


def test_without_held_out_rows_there_are_no_scores(start):
    run, _ = start(data={"eval_fraction": 0.0})
    assert run.is_finished
    assert (run.evaluation["base"], run.evaluation["adapter"]) == (None, None)


def test_full_fine_tuning_leaves_a_plain_model(chats):
    from transformers import AutoModelForCausalLM

    run = inlay.train(
        {"data": "chats.jsonl", "adapter": "full", "output_dir": "run", "evaluate": {"answers": 0}},
        train={"max_steps": 2, "learning_rate": 1e-3, "precision": "float32"},
        **{"data.eval_fraction": 0.25},
    )
    assert run.trained == run.folder / "model"
    assert not run.adapter.exists()
    plain = AutoModelForCausalLM.from_pretrained(run.trained)
    loaded, tokenizer = run.load()
    ids = tokenizer("Where is order 3?", return_tensors="pt").input_ids
    torch.testing.assert_close(loaded(ids).logits, plain(ids).logits)
    assert run.evaluation["adapter"]["loss"] < run.evaluation["base"]["loss"]


def test_continued_pretraining_takes_plain_text(chats):
    chats.with_name("text.txt").write_text("the cat sat on the mat. " * 40, encoding="utf-8")
    run = inlay.train({"data": "text.txt", "objective": "pretrain"}, train={"max_steps": 1})
    assert run.folder.name == "text"
    assert run.is_finished


def test_packing_changes_no_result(start):
    adapter = {"lora_dropout": 0.0}
    plain, told = start(adapter=adapter, train={"packing": False})
    assert "rows padded" in json.dumps(told.events)
    for train in ({"packing": True}, {}, {"fast": False, "packing": True}):
        packed, told = start(True, adapter=adapter, train=train, output_dir="packed")
        assert "rows packed into one" in json.dumps(told.events)
        a, b = weights(plain), weights(packed)
        for name in a:
            torch.testing.assert_close(a[name], b[name], atol=1e-5, rtol=1e-4)


def test_rows_are_padded_where_packing_changes_the_result_and_a_notice_says_why(chats):
    from inlay.run import train
    from tests.run.conftest import SETTINGS, Told

    adapter, told = {"method": "prompt_tuning", "num_virtual_tokens": 2}, Told()
    assert train({**SETTINGS, "adapter": adapter, "evaluate": {"answers": 0}}, report=told)
    assert "rows padded" in json.dumps(told.events)
    notices = [text for text in told.texts().splitlines() if "not packed" in text]
    assert notices == [
        "rows are padded, not packed: virtual tokens stand before whole rows, so rows that are "
        "packed into one have none of their own"
    ]


def test_the_plain_paths_pad_unless_they_are_told_to_pack(start):
    _, told = start(train={"fast": False, "max_steps": 1}, evaluate={"answers": 0})
    assert "rows padded" in json.dumps(told.events)
    assert "not packed" not in told.texts()


def test_a_run_goes_on_as_it_began_padded_or_packed(start, monkeypatch):
    from inlay.run import training

    with monkeypatch.context() as patch:
        patch.setattr(training._Job, "save", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            start(evaluate={"answers": 0})
    monkeypatch.setattr(
        training, "choose_packing", lambda model, objective, config: (objective, "x")
    )
    with pytest.raises(UserError, match="packing was True, now False"):
        start(evaluate={"answers": 0})


def test_the_best_weights_are_measured_where_they_are_wanted(start):
    run, _ = start(train={"restore_best": True, "learning_rate": 0.05, "eval_steps": 1})
    evals = [e["loss"] for e in run.events() if e["event"] == "eval"]
    assert run.evaluation["adapter"]["loss"] == pytest.approx(min(evals), abs=1e-5)


def test_a_folder_without_a_run_is_refused(tmp_path):
    with pytest.raises(UserError, match="no run folder"):
        Run.open(tmp_path)
    with pytest.raises(UserError, match="no such folder"):
        Run.open(tmp_path / "nope")
